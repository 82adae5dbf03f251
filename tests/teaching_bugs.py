"""Typical mistakes of students: each must cost at least a quarter of its part, with the hint of a failed check.

A bug is (file, old text, new text, part). Where `old` is no text of the file but "def NAME", the lines after the
docstring of that function are replaced by `new`.
"""

BUGS = {
    # --- tokenizer ---
    "WordPiece without ##": ("tokenizer.py", '(CONTINUATION if start else "") + ', "", "tokenizer"),
    "shortest piece first": (
        "tokenizer.py",
        "range(len(word), start, -1)",
        "range(start + 1, len(word) + 1)",
        "tokenizer",
    ),
    "[UNK] for a part of a word": (
        "tokenizer.py",
        "            # not even one letter fits\n            return [UNK]",
        "            return [*pieces, UNK]",
        "tokenizer",
    ),
    "long words one character too early": (
        "tokenizer.py",
        "if len(word) > MAX_WORD_CHARACTERS:\n        return [UNK]",
        "if len(word) >= MAX_WORD_CHARACTERS:\n        return [UNK]",
        "tokenizer",
    ),
    "the odd token goes to the wrong text": ("tokenizer.py", "(len(a) > len(b))", "(len(a) < len(b))", "tokenizer"),
    "only the first text is cut": (
        "tokenizer.py",
        "return a[: max(half, room - len(b))], b[: max(room - half, room - len(a))]",
        "return a[: max(0, room - len(b))], b[:room]",
        "tokenizer",
    ),
    # --- attention ---
    "scores not divided by sqrt(k)": ("bert.py", " / math.sqrt(query.shape[-1])", "", "attention"),
    "scores divided by k": ("bert.py", "math.sqrt(query.shape[-1])", "query.shape[-1]", "attention"),
    "softmax over the queries": (
        "bert.py",
        "torch.softmax(scores, dim=-1, dtype=scores.dtype)",
        "torch.softmax(scores, dim=-2, dtype=scores.dtype)",
        "attention",
    ),
    "padding is not masked": ("bert.py", "scores + extended_mask.to(scores.dtype)", "scores", "attention"),
    "mask in float32": ("bert.py", "extended_mask.to(scores.dtype)", "extended_mask.float()", "attention"),
    "dropout before the softmax": (
        "bert.py",
        "dropout(torch.softmax(scores, dim=-1, dtype=scores.dtype))",
        "torch.softmax(dropout(scores), dim=-1)",
        "attention",
    ),
    "dropout of the values": (
        "bert.py",
        "dropout(torch.softmax(scores, dim=-1, dtype=scores.dtype))  # [b,h,s,s]\n    return weights @ value",
        "torch.softmax(scores, dim=-1, dtype=scores.dtype)\n    return dropout(weights @ value)",
        "attention",
    ),
    "heads cut without a transpose": (
        "bert.py",
        "def BertSelfAttention.split_heads",
        "return x.view(x.shape[0], self.num_attention_heads, x.shape[1], self.attention_head_size)",
        "attention",
    ),
    "heads joined without a transpose": (
        "bert.py",
        "return x.transpose(1, 2).flatten(2)",
        "return x.reshape(x.shape[0], x.shape[2], -1)",
        "attention",
    ),
    # --- layer ---
    "no residual around the attention": (
        "bert.py",
        'attention_layer_norm(h + adapt("attention", attended))',
        'attention_layer_norm(adapt("attention", attended))',
        "layer",
    ),
    "the second residual starts at h": ("bert.py", "out_layer_norm(middle + ", "out_layer_norm(h + ", "layer"),
    "LayerNorm before the sum": (
        "bert.py",
        'self.attention_layer_norm(h + adapt("attention", attended))',
        'h + self.attention_layer_norm(adapt("attention", attended))',
        "layer",
    ),
    "LayerNorm before the sub-layers": (
        "bert.py",
        "def BertLayer.forward",
        "x = h + adapt('attention', self.attention_dropout(self.attention_dense(\n"
        "    self.self_attention(self.attention_layer_norm(h), extended_mask, adapt))))\n"
        "ffn = self.out_dense(self.interm_af(self.interm_dense(self.out_layer_norm(x))))\n"
        "return adapt('output', x + adapt('feed_forward', self.out_dropout(ffn)))",
        "layer",
    ),
    "adapters before dropout": (
        "bert.py",
        """        attended = self.attention_dropout(self.attention_dense(self.self_attention(h, extended_mask, adapt)))
        # x: the residual adds the input, so the sub-layer learns only a change of it
        middle = self.attention_layer_norm(h + adapt("attention", attended))""",
        """        attended = self.attention_dense(self.self_attention(h, extended_mask, adapt))
        middle = self.attention_layer_norm(h + self.attention_dropout(adapt("attention", attended)))""",
        "layer",
    ),
    "no activation": ("bert.py", "self.interm_af(self.interm_dense(middle))", "self.interm_dense(middle)", "layer"),
    "no dropout of the attention": (
        "bert.py",
        "self.attention_dropout(self.attention_dense(self.self_attention(h, extended_mask, adapt)))",
        "self.attention_dense(self.self_attention(h, extended_mask, adapt))",
        "layer",
    ),
    "adapters after the residual": (
        "bert.py",
        'self.out_layer_norm(middle + adapt("feed_forward", transformed))',
        'self.out_layer_norm(adapt("feed_forward", middle + transformed))',
        "layer",
    ),
    "the attention sees padding": (
        "bert.py",
        "self.self_attention(h, extended_mask, adapt)",
        "self.self_attention(h, 0 * extended_mask, adapt)",
        "layer",
    ),
    # --- embeddings ---
    "no positions": ("bert.py", "embedding + self.pos_embedding(position_ids)", "embedding", "embeddings"),
    "no LayerNorm of the embeddings": (
        "bert.py",
        "self.embed_dropout(self.embed_layer_norm(embedding))",
        "self.embed_dropout(embedding)",
        "embeddings",
    ),
    "segment ids ignored": (
        "bert.py",
        "self.tk_type_embedding(token_type_ids)",
        "self.tk_type_embedding(0 * token_type_ids)",
        "embeddings",
    ),
    "segment 1 by default": ("bert.py", "torch.zeros_like(input_ids)", "torch.ones_like(input_ids)", "embeddings"),
    "pooler without tanh": (
        "bert.py",
        "self.pooler_af(self.pooler_dense(h[:, 0]))",
        "self.pooler_dense(h[:, 0])",
        "embeddings",
    ),
    "pooler of the last token": ("bert.py", "self.pooler_dense(h[:, 0])", "self.pooler_dense(h[:, -1])", "embeddings"),
    "mask the other way round": (
        "bert.py",
        "(1.0 - mask[:, None, None, :].to(dtype))",
        "mask[:, None, None, :].to(dtype)",
        "embeddings",
    ),
    # --- optimizer ---
    "RMSprop without the square": (
        "optimizer.py",
        "v.mul_(gamma).addcmul_(g, g, value=1 - gamma)",
        "v.mul_(gamma).add_(g.abs(), alpha=1 - gamma)",
        "optimizer",
    ),
    "no bias correction": ("optimizer.py", 'if group["correct_bias"]:', "if False:", "optimizer"),
    "bias correction of m only": (
        "optimizer.py",
        "math.sqrt(1 - beta2**t) / (1 - beta1**t)",
        "1 / (1 - beta1**t)",
        "optimizer",
    ),
    "weight decay in the gradient": (
        "optimizer.py",
        "        m.lerp_(g, 1 - beta1)",
        '        g = g + group["weight_decay"] * p\n        m.lerp_(g, 1 - beta1)',
        "optimizer",
    ),
    "SGD uphill": ("optimizer.py", 'p.add_(g, alpha=-group["lr"])', 'p.add_(g, alpha=group["lr"])', "optimizer"),
    "parameters not changed in place": (
        "optimizer.py",
        'p.add_(g, alpha=-group["lr"])',
        'p = p - group["lr"] * g',
        "optimizer",
    ),
    "linear schedule without warm-up": (
        "optimizer.py",
        "def linear",
        "return 1 - progress",
        "optimizer",
    ),
    "cosine schedule to -1": ("optimizer.py", "0.5 * (1 + math.cos(", "1.0 * (0 + math.cos(", "optimizer"),
    "each gradient clipped by itself": (
        "optimizer.py",
        "    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)",
        "    factor = [(max_norm / (g.norm() + 1e-6)).clamp(max=1.0) for g in gradients]\n    "
        "torch._foreach_mul_(gradients, factor)\n    return norm\n    factor = 1",
        "optimizer",
    ),
    "small gradients scaled up": (
        "optimizer.py",
        "(max_norm / (norm + 1e-6)).clamp(max=1.0)",
        "max_norm / (norm + 1e-6)",
        "optimizer",
    ),
    # --- losses ---
    "segment 0 for the second text": (
        "tokenizer.py",
        "[0] * (len(first) + 2) + [1] * (len(second) + 1)",
        "[0] * (len(first) + 1) + [1] * (len(second) + 2)",
        "losses",
    ),
    "no room for the last [SEP]": (
        "tokenizer.py",
        "truncate_pair(first, second, limit - 3)",
        "truncate_pair(first, second, limit - 2)",
        "losses",
    ),
    "mean of the cross entropy": ("tasks.py", 'labels.long(), reduction="none")', "labels.long())", "losses"),
    "KL in one direction": (
        "tasks.py",
        "return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)",
        "return (log_p.exp() * (log_p - log_q)).sum(-1)",
        "losses",
    ),
    "softmax of one logit": (
        "tasks.py",
        "return ((side * p).sigmoid() - (side * q).sigmoid()) * side * (p - q)",
        "return (p.unsqueeze(-1).softmax(-1) - q.unsqueeze(-1).softmax(-1)).squeeze(-1) * (p - q)",
        "losses",
    ),
    "cosine loss with a margin": ("tasks.py", "cosine.clamp(min=0))", "(cosine - 0.1).clamp(min=0))", "losses"),
    "decision not stretched": (
        "tasks.py",
        "p = torch.where(score < threshold, below, above)",
        "p = score",
        "losses",
    ),
    # --- classifier ---
    "loss divided by the batch": (
        "multitask_classifier.py",
        "sum(values.values()).sum() / examples",
        "sum(values.values()).mean()",
        "classifier",
    ),
    "loss not divided": (
        "multitask_classifier.py",
        "sum(values.values()).sum() / examples",
        "sum(values.values()).sum()",
        "classifier",
    ),
    "no task weights": ("multitask_classifier.py", "parts.settings.task_weights[name] * sum(", "sum(", "classifier"),
    "exit weights ignored": (
        "multitask_classifier.py",
        "sum(w * batch.task.objective.loss(",
        "sum(batch.task.objective.loss(",
        "classifier",
    ),
    "embeds ignored": (
        "multitask_classifier.py",
        "embeds = embeds or self.embed(batch)",
        "embeds = self.embed(batch)",
        "classifier",
    ),
    "all layers for any exit": (
        "multitask_classifier.py",
        "self.encode(embeds, masks, task, 0, max(exits))",
        "self.encode(embeds, masks, task)",
        "classifier",
    ),
    "learning rate not scheduled": (
        "multitask_classifier.py",
        'group["lr"] = group["initial_lr"] * multiplier',
        'group["lr"] = group["initial_lr"]',
        "classifier",
    ),
    "clipping after the step": (
        "multitask_classifier.py",
        "    precision.scaler.step(optimizer)\n    precision.scaler.update()\n    "
        "optimizer.zero_grad(set_to_none=True)",
        "    optimizer.zero_grad(set_to_none=True)\n    precision.scaler.step(optimizer)",
        "classifier",
    ),
    "gradients not cleared": (
        "multitask_classifier.py",
        "    optimizer.zero_grad(set_to_none=True)\n    return",
        "    return",
        "classifier",
    ),
    "learning rate multiplied again and again": (
        "multitask_classifier.py",
        'group["lr"] = group["initial_lr"] * multiplier',
        'group["lr"] *= multiplier',
        "classifier",
    ),
    "gradients not combined": ("multitask_classifier.py", "    parts.gradients.combine()\n", "", "classifier"),
    "gradients not unscaled": (
        "multitask_classifier.py",
        "    precision.scaler.unscale_(optimizer)\n",
        "",
        "classifier",
    ),
    "loss not scaled": ("multitask_classifier.py", "precision.scaler.scale(loss)", "loss", "classifier"),
    "weight of the process ignored": ("multitask_classifier.py", "weight * term(", "term(", "classifier"),
    "sums keep their graph": ("multitask_classifier.py", "value.detach().sum()", "value.sum()", "classifier"),
    "gradients set to 0": (
        "multitask_classifier.py",
        "zero_grad(set_to_none=True)\n    return results",
        "zero_grad(set_to_none=False)\n    return results",
        "classifier",
    ),
    "random state after the layers": (
        "multitask_classifier.py",
        "return Outputs(embeds, states, logits, rng)",
        "return Outputs(embeds, states, logits, get_state())",
        "classifier",
    ),
    # --- evaluation ---
    "the task's own metric left out": (
        "evaluation.py",
        "(PEARSON, SPEARMAN, task.metric)",
        "(PEARSON, SPEARMAN)",
        "evaluation",
    ),
    "threshold at a score": (
        "evaluation.py",
        "(scores[1:] + scores[:-1]) / 2",
        "scores[1:]",
        "evaluation",
    ),
    "threshold between equal scores": (
        "evaluation.py",
        "np.where(distinct, right, -1).argmax()",
        "right.argmax()",
        "evaluation",
    ),
    "constant predictions correlate": ("evaluation.py", "np.full_like(values, values.mean())", "values", "evaluation"),
    "Spearman in place of Pearson": (
        "evaluation.py",
        "metrics = measure((PEARSON, SPEARMAN, task.metric), values, labels)",
        'metrics = measure((PEARSON, SPEARMAN, task.metric), values, labels)\n    metrics["pearson"] = '
        'metrics["spearman"]',
        "evaluation",
    ),
    # --- early exit ---
    "target with a gradient": (
        "early_exit.py",
        "decode(logits.detach(), decision_threshold)",
        "decode(logits, decision_threshold)",
        "early_exit",
    ),
    "target without a scale": ("early_exit.py", " / ((high - low) / 2)", "", "early_exit"),
    "LTE trains no layer": (
        "early_exit.py",
        "lte.certainty(outputs.states[i])",
        "lte.certainty(outputs.states[i].detach())",
        "early_exit",
    ),
    "no exit weights": ("early_exit.py", "total + weight * (lte.", "total + (lte.", "early_exit"),
    "leaves above the threshold": ("early_exit.py", "certainty >= np.reshape", "certainty > np.reshape", "early_exit"),
    "not all leave at the last exit": ("early_exit.py", "    sure[:, -1] = True\n", "", "early_exit"),
    "leaves where it is unsure": (
        "early_exit.py",
        ">= self.thresholds[task.name]",
        "<= self.thresholds[task.name]",
        "early_exit",
    ),
    "waits for more than the threshold": (
        "early_exit.py",
        ">= self.thresholds[task.name]",
        "> self.thresholds[task.name]",
        "early_exit",
    ),
    # --- slf ---
    "all exits in the first stage": (
        "slf.py",
        "({i: 1.0},),  # L_i alone",
        "({j: 1.0 for j in range(1, i + 1)},),  #",
        "slf",
    ),
    "a model of the first stage is kept": (
        "slf.py",
        "keep=False,  # the layers above",
        "keep=True,  # the layers above",
        "slf",
    ),
    "no second stage": (
        "slf.py",
        "            without=(LTELoss,),\n        )\n    yield from second",
        "            without=(LTELoss,),\n        )",
        "slf",
    ),
    "scores do not reach the second plan": (
        "slf.py",
        "            without=(LTELoss,),\n        )\n    yield from second",
        "            without=(LTELoss,),\n        )\n    for phase in second:\n        yield phase",
        "slf",
    ),
    "an equal score counts as better": ("slf.py", "if not score > previous:", "if not score >= previous:", "slf"),
    "NaN counts as better": ("slf.py", "if not score > previous:", "if score <= previous:", "slf"),
    "starts with stage B": ("slf.py", 'stage, previous = "A", -math.inf', 'stage, previous = "B", -math.inf', "slf"),
    "schedule starts anew in each epoch": (
        "slf.py",
        "score = yield Phase(label, size, (weights[stage],), part=(epoch, epochs))",
        "score = yield Phase(label, size, (weights[stage],))",
        "slf",
    ),
    # --- smart ---
    "largest gradient of the first pass only": (
        "smart.py",
        "for g in gradient]).amax(0)[:, None, None]",
        "for g in gradient[:1]]).amax(0)[:, None, None]",
        "smart",
    ),
    "a vanished perturbation is not noticed": (
        "smart.py",
        "        self.check(batch.task, outputs.embeds, start, end, perturbed, divergence)\n",
        "",
        "smart",
    ),
    "descent instead of ascent": ("smart.py", "(x + step * g).clamp", "(x - step * g).clamp", "smart"),
    "perturbation not clipped": ("smart.py", "(x + step * g).clamp(-radius, radius)", "(x + step * g)", "smart"),
    "gradient normalised over the batch": (
        "smart.py",
        "g.abs().amax(dim=(1, 2)) for g in gradient]).amax(0)[:, None, None]",
        "g.abs().amax().expand(len(g)) for g in gradient]).amax(0)[:, None, None]",
        "smart",
    ),
    "no gradient through the clean pass": (
        "smart.py",
        "divergence = weighted_divergence(batch.task, noisy, outputs.logits, exit_weights)\n        self.check",
        "divergence = weighted_divergence(batch.task, noisy, {i: x.detach() for i, x in "
        "outputs.logits.items()}, exit_weights)\n        self.check",
        "smart",
    ),
    "Gaussian penalty without its weight": (
        "smart.py",
        "return self.weight * sum(changes)",
        "return sum(changes)",
        "smart",
    ),
    "sum of the outputs": (
        "smart.py",
        "(widen(clean[i]) - widen(noisy[i])).square().mean(-1)",
        "(widen(clean[i]) - widen(noisy[i])).square().sum(-1)",
        "smart",
    ),
    "the teacher moves too fast": (
        "smart.py",
        "for name in self.teacher], 1 - decay)",
        "for name in self.teacher], decay)",
        "smart",
    ),
    "one decay for all of the training": (
        "smart.py",
        "EARLY_DECAY if progress < EARLY else LATE_DECAY",
        "LATE_DECAY",
        "smart",
    ),
    # --- gradients ---
    "infinite gradients projected": (
        "gradients.py",
        "        if not np.isfinite(gram).all():\n            return combination  # float16 overflowed: the sum stays "
        "infinite, and the gradient scaler skips the step\n",
        "",
        "gradients",
    ),
    "cosine not clipped": (
        "gradients.py",
        "np.clip(dot / (norm * other_norm), -1.0, 1.0)",
        "dot / (norm * other_norm)",
        "gradients",
    ),
    "projection without conflict": (
        "gradients.py",
        "-dot / other_norm**2 if dot < 0 else 0.0",
        "-dot / other_norm**2",
        "gradients",
    ),
    "divided by the norm, not its square": ("gradients.py", "-dot / other_norm**2", "-dot / other_norm", "gradients"),
    "visits in a fixed order": (
        "gradients.py",
        "torch.randperm(len(others), generator=self.generator).tolist()",
        "range(len(others))",
        "gradients",
    ),
    "projection onto changed gradients": (
        "gradients.py",
        "dot = row @ gram[:, j]",
        "dot = row @ gram @ combination[j]",
        "gradients",
    ),
    "target moves only at a turn": (
        "gradients.py",
        "        self.targets[pair] = (1 - BETA) * target + BETA * cosine\n        if not cosine < target < 1:",
        "        if not cosine < target < 1:\n            return 0.0\n        self.targets[pair] = (1 - "
        "BETA) * target + BETA * cosine\n        if False:",
        "gradients",
    ),
    "GradVac with swapped sines": (
        "gradients.py",
        "(target * sine - cosine * target_sine)",
        "(target * target_sine - cosine * sine)",
        "gradients",
    ),
    # --- adapters ---
    "bottleneck without residual": (
        "adapters.py",
        "return output + self.decoder(middle)",
        "return self.decoder(middle)",
        "adapters",
    ),
    "LHUC without the factor 2": ("adapters.py", "(2 * torch.sigmoid(self.r))", "torch.sigmoid(self.r)", "adapters"),
    "LoRA of the output": ("adapters.py", "self.up(self.down(context.h))", "self.up(self.down(output))", "adapters"),
    "LoRA without alpha / r": ("adapters.py", "self.scale * self.up(", "self.up(", "adapters"),
    "PAL without a mask": ("adapters.py", "scores + extended_mask.to(scores.dtype)", "scores", "adapters"),
    "PAL of the output": (
        "adapters.py",
        "context.shared.encoder(context.h)",
        "context.shared.encoder(output)",
        "adapters",
    ),
    # --- mistakes that need a second task, group, process or a backward pass to show ---
    "first task of a step only": (
        "multitask_classifier.py",
        "for name, batches, exit_weights in step:\n        # A loss",
        "for name, batches, exit_weights in step[:1]:\n        # A loss",
        "classifier",
    ),
    "rows of all processes": (
        "multitask_classifier.py",
        ".batch(rows, positions).to(",
        ".batch(rows).to(",
        "classifier",
    ),
    "one learning rate for all groups": (
        "multitask_classifier.py",
        'group["initial_lr"] * multiplier',
        'optimizer.param_groups[0]["initial_lr"] * multiplier',
        "classifier",
    ),
    "no autocast": (
        "multitask_classifier.py",
        "            with precision.autocast():\n                outputs",
        "            if True:\n                outputs",
        "classifier",
    ),
    "scaler not updated": ("multitask_classifier.py", "    precision.scaler.update()\n", "", "classifier"),
    "no state for features": (
        "multitask_classifier.py",
        "return Outputs((), {self.depth: batch.features}, logits, None)",
        "return Outputs((), {}, logits, None)",
        "classifier",
    ),
    "the norm of the original gradient": (
        "gradients.py",
        "norm = np.sqrt(max(0.0, row @ gram @ row))",
        "norm = norms[i]",
        "gradients",
    ),
    "a generator that differs between processes": (
        "gradients.py",
        "torch.randperm(len(others), generator=self.generator)",
        "torch.randperm(len(others))",
        "gradients",
    ),
    "sigma left out": ("smart.py", "noise = tuple(self.sigma * x for x", "noise = tuple(x for x", "smart"),
    "clipped to 1 always": ("optimizer.py", "(max_norm / (norm + 1e-6))", "(1.0 / (norm + 1e-6))", "optimizer"),
    "decision threshold of 1/2 always": (
        "early_exit.py",
        "batch.labels, model.decision_threshold(task.name))",
        "batch.labels, 0.5)",
        "early_exit",
    ),
    "the lowest threshold for all tasks": (
        "early_exit.py",
        ">= self.thresholds[task.name]",
        ">= min(self.thresholds.values())",
        "early_exit",
    ),
    "no gradient to the second output": (
        "tasks.py",
        "p, q = widen(p_logits).squeeze(-1), widen(q_logits).squeeze(-1)",
        "p, q = widen(p_logits).squeeze(-1), widen(q_logits).squeeze(-1).detach()",
        "losses",
    ),
    "no gradient to the query": (
        "bert.py",
        "scores = query @ key.transpose",
        "scores = query.detach() @ key.transpose",
        "attention",
    ),
    "LHUC never learns": ("adapters.py", "torch.sigmoid(self.r))", "torch.sigmoid(self.r.data))", "adapters"),
}
