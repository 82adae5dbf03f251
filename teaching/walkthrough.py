"""A walk-through: one sentence from text to logits, a step of AdamW, an exit. Each `# %%` line starts a cell."""

# %% [markdown]
# # One sentence through BERT
#
# This file takes two sentences from text to scores, step by step, and checks each step against the program's own code.
# It shows the shape of every tensor. The letters are those of bert.py: b sentences in the batch, s tokens, d hidden
# units, h attention heads, k units of a head, f units of the feed-forward network, L layers. Outside a shape, h is a
# hidden state [b,s,d].
#
# Run the cells in an editor that understands `# %%`, or run the entire file with
# `.venv/bin/python -m teaching.walkthrough`, or make a notebook with
# `.venv/bin/python -m teaching notebook walkthrough.ipynb` and keep it beside bert.py. The file needs the weights that
# `./setup.sh` fetches and takes about ten seconds. The exercises between the steps need a few lines each.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from bert import BertModel
from datasets import SAMPLE, read_dataset
from early_exit import ExitInference
from multitask_classifier import MultitaskBERT
from optimizer import AdamW
from tasks import build_tasks
from tokenizer import BertTokenizer, split_punctuation
from weights import find_weights

folder = find_weights("minilm")
tokenizer = BertTokenizer.from_pretrained(folder)
bert = BertModel.from_pretrained(folder).eval()  # eval: no dropout
torch.manual_seed(0)


def show(name, tensor):
    """Print a tensor's name and shape."""
    print(f"{name:<34}{list(tensor.shape)}")


# %% [markdown]
# ## 1. From text to ids
#
# The tokenizer makes the text lower case, splits it into words, and splits each word into pieces of its vocabulary.
# "Unwatchable" is not in the vocabulary, so it becomes three pieces. A piece that continues a word starts with `##`.

# %%
texts = ["An unwatchable film!", "Great."]
words = split_punctuation(tokenizer.normalize(texts[0]))
pieces = [tokenizer.tokenize(text) for text in texts]
print(words)
print(pieces)

# %% [markdown]
# Each piece has a number, its id. `[CLS]` (101) goes before the text and `[SEP]` (102) after it. The second text is
# shorter, so it is padded with `[PAD]` (0). The mask is 1 for a real token and 0 for padding.

# %%
encoded = tokenizer(texts)
input_ids, mask, types = encoded["input_ids"], encoded["attention_mask"], encoded["token_type_ids"]
print(input_ids.tolist())
print(mask.tolist())
show("input_ids [b,s]", input_ids)

# %% [markdown]
# **Exercise 1.** The vocabulary is `un ##wat ##watch ##able ##a` and nothing else. Which pieces does "unwatchable"
# become? And which if `##able` is missing?

# %% [markdown]
# ## 2. From ids to vectors
#
# Three tables hold a vector of d numbers for each word piece, each position and each segment. BERT adds the three
# vectors. LayerNorm then gives each token mean 0 and standard deviation 1 over its d numbers, and applies a learned
# scale and shift.

# %%
with torch.no_grad():
    word = bert.word_embedding(input_ids)  # [b,s] -> [b,s,d]
    position = bert.pos_embedding(torch.arange(input_ids.shape[1]))  # [s] -> [s,d]: the same for every text
    segment = bert.tk_type_embedding(types)  # [b,s] -> [b,s,d]
    total = word + position + segment  # [b,s,d]
    mean = total.mean(-1, keepdim=True)  # [b,s,1]: over the d numbers of each token
    deviation = total.var(-1, unbiased=False, keepdim=True).sqrt()  # [b,s,1]
    norm = bert.embed_layer_norm
    h = (total - mean) / deviation * norm.weight + norm.bias  # [b,s,d]
    torch.testing.assert_close(h, bert.embed(input_ids, types))
show("position [s,d]", position)
show("h [b,s,d]", h)

# %% [markdown]
# **Exercise 2.** How many parameters does a BERT have, as a formula of the vocabulary's size V, the number of positions
# P, two segments, d, the width f of the feed-forward network, and L? Compare with `bert.parameters()`.

# %% [markdown]
# ## 3. Attention
#
# Every token makes a query (what it looks for), a key (what it can be found by) and a value (what it hands over). The
# query of token i times the key of token j is a score. A softmax turns the scores of token i into weights that sum
# to 1. The result of token i is the mean of all values with these weights. Each of the h heads does this with its own
# k = d / h numbers.

# %%
layer = bert.bert_layers[0]
attention = layer.self_attention
heads, size = attention.num_attention_heads, attention.attention_head_size
b, s, d = h.shape
with torch.no_grad():
    query, key, value = (
        linear(h).view(b, s, heads, size).transpose(1, 2)  # [b,s,d] -> [b,s,h,k] -> [b,h,s,k]
        for linear in (attention.query, attention.key, attention.value)
    )
    scores = query @ key.transpose(-1, -2) / size**0.5  # [b,h,s,k] @ [b,h,k,s] -> [b,h,s,s]
    extended_mask = (1.0 - mask[:, None, None, :]) * -1e4  # [b,1,1,s]: 0 for a token, -10000 for padding
    weights = (scores + extended_mask).softmax(-1)  # [b,h,s,s]: each row sums to 1
    gathered = weights @ value  # [b,h,s,s] @ [b,h,s,k] -> [b,h,s,k]
    merged = gathered.transpose(1, 2).reshape(b, s, d)  # [b,s,h,k] -> [b,s,d]
    torch.testing.assert_close(merged, attention(h, extended_mask))
show("query, key, value [b,h,s,k]", query)
show("weights [b,h,s,s]", weights)
show("merged [b,s,d]", merged)
print("weight on padding:", weights[1, :, :, mask[1] == 0].max().item())

# %% [markdown]
# A picture of the weights: row i shows where token i looks. Of layer 1, head 2 (counted from 0)
# looks at the token before, head 5 mixes tokens. No one programmed this; both heads learned it.

# %%
tokens = ["[CLS]", *pieces[0], "[SEP]"]
figure, axes = plt.subplots(1, 2, figsize=(9, 5), layout="tight")
for axis, head in zip(axes, (2, 5), strict=True):
    axis.imshow(weights[0, head].numpy(), vmin=0, vmax=1, cmap="Blues")
    axis.set_xticks(range(len(tokens)), tokens, rotation=60)
    axis.set_yticks(range(len(tokens)), tokens)
    axis.set(title=f"layer 1, head {head}", xlabel="key: looked at", ylabel="query: looks")
picture = Path("runs") / "walkthrough-attention.png"
picture.parent.mkdir(exist_ok=True)
figure.savefig(picture, dpi=110)
print("picture:", picture)
figure  # noqa: B018 (a notebook shows the last value of a cell)

# %% [markdown]
# **Exercise 3.** The numbers of a query and a key are independent, with mean 0 and variance 1. What is the variance of
# their product, a sum over k terms? What does the division by sqrt(k) do to it, and to the softmax?
#
# **Exercise 4.** Take away the position embeddings. What happens to the last hidden state when you swap two tokens?

# %% [markdown]
# ## 4. The rest of the layer
#
# A linear map mixes the heads. The result is added to the input of the attention (a residual) and normalised. Then a
# feed-forward network treats each token alone: d numbers become f = 4 d, GELU, and d again. A residual and LayerNorm
# follow.

# %%
with torch.no_grad():
    middle = layer.attention_layer_norm(h + layer.attention_dense(merged))  # [b,s,d]
    wide = F.gelu(layer.interm_dense(middle))  # [b,s,d] -> [b,s,f]
    output = layer.out_layer_norm(middle + layer.out_dense(wide))  # [b,s,f] -> [b,s,d]
    torch.testing.assert_close(output, layer(h, extended_mask))
show("wide [b,s,f]", wide)
show("output of layer 1 [b,s,d]", output)

# %% [markdown]
# ## 5. All layers, one vector for the sentence, five logits
#
# The L layers follow one another. The mean over the real tokens makes one vector of a sentence; padding does not count.
# A linear head turns it into five logits, one for each class of SST. The head is new, so its probabilities are almost
# equal. The model class of the program computes the same numbers.

# %%
tasks = build_tasks(["sst"])
model = MultitaskBERT(bert, tasks, pooling="mean", with_exits=True, init=torch.Generator().manual_seed(1)).eval()
data = read_dataset(tasks["sst"], SAMPLE / "ids-sst-dev.csv", tokenizer)
with torch.no_grad():
    state = h
    for one_layer in bert.bert_layers:
        state = one_layer(state, extended_mask)  # [b,s,d]
    real = mask.unsqueeze(-1)  # [b,s,1]
    sentence = (state * real).sum(1) / real.sum(1)  # [b,d]
    logits = sentence @ model.heads["sst"].weight.T + model.heads["sst"].bias  # [b,d] @ [d,5] -> [b,5]
    torch.testing.assert_close(logits, model.predict_sentiment(input_ids, mask))
show("sentence [b,d]", sentence)
show("logits [b,5]", logits)
print("probabilities:", [round(p, 3) for p in logits[0].softmax(-1).tolist()])

# %% [markdown]
# ## 6. One step of AdamW by hand
#
# Suppose the first text has the label 0 and the second the label 4. The loss is the mean of -log p[label]. `backward`
# computes its gradient. AdamW keeps two running means for each parameter, m of the gradient and v of its square. In the
# first step both start at 0, so the bias correction matters most.

# %%
labels, rate, beta1, beta2, eps, decay = torch.tensor([0, 4]), 1e-3, 0.9, 0.999, 1e-6, 0.01
head = model.heads["sst"]
before = head.weight.detach().clone()  # [5,d]
F.cross_entropy(head(sentence), labels).backward()
g = head.weight.grad  # [5,d]
m = (1 - beta1) * g  # beta1 * 0 + (1 - beta1) g
v = (1 - beta2) * g**2
step = rate * (1 - beta2) ** 0.5 / (1 - beta1) * m / (v.sqrt() + eps)  # t = 1: beta^t is beta
after = (before - step) * (1 - rate * decay)  # then decoupled weight decay
AdamW([head.weight], lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=decay).step()
torch.testing.assert_close(head.weight.detach(), after)
print("gradient:", [f"{x:+.4f}" for x in g[0, :4].tolist()])
print("step:    ", [f"{x:+.6f}" for x in step[0, :4].tolist()])

# %% [markdown]
# **Exercise 5.** The gradients above differ by a factor of six, yet all steps have almost the same size. Why?
# What would plain gradient descent do?
#
# **Exercise 6.** Without bias correction, how large is the first step?

# %% [markdown]
# ## 7. One exit
#
# An exit is a head after a layer. Here each of the L exits learns from 200 sentences of the sample data, while BERT is
# frozen: one pass computes all states, then the heads train on them.

# %%
train = read_dataset(tasks["sst"], SAMPLE / "ids-sst-train.csv", tokenizer)
batch = train.batch(train.usable[:200])
exits = range(1, model.depth + 1)
with torch.no_grad():
    states = model(batch, exits=tuple(exits)).states  # {exit: [200,d]}
parameters = [p for name, p in model.named_parameters() if name.startswith(("exits.", "heads."))]
optimizer = AdamW(parameters, lr=2e-3)
for _ in range(150):
    optimizer.zero_grad()
    sum(F.cross_entropy(model.head(i, states[i], tasks["sst"]), batch.labels.long()) for i in exits).backward()
    optimizer.step()

# %% [markdown]
# Now one dev sentence goes up the layers. It leaves at the first exit whose largest probability reaches the threshold.
# `ExitInference` is the program's own rule and agrees.

# %%
threshold = 0.6
example = data.batch([0])
with torch.no_grad():
    logits = model(example, exits=tuple(exits)).logits  # {exit: [1,5]}
    confidence = [logits[i].softmax(-1).max().item() for i in exits]
    leaves = next((i for i, c in zip(exits, confidence, strict=True) if c >= threshold), model.depth)
    _, layers = ExitInference({"sst": "confidence"}, {"sst": threshold})(model, example, 1)
print(data.text(0)[0])
for i, c in zip(exits, confidence, strict=True):
    print(f"exit {i}: confidence {c:.2f}" + (" leaves here" if i == leaves else ""))
assert layers.tolist() == [leaves]

# %% [markdown]
# **Exercise 7.** Three sentences have these confidences at exits 1 to 4 of a BERT with 4 layers: (.5, .7, .9, .9),
# (.3, .4, .5, .6), (.9, .9, .9, .9). How many layers does each run at threshold .7, and what share of the layers is
# saved?
#
# **Exercise 8.** What does a model score on the sample's dev sets if it predicts the same class for every row? What is
# its Pearson correlation on STS, and what is its norm? (Its formula is in evaluation.py.)
