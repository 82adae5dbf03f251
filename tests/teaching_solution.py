"""Another correct solution of all parts: other internals, helper functions, new methods, imports inside functions.

BODIES is {function: its body}; HELPERS is {module: what a student adds at the end of the file}.
"""

HELPERS = {
    "tokenizer": '''
import math
from typing import Optional

NOTHING: Optional[str] = None

def first_fit(word, at, vocab):
    """The longest piece that starts at a place."""
    mark = CONTINUATION if at > 0 else ""
    fits = [n for n in range(at + 1, len(word) + 1) if mark + word[at:n] in vocab]
    return max(fits) if fits else NOTHING
''',
    "bert": '''
from functools import reduce
import torch.nn.functional as fun

def widths(x, heads):
    return x.shape[-1] // heads

class Scores:
    def __init__(self, q, k):
        self.q, self.k = q, k
    def value(self):
        return torch.einsum("bhqk,bhsk->bhqs", self.q, self.k) * widths(self.q, 1) ** -0.5

def unchanged(x):
    """A name that the original uses for something else."""
    return x
''',
    "optimizer": """
def shrink(p, group):
    p -= p * group["lr"] * group["weight_decay"]

def ramp(progress, warmup):
    return progress / warmup
""",
    "tasks": """
def lift(x):
    return x if x.dtype in (torch.float32, torch.float64) else x.float()

def last(x):
    return lift(x)[..., 0]
""",
    "multitask_classifier": """
def one_loss(parts, name, rows, exits, terms):
    own, weight = parallel.share(len(rows))
    batch = parts.data[name]["train"].batch(rows, own).to(parts.precision.device)
    with parts.precision.autocast():
        out = parts.model(batch, exits=tuple(exits))
    return {key: weight * term(parts.model, batch, out, exits) for key, term in terms.items()}
""",
    "gradients": """
def dot(a, b):
    return float(sum(x * y for x, y in zip(a, b)))
""",
    "slf": """
import math as m

def stage_one(i, epochs):
    settings = {"keep": False, "scored": True, "without": (LTELoss,)}
    return Phase(f"{i}", epochs, ({i: 1.0},), LayerAndExit(i), **settings)
""",
}

BODIES = {
    "tokenizer.split_word_pieces": """
result, at = [], 0
if len(word) > MAX_WORD_CHARACTERS:
    return ["[UNK]"]
while at != len(word):
    end = first_fit(word, at, vocab)
    if end is NOTHING:
        return [UNK]
    result.append(("##" if at else "") + word[at:end])
    at = end
return result
""",
    "tokenizer.truncate_pair": """
a, b = list(a), list(b)
longer = a if len(a) > len(b) else b
while len(a) + len(b) > max(room, 0):
    if len(a) > len(b):
        a.pop()
    elif len(b) > len(a):
        b.pop()
    else:
        (b if longer is a else a).pop()
return a, b
""",
    "tokenizer.pack": """
if limit is not None:
    if second is None:
        first = list(first)[: limit - 2]
    else:
        first, second = truncate_pair(first, second, limit - 3)
ids, types = [cls_id] + list(first) + [sep_id], [0 for _ in first] + [0, 0]
if second is not None:
    for token in second:
        ids.append(token)
        types.append(1)
    ids.append(sep_id)
    types.append(1)
return ids, types
""",
    "bert.attend_plain": """
scores = Scores(query, key).value()
scores = scores + extended_mask.type_as(scores)
shifted = (scores - scores.max(-1, keepdim=True).values).exp()
return unchanged(torch.matmul(dropout(shifted / shifted.sum(-1, keepdim=True)), value))
""",
    "bert.BertSelfAttention.split_heads": """
return torch.stack(x.chunk(self.num_attention_heads, dim=-1), dim=1)
""",
    "bert.BertSelfAttention.merge_heads": """
return torch.cat(list(x.unbind(1)), dim=-1)
""",
    "bert.BertLayer.forward": """
a = self.attention_dropout(self.attention_dense(self.self_attention(h, extended_mask, adapt=adapt)))
x = self.attention_layer_norm(adapt("attention", a) + h)
f = self.wide(x)
return adapt("output", self.out_layer_norm(adapt("feed_forward", self.out_dropout(self.out_dense(f))) + x))
""",
    "bert.BertModel.embed": """
n = input_ids.size(1)
if n > self.pos_embedding.num_embeddings:
    raise InputError("too long")
types = input_ids * 0 if token_type_ids is None else token_type_ids
tables = [self.word_embedding.weight[input_ids], self.pos_embedding.weight[:n], self.tk_type_embedding.weight[types]]
x = reduce(lambda x, y: x + y, tables)
norm = self.embed_layer_norm
return self.embed_dropout(fun.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
""",
    "bert.BertModel.extend_mask": """
hidden = (mask == 0).to(dtype) * MASKED_SCORE
return hidden.unsqueeze(1).unsqueeze(2)
""",
    "bert.BertModel.pool": """
return torch.tanh(fun.linear(h[:, 0, :], self.pooler_dense.weight, self.pooler_dense.bias))
""",
    "early_exit.Exit.pool": """
first, *_ = h.unbind(1)
return torch.tanh(self.pooler_dense(first))
""",
    "optimizer.AdamW.update": """
import math
b1, b2 = group["betas"]
m *= b1
m += (1 - b1) * g
v *= b2
v += (1 - b2) * g * g
scale = math.sqrt(1 - b2**t) / (1 - b1**t) if group["correct_bias"] else 1
p -= group["lr"] * scale * m / (v.sqrt() + group["eps"])
shrink(p, group)
""",
    "optimizer.RMSprop.update": """
v.copy_(group["gamma"] * v + (1 - group["gamma"]) * g.square())
p.sub_(group["lr"] * g / (torch.sqrt(v) + group["eps"]))
shrink(p, group)
""",
    "optimizer.SGD.update": """
p.copy_(p - group["lr"] * g)
shrink(p, group)
""",
    "optimizer.linear": """
return ramp(progress, warmup) if progress < warmup else (1.0 - progress) / (1.0 - warmup)
""",
    "optimizer.cosine": """
if progress < warmup:
    return ramp(progress, warmup)
return math.cos(math.pi / 2 * (progress - warmup) / (1 - warmup)) ** 2
""",
    "optimizer.clip_gradients": """
if max_norm <= 0:
    raise InputError("max_norm")
grads = [p.grad for p in parameters if p.grad is not None]
norm = torch.sqrt(sum([(g * g).sum() for g in grads], torch.zeros(())))
for g in grads:
    g.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1))
return norm
""",
    "tasks.cross_entropy": """
log_p = torch.log_softmax(lift(logits), -1)
return -log_p.gather(-1, labels.long()[:, None])[:, 0]
""",
    "tasks.binary_cross_entropy": """
return F.softplus(last(logits)) - labels * last(logits)
""",
    "tasks.squared_error": """
return (last(logits) - labels).square()
""",
    "tasks.cosine_embedding": """
cosine = last(logits)
return labels * (1 - cosine) + (1 - labels) * cosine.relu()
""",
    "tasks.softmax_divergence": """
p, q = F.log_softmax(lift(p_logits), -1), F.log_softmax(lift(q_logits), -1)
both = [F.kl_div(x, y, reduction="none", log_target=True) for x, y in ((p, q), (q, p))]
return sum(both).sum(-1)
""",
    "tasks.bernoulli_divergence": """
p, q = last(p_logits), last(q_logits)
return torch.sigmoid(p) * p - torch.sigmoid(p) * q - torch.sigmoid(q) * p + torch.sigmoid(q) * q
""",
    "tasks.decode_softmax": """
p = torch.softmax(lift(logits), dim=1)
return torch.max(p, dim=1).indices.to(p.dtype), p
""",
    "tasks.decide": """
p = torch.where(score < threshold, score / (2 * threshold), (1 + (score - threshold) / (1 - threshold)) / 2)
return p.gt(0.5).type_as(p), torch.stack((1 - p, p), 1)
""",
    "multitask_classifier.MultitaskBERT.forward": """
exits = (self.depth,) if exits is None else tuple(exits)
if batch.features is not None:
    output = self.head(self.depth, batch.features, batch.task)
    return Outputs((), {self.depth: batch.features}, {self.depth: output}, None)
if embeds is None:
    embeds = self.embed(batch)
rng = dropout_state(embeds[0].device)[0]()
states, logits = {}, {}
for i, hidden in self.encode(embeds, self.masks(batch), batch.task, stop=max(exits)):
    if i not in exits:
        continue
    states[i] = self.state(i, hidden, self.masks(batch), batch.task)
    logits[i] = self.head(i, states[i], batch.task)
return Outputs(embeds=embeds, states=states, logits=logits, rng=rng)
""",
    "multitask_classifier.TaskLoss.__call__": """
total = torch.zeros(len(batch), dtype=torch.float64)
for i in exit_weights:
    total = total + exit_weights[i] * batch.task.objective.loss(outputs.logits[i], batch.labels)
return total
""",
    "multitask_classifier.train_step": """
results = []
for name, batches, exit_weights in step:
    examples = 0
    for rows in batches:
        examples += len(rows)
    for rows in batches:
        values = one_loss(parts, name, rows, exit_weights, terms)
        loss = torch.stack(list(values.values())).sum() * parts.settings.task_weights[name] / examples
        parts.gradients.add(name, parts.precision.scaler.scale(loss))
        results.append((name, rows, {key: value.sum().detach() for key, value in values.items()}))
parts.gradients.combine()
parts.precision.scaler.unscale_(optimizer)
if parts.settings.clip > 0:
    clip_gradients(list(parts.model.parameters()), parts.settings.clip)
for group in optimizer.param_groups:
    group["lr"] = multiplier * group["initial_lr"]
parts.precision.scaler.step(optimizer)
parts.precision.scaler.update()
optimizer.zero_grad()
return results, parts.gradients.cosines
""",
    "evaluation.fit_decision_threshold": """
s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels)
values = np.unique(s)
cuts = [values[0] - 1e-3, *[(a + b) / 2 for a, b in zip(values[:-1], values[1:])], values[-1] + 1e-3]
right = [int(((s > cut) == (y == 1)).sum()) for cut in cuts]
return min(max(float(cuts[right.index(max(right))]), THRESHOLD_ROOM), 1 - THRESHOLD_ROOM)
""",
    "evaluation.score_regression": """
warnings, flat = [], bool(np.std(values) <= CONSTANT)
mean, sd = float(np.mean(values)), float(np.std(values))
if flat:
    warnings = [f"{task.name} is constant"]
    values = values * 0 + mean
from scipy.stats import rankdata
metrics = {"pearson": PEARSON.function(values, labels)}
metrics["spearman"] = 0.0 if flat else PEARSON.function(rankdata(values), rankdata(labels))
metrics[task.metric.name] = task.metric.function(values, labels)
return {**metrics, "mean_prediction": mean, "sd_prediction": 0.0 if flat else sd}, warnings
""",
    "early_exit.certainty_target": """
with torch.no_grad():
    guess = task.objective.decode(logits, decision_threshold)[0]
    if not task.is_regression:
        return torch.eq(guess, labels).type_as(guess)
    return 1 - torch.tanh(2 * (guess - labels).abs() / (task.labels[1] - task.labels[0]))
""",
    "early_exit.LTELoss.__call__": """
name = batch.task.name
errors = []
for i, w in exit_weights.items():
    u = model.lte[name].certainty(outputs.states[i])
    t = certainty_target(batch.task, outputs.logits[i], batch.labels, model.decision_threshold(name))
    errors.append(w * (u - t).square())
return torch.stack(errors).sum(0)
""",
    "early_exit.first_exit": """
n, depth = certainty.shape
limits = np.broadcast_to(np.asarray(threshold, dtype=float), (n,))
return np.array([next((i for i in range(1, depth) if certainty[row, i - 1] >= limits[row]), depth) for row in range(n)])
""",
    "early_exit.ExitInference.run_exit": """
state = model.state(i, hidden, masks, task)
logits = model.head(i, state, task)
if i < model.depth:
    leaves = torch.logical_not(self.certainty(model, state, logits, task) < self.thresholds[task.name])
else:
    leaves = torch.full((logits.shape[0],), True)
return logits, leaves
""",
    "slf.sequential_layer_focus": """
for layer in range(depth):
    yield stage_one(layer + 1, layer_epochs)
try:
    phase = next(second)
    while True:
        score = yield phase
        phase = second.send(score)
except StopIteration:
    return
""",
    "slf.smart_alternating": """
in_a, best = True, None
for epoch in range(epochs):
    weights = {depth: 1.0} if in_a else joint
    score = yield Phase(label="", fraction=size, exit_weights=(weights,), part=(epoch, epochs))
    if best is not None and not best < score or m.isnan(score):
        in_a = not in_a
    best = score
""",
    "smart.AdversarialSmart.perturb": """
masks = model.masks(batch)
rms = root_mean_square(outputs.embeds, masks)
r = self.radius * rms
start = [torch.minimum(torch.maximum(r * x, -r), r) for x in self.draw(outputs.embeds, masks, batch)]
moves = [x.detach().requires_grad_() for x in start]
logits = forward_again(model, batch, [h.detach() + x for h, x in zip(outputs.embeds, moves)], outputs.rng, exit_weights)
clean = {i: x.detach() for i, x in outputs.logits.items()}
weighted_divergence(batch.task, logits, clean, exit_weights).sum().backward(inputs=moves)
slopes = [x.grad * mask[:, :, None] for x, mask in zip(moves, masks)]
largest = torch.cat([g.flatten(1) for g in slopes], 1).abs().max(1).values.clamp(min=1e-300)[:, None, None]
end = [x + STEP_PER_RADIUS * r * g / largest for x, g in zip(start, slopes)]
return tuple(start), tuple(torch.minimum(torch.maximum(x, -r), r) for x in end)
""",
    "smart.AdversarialSmart.penalty": """
wide = widen_outputs(model, batch, outputs, exit_weights, self.mixed_precision)
before, delta = self.perturb(model, batch, wide, exit_weights)
moved = tuple(h + d for h, d in zip(wide.embeds, delta))
far = forward_again(model, batch, moved, wide.rng, exit_weights)
loss = weighted_divergence(batch.task, wide.logits, far, exit_weights)
self.check(batch.task, wide.embeds, before, delta, moved, loss)
return loss * self.weight
""",
    "smart.GaussianSmart.penalty": """
wide = widen_outputs(model, batch, outputs, exit_weights, self.mixed_precision)
noise = self.draw(wide.embeds, model.masks(batch), batch)
far = forward_again(model, batch, tuple(h + self.sigma * n for h, n in zip(wide.embeds, noise)), wide.rng, exit_weights)
total = 0
for i, w in exit_weights.items():
    total = total + w * ((wide.logits[i] - far[i]) ** 2).mean(dim=1)
return self.weight * total
""",
    "smart.Bregman.after_step": """
beta = LATE_DECAY if progress >= EARLY else EARLY_DECAY
now = dict(model.named_parameters())
for name in self.teacher:
    self.teacher[name].mul_(beta).add_((1 - beta) * now[name])
""",
    "gradients.PCGrad.factor": """
if dot >= 0:
    return 0.0
return abs(dot) / (other_norm * other_norm)
""",
    "gradients.PCGrad.coefficients": """
n = len(tasks)
result = np.eye(n)
if not np.all(np.isfinite(gram)):
    return result
for i in range(n):
    order = [j for j in torch.randperm(n, generator=self.generator).tolist() if j != i]
    for j in order:
        size = np.sqrt(max(0.0, dot(result[i] @ gram, result[i])))
        if size > 0 and gram[j, j] > 0:
            result[i, j] += self.factor(f"{tasks[i]}-{tasks[j]}", dot(gram[j], result[i]), size, np.sqrt(gram[j, j]))
return result
""",
    "gradients.GradVac.factor": """
cos = min(1.0, max(-1.0, dot / norm / other_norm))
phi = self.targets.setdefault(pair, 0.0)
self.targets[pair] = phi + BETA * (cos - phi)
if cos >= phi or phi >= 1:
    return 0.0
a, b = (1 - cos * cos) ** 0.5, (1 - phi * phi) ** 0.5
return norm / other_norm * (phi * a / b - cos)
""",
    "adapters.Bottleneck.forward": """
up = torch.nn.functional.gelu(output @ self.encoder.weight.T + self.encoder.bias)
return self.decoder(up) + output
""",
    "adapters.LHUC.forward": """
return output + output * torch.tanh(self.r / 2)
""",
    "adapters.LoRA.forward": """
return output + (context.h @ (self.up.weight @ self.down.weight).T) * self.scale
""",
    "adapters.ProjectedAttention.split_heads": """
b, s, m = x.shape
return x.reshape(b, s, self.heads, m // self.heads).permute(0, 2, 1, 3)
""",
    "adapters.ProjectedAttention.attend": """
q, k, v = (self.split_heads(linear(x)) for linear in (self.query, self.key, self.value))
weights = (torch.einsum("bhik,bhjk->bhij", q, k) / q.size(-1) ** 0.5 + extended_mask.to(q.dtype)).softmax(-1)
return torch.einsum("bhij,bhjk->bihk", weights, v).reshape(x.shape)
""",
    "adapters.ProjectedAttention.forward": """
return output + context.shared.decoder(self.attend(context.shared.encoder(context.h), context.extended_mask))
""",
}
# methods that a student adds: {class: text}
METHODS = {
    "bert.BertLayer": """
def wide(self, x):
    return self.interm_af(self.interm_dense(x))
""",
}
