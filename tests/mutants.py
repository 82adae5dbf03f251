"""Mutants: plausible mistakes, one at a time, that the tests have to notice.

    python tests/mutants.py                  run all mutants and write results/mutants.md
    python tests/mutants.py ID [ID ...]      run these and print their rows only
    python tests/mutants.py --jobs 2 ...     two mutants at a time
    python tests/mutants.py --check          only check that every mutant fits its file

For each mutant the runner copies the repository to a temporary folder, replaces `old` by `new` in one file, and runs
pytest on the test files that should notice the mistake. A mutant that these files do not notice meets all other test
files of the training code; one that passes them all has SURVIVED. When code moves, edit `file`, `old` and `new`.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "results" / "mutants.md"
BEFORE = ROOT / "results" / "mutants-before.md"  # the result on the code before the house was rebuilt
SECONDS = 600  # limit of one pytest run
SURVIVED, DID_NOT_RUN = "SURVIVED", "DID NOT RUN"
# every test file that a mutant can meet, the quick ones first
TESTS = [
    "tokenizer", "tasks", "samplers", "slf", "gradients", "optimizer", "datasets", "evaluation", "early_exit",
    "smart", "predict", "adapters", "weights", "bert", "inputs", "methods", "parallel", "program",
]  # fmt: skip


class Mutant(NamedTuple):
    """One mistake: `old` occurs exactly once in `file`; `tests` are the test files that should notice it.

    An entry `program:accumulated` of `tests` means the tests of test_program.py with "accumulated" in their name.
    """

    id: str
    file: str
    old: str
    new: str
    mistake: str
    tests: str


MUTANTS = [
    Mutant(*fields)
    for fields in [
        # --- tokenizer.py ---
        (
            "tokenizer-continuation",
            "tokenizer.py",
            'piece = (CONTINUATION if start else "") + word[start:end]',
            "piece = word[start:end]",
            "Pieces inside a word lack the ## prefix.",
            "tokenizer",
        ),
        (
            "tokenizer-shortest-first",
            "tokenizer.py",
            "for end in range(len(word), start, -1):",
            "for end in range(start + 1, len(word) + 1):",
            "WordPiece takes the shortest entry first instead of the longest.",
            "tokenizer",
        ),
        (
            "tokenizer-truncate-single",
            "tokenizer.py",
            "first[: limit - 2]",
            "first[: limit - 1]",
            "Truncation of a single text leaves room for one special token instead of two.",
            "tokenizer",
        ),
        (
            "tokenizer-truncate-odd",
            "tokenizer.py",
            "half = room // 2 + room % 2 * (len(a) > len(b))",
            "half = room // 2 + room % 2 * (len(a) < len(b))",
            "When both texts of a pair are cut, the shorter one gets the odd token.",
            "tokenizer",
        ),
        (
            "tokenizer-segments",
            "tokenizer.py",
            "[0] * (len(first) + 2) + [1] * (len(second) + 1)",
            "[0] * (len(first) + 1) + [1] * (len(second) + 2)",
            "The [SEP] between the two texts belongs to the second segment.",
            "tokenizer",
        ),
        (
            "tokenizer-nfc",
            "tokenizer.py",
            'unicodedata.normalize("NFD", text)',
            'unicodedata.normalize("NFC", text)',
            "Accents are composed instead of decomposed, so they are not stripped.",
            "tokenizer",
        ),
        (
            "tokenizer-long-word",
            "tokenizer.py",
            "if len(word) > MAX_WORD_CHARACTERS:",
            "if len(word) >= MAX_WORD_CHARACTERS:",
            "A word of exactly 100 characters already becomes [UNK].",
            "tokenizer",
        ),
        (
            "tokenizer-mask",
            "tokenizer.py",
            "mask, segment_ids = np.zeros(shape, dtype=np.int64)",
            "mask, segment_ids = np.ones(shape, dtype=np.int64)",
            "The attention mask marks padding as real tokens.",
            "tokenizer",
        ),
        # --- bert.py ---
        (
            "bert-sqrt-k",
            "bert.py",
            "scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])",
            "scores = query @ key.transpose(-1, -2)",
            "The attention scores are not divided by sqrt(k).",
            "bert",
        ),
        (
            "bert-mask-sign",
            "bert.py",
            "(1.0 - mask[:, None, None, :].to(dtype)) * MASKED_SCORE",
            "mask[:, None, None, :].to(dtype) * MASKED_SCORE",
            "The mask hides the real tokens and leaves the padding visible.",
            "bert",
        ),
        (
            "bert-softmax-axis",
            "bert.py",
            "torch.softmax(scores, dim=-1, dtype=scores.dtype)",
            "torch.softmax(scores, dim=-2, dtype=scores.dtype)",
            "The softmax runs over the queries instead of the keys.",
            "bert",
        ),
        (
            "bert-merge-heads",
            "bert.py",
            "return x.transpose(1, 2).flatten(2)",
            "return x.reshape(x.shape[0], x.shape[2], -1)",
            "The heads are merged without swapping the head and the token axis back.",
            "bert",
        ),
        (
            "bert-residual",
            "bert.py",
            'self.attention_layer_norm(h + adapt("attention", attended))',
            'self.attention_layer_norm(adapt("attention", attended))',
            "The residual around attention is missing.",
            "bert",
        ),
        (
            "bert-wrong-residual",
            "bert.py",
            "self.out_layer_norm(middle + adapt",
            "self.out_layer_norm(h + adapt",
            "The second residual adds the layer's input instead of the output of the first LayerNorm.",
            "bert",
        ),
        (
            "bert-positions",
            "bert.py",
            "embedding = embedding + self.pos_embedding(position_ids)",
            "embedding = embedding + self.pos_embedding(position_ids * 0)",
            "Every token gets the embedding of position 0.",
            "bert",
        ),
        (
            "bert-pooler",
            "bert.py",
            "return self.pooler_af(self.pooler_dense(h[:, 0]))",
            "return self.pooler_dense(h[:, 0])",
            "The pooler lacks its tanh.",
            "bert",
        ),
        # --- base_bert.py ---
        (
            "bert-dropout-scale",
            "base_bert.py",
            "kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))",
            "kept.to(x.dtype)",
            "Dropout does not scale up the numbers that it keeps.",
            "bert",
        ),
        # --- bert.py ---
        (
            "bert-sdpa-dropout",
            "bert.py",
            "dropout_p = dropout.p if dropout.training else 0.0",
            "dropout_p = dropout.p",
            "The fused attention kernel drops weights in evaluation too.",
            "bert",
        ),
        # --- base_bert.py ---
        (
            "weights-gelu",
            "base_bert.py",
            '"gelu": nn.functional.gelu,',
            '"gelu": functools.partial(nn.functional.gelu, approximate="tanh"),',
            "GELU is the tanh approximation instead of the exact function.",
            "bert",
        ),
        (
            "weights-query-key",
            "base_bert.py",
            '"self_attention.query": "attention.self.query",\n    "self_attention.key": "attention.self.key",',
            '"self_attention.query": "attention.self.key",\n    "self_attention.key": "attention.self.query",',
            "Loading and saving swap the query and the key projections.",
            "bert weights",
        ),
        (
            "weights-layer-norm-eps",
            "base_bert.py",
            "layer_norm_eps: float = 1e-12",
            "layer_norm_eps: float = 1e-5",
            "The default epsilon of LayerNorm is PyTorch's instead of BERT's.",
            "weights bert",
        ),
        # --- weights.py ---
        (
            "weights-old-names",
            "weights.py",
            '(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))',
            '(("LayerNorm.gamma", "LayerNorm.bias"), ("LayerNorm.beta", "LayerNorm.weight"))',
            "gamma and beta of old files are swapped.",
            "weights",
        ),
        # --- base_bert.py ---
        (
            "weights-padding-row",
            "base_bert.py",
            "module.weight[module.padding_idx].zero_()",
            "module.weight[module.padding_idx]",
            "The embedding of the padding token is random instead of 0.",
            "bert weights",
        ),
        (
            "weights-spread",
            "base_bert.py",
            "nn.init.normal_(module.weight, std=self.config.initializer_range, generator=generator)",
            "nn.init.normal_(module.weight, std=self.config.initializer_range**0.5, generator=generator)",
            "initializer_range is used as a variance instead of a standard deviation.",
            "bert weights",
        ),
        # --- weights.py ---
        (
            "weights-finite",
            "weights.py",
            "if not torch.isfinite(tensor).all():",
            "if not torch.isfinite(tensor).any():",
            "A weight file with some NaN is accepted.",
            "weights",
        ),
        (
            "weights-incomplete",
            "weights.py",
            'complete = not missing_file(WEIGHTS_FOLDER / "bert-base-uncased")',
            'complete = (WEIGHTS_FOLDER / "bert-base-uncased").is_dir()',
            "`--weights auto` takes bert-base even where its download is incomplete.",
            "weights",
        ),
        # --- optimizer.py ---
        (
            "optimizer-eps-inside",
            "optimizer.py",
            'p.addcdiv_(m, square_root(v).add_(group["eps"]), value=-step_size)',
            'p.addcdiv_(m, square_root(v + group["eps"]), value=-step_size)',
            "AdamW adds eps inside the square root.",
            "optimizer",
        ),
        (
            "optimizer-decay-first",
            "optimizer.py",
            'square_root(v).add_(group["eps"]), value=-step_size)',
            'square_root(v).add_(group["eps"]), value=-step_size / (1 - lr * group["weight_decay"]))',
            "AdamW decays the weights before the step instead of after it.",
            "optimizer",
        ),
        (
            "optimizer-no-correction",
            "optimizer.py",
            "step_size *= math.sqrt(1 - beta2**t) / (1 - beta1**t)",
            "step_size *= 1.0",
            "AdamW does not correct the bias of its running means.",
            "optimizer",
        ),
        (
            "optimizer-half-correction",
            "optimizer.py",
            "math.sqrt(1 - beta2**t) / (1 - beta1**t)",
            "(1 - beta2**t) / (1 - beta1**t)",
            "The bias correction of v lacks the square root.",
            "optimizer",
        ),
        (
            "optimizer-beta1",
            "optimizer.py",
            "m.lerp_(g, 1 - beta1)  #",
            "m.lerp_(g, beta1)  #",
            "The running mean of the gradient gives the new gradient the weight beta1.",
            "optimizer",
        ),
        (
            "optimizer-rmsprop-square",
            "optimizer.py",
            "v.mul_(gamma).addcmul_(g, g, value=1 - gamma)",
            "v.mul_(gamma).add_(g.abs(), alpha=1 - gamma)",
            "RMSprop averages |g| instead of the squares.",
            "optimizer",
        ),
        (
            "optimizer-clip-up",
            "optimizer.py",
            "factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)",
            "factor = max_norm / (norm + 1e-6)",
            "Clipping also scales small gradients up.",
            "optimizer",
        ),
        (
            "optimizer-clip-norm",
            "optimizer.py",
            "norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))",
            "norm = torch.stack(torch._foreach_norm(gradients)).sum()",
            "The joint norm is the sum of the tensors' norms.",
            "optimizer",
        ),
        (
            "optimizer-decay-biases",
            "optimizer.py",
            '"weight_decay": weight_decay if is_matrix else 0.0',
            '"weight_decay": weight_decay',
            "Biases and LayerNorm weights decay too.",
            "optimizer",
        ),
        (
            "optimizer-linear",
            "optimizer.py",
            "return (1 - progress) / (1 - warmup)",
            "return 1 - progress",
            "The linear schedule jumps down at the end of warm-up.",
            "optimizer",
        ),
        # --- tasks.py ---
        (
            "tasks-kl-one-logit",
            "tasks.py",
            "return ((side * p).sigmoid() - (side * q).sigmoid()) * side * (p - q)",
            "return softmax_divergence(p_logits, q_logits)",
            "The KL divergence of the paraphrase task is a softmax over one logit, which is always 0.",
            "tasks",
        ),
        (
            "tasks-kl-one-sided",
            "tasks.py",
            "((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)",
            "(log_p.exp() * (log_p - log_q)).sum(-1)",
            "The KL divergence of classes is not symmetrised.",
            "tasks",
        ),
        (
            "tasks-kl-mean",
            "tasks.py",
            "(log_p - log_q)).sum(-1)",
            "(log_p - log_q)).mean(-1)",
            "The KL divergence is a mean over the classes instead of a sum.",
            "tasks",
        ),
        (
            "tasks-cosine-scale",
            "tasks.py",
            "(cosine - labels.to(cosine.dtype) / high) ** 2",
            "(cosine - labels.to(cosine.dtype)) ** 2",
            "The cosine is compared with labels from 0 to 5 instead of 0 to 1.",
            "tasks",
        ),
        (
            "tasks-cosine-hinge",
            "tasks.py",
            "cosine.clamp(min=0))",
            "cosine)",
            "The cosine embedding loss pushes unlike pairs below the margin too.",
            "tasks",
        ),
        (
            "tasks-decide",
            "tasks.py",
            "return (p > 0.5).to(p.dtype)",
            "return (p >= 0.5).to(p.dtype)",
            "A probability of exactly 1/2 counts as yes.",
            "tasks",
        ),
        (
            "tasks-value-range",
            "tasks.py",
            "(widen(logits).squeeze(-1) * scale).clamp(low, high)",
            "(widen(logits).squeeze(-1) * scale)",
            "Similarity predictions may leave the range from 0 to 5.",
            "tasks",
        ),
        (
            "tasks-widen",
            "tasks.py",
            "return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x",
            "return x",
            "Losses are computed in half precision.",
            "tasks",
        ),
        (
            "tasks-start",
            "tasks.py",
            "start = (low + high) / 2",
            "start = 0.0",
            "The similarity head starts at 0 instead of the middle of the range.",
            "methods",
        ),
        (
            "tasks-header",
            "tasks.py",
            "Predicted_Similiary",
            "Predicted_Similarity",
            "The header of the similarity file corrects the course's spelling, which the course's checker expects.",
            "tasks evaluation",
        ),
        # --- datasets.py ---
        (
            "datasets-room",
            "datasets.py",
            "return self.max_length - SPECIALS[self.task.encoding]",
            "return self.max_length - 2",
            "A packed pair leaves room for two special tokens instead of three or four.",
            "datasets",
        ),
        (
            "datasets-siamese-types",
            "datasets.py",
            "return [self.tokenizer.pack(text, limit=limit) for text in texts]",
            "return [(ids, [1] * len(ids)) for ids, _ in (self.tokenizer.pack(text, limit=limit) for text in texts)]",
            "The texts of a siamese pair have segment ids 1.",
            "datasets",
        ),
        (
            "datasets-whole-labels",
            "datasets.py",
            "self.labels[rows].astype(np.float32)",
            "self.labels[rows].astype(np.int64).astype(np.float32)",
            "Similarity labels lose their decimals.",
            "datasets",
        ),
        (
            "datasets-empty-text",
            "datasets.py",
            "np.flatnonzero(~np.isnan(self.labels) & ~empty)",
            "np.flatnonzero(~np.isnan(self.labels))",
            "Rows with an empty text are used for training and scoring.",
            "datasets",
        ),
        (
            "datasets-unsorted",
            "datasets.py",
            'chunk = chunk[np.argsort(lengths[chunk], kind="stable")]',
            "chunk = chunk[:]",
            "Batches are not made of rows of similar length.",
            "datasets",
        ),
        (
            "datasets-short-to-long",
            "datasets.py",
            "return [batches[i] for i in rng.permutation(len(batches))]",
            "return batches",
            "The batches of a pool come from short to long instead of in random order.",
            "datasets",
        ),
        (
            "datasets-drop-last",
            "datasets.py",
            "for i in range(0, len(chunk), batch_size)]",
            "for i in range(0, len(chunk) - batch_size + 1, batch_size)]",
            "The last short batch of a pool is dropped.",
            "datasets",
        ),
        (
            "datasets-label-range",
            "datasets.py",
            "(low <= label <= high and",
            "(low <= label < high and",
            "The highest label is refused.",
            "datasets",
        ),
        (
            "datasets-byte-order-mark",
            "datasets.py",
            'yield raw.decode("utf-8-sig" if line == 1 else "utf-8")',
            'yield raw.decode("utf-8")',
            "A byte order mark becomes part of the first column's name.",
            "datasets",
        ),
        (
            "datasets-share-width",
            "datasets.py",
            "max(len(ids) for ids, _ in column)",
            "max(len(ids) for ids, _ in column[positions])",
            "A process pads its share to its own longest row instead of that of the whole batch.",
            "parallel:share parallel",
        ),
        # --- tasks.py ---
        (
            "samplers-equal",
            "tasks.py",
            "min(sizes[name], sizes.get(other, min(sizes.values())))",
            "sizes.get(other, min(sizes.values()))",
            "The equal split takes more paraphrase rows than there are.",
            "samplers",
        ),
        (
            "samplers-parts",
            "tasks.py",
            "math.ceil(sizes[name] / parts)",
            "sizes[name] // parts",
            "A seventeenth of the similarity rows is rounded down, so the last rows are late.",
            "samplers",
        ),
        # --- samplers.py ---
        (
            "samplers-same-order",
            "samplers.py",
            'make_rng(seed, "rows", name, k)',
            'make_rng(seed, "rows", name)',
            "Every pass over the data has the same order.",
            "samplers",
        ),
        (
            "samplers-rounding",
            "samplers.py",
            "math.floor(epochs * count + 1e-6)",
            "math.floor(epochs * count)",
            "Rounding of fractional epochs repeats or skips a row.",
            "samplers",
        ),
        (
            "samplers-annealed",
            "samplers.py",
            "1.0 - 0.8 * annealing",
            "1.0 - progress",
            "The annealed exponent ends at 0 instead of 0.2.",
            "samplers",
        ),
        (
            "samplers-cycle",
            "multitask_classifier.py",
            "groups[name][k % n]",
            "groups[name][min(k, n - 1)]",
            "A task that is drawn often repeats its last batch instead of starting again.",
            "methods:batches_come_again",
        ),
        (
            "samplers-shortest",
            "samplers.py",
            "in counts] for k in range(max(counts.values()))]",
            "in counts] for k in range(min(counts.values()))]",
            "With all tasks in a step the epoch ends with the shortest task.",
            "samplers",
        ),
        # --- multitask_classifier.py ---
        (
            "loop-nominal-batch",
            "multitask_classifier.py",
            "examples = sum(len(rows) for rows in batches)",
            "examples = parts.settings.batch_size * parallel.world_size() * len(batches)",
            "The loss is divided by the nominal batch size instead of the number of examples.",
            "program:accumulated",
        ),
        (
            "loop-no-clip",
            "multitask_classifier.py",
            "if parts.settings.clip:",
            "if not parts.settings.clip:",
            "The gradients are not clipped.",
            "program:clip",
        ),
        (
            "loop-zero-grad",
            "multitask_classifier.py",
            "optimizer.zero_grad(set_to_none=True)",
            "pass",
            "The gradients of earlier steps stay and add up.",
            "program:killed_run",
        ),
        (
            "loop-rate-product",
            "multitask_classifier.py",
            'group["lr"] = group["initial_lr"] * multiplier',
            'group["lr"] = group["lr"] * multiplier',
            "The schedule multiplies the last learning rate instead of the initial one.",
            "methods",
        ),
        # --- runs.py ---
        (
            "loop-best-untrained",
            "runs.py",
            "is_best = scores.norm, phase.keep and scores.norm > history.best",
            "is_best = scores.norm, scores.norm > history.best",
            "A model of SLF's first stage may become the best model.",
            "program:first_stage",
        ),
        # --- multitask_classifier.py ---
        (
            "loop-trainable",
            "multitask_classifier.py",
            "parameter.requires_grad_(name in allowed and id(parameter) in chosen)",
            "parameter.requires_grad_(id(parameter) in chosen)",
            "BERT trains although --option pretrain or an adapter freezes it.",
            "methods",
        ),
        (
            "loop-new-optimizer",
            "multitask_classifier.py",
            "if list(parameters) != trained:",
            "if True:",
            "Every epoch starts with a new optimiser, without its running means.",
            "program:killed_run",
        ),
        # --- runs.py ---
        (
            "loop-resume-optimizer",
            "runs.py",
            'optimizer.load_state_dict(self.state["optimizer"])',
            "pass",
            "A resumed run starts with an empty optimiser.",
            "program:killed_run",
        ),
        (
            "loop-resume-rng",
            "runs.py",
            "set_state(rng)",
            "pass",
            "A resumed run draws other dropout masks.",
            "program:killed_run",
        ),
        (
            "loop-resume-terms",
            "runs.py",
            'parts.terms[key].load_state_dict(state["terms"][key])',
            "pass",
            "A resumed run has a new teacher and starts its noise again.",
            "methods:everything",
        ),
        # --- multitask_classifier.py ---
        (
            "loop-exit-cycle",
            "multitask_classifier.py",
            "cycle[(epoch * n + k) % len(cycle)]",
            "cycle[0]",
            "Alternating exits never come to the second entry of the cycle.",
            "methods:alternating_exits",
        ),
        (
            "loop-task-weights",
            "multitask_classifier.py",
            "loss = parts.settings.task_weights[name] * sum(values.values())",
            "loss = sum(values.values())",
            "--task_weights has no effect.",
            "program:task_weights",
        ),
        (
            "model-exit-weights",
            "multitask_classifier.py",
            "sum(w * batch.task.objective.loss(",
            "sum(batch.task.objective.loss(",
            "The task's loss ignores the weights of the exits.",
            "methods",
        ),
        (
            "model-exit-pooler",
            "multitask_classifier.py",
            "pool = self.bert.pool if i == self.depth else self.exits[i - 1].pool",
            "pool = self.bert.pool",
            "All exits use BERT's pooler instead of their own.",
            "early_exit slf methods",
        ),
        (
            "model-mean-pool",
            "multitask_classifier.py",
            "return (h * weights).sum(1) / weights.sum(1)",
            "return h.mean(1)",
            "Mean pooling averages over padding too.",
            "early_exit",
        ),
        (
            "model-uvd",
            "multitask_classifier.py",
            "[u, v, (u - v).abs()]",
            "[u, v, u - v]",
            "The third siamese feature is u - v instead of |u - v|.",
            "methods",
        ),
        (
            "model-head-dropout",
            "multitask_classifier.py",
            "self.dropout(state) if task.objective.head_dropout else state",
            "state",
            "There is no dropout before the heads.",
            "program:hidden_dropout",
        ),
        (
            "model-pack-pairs",
            "multitask_classifier.py",
            "pack(a[1:-1], b[1:-1], a[0], a[-1], model",
            "pack(a[1:-1], b[:-1], a[0], a[-1], model",
            "A packed pair has a second [CLS] before the second text.",
            "program:methods_of_the_course",
        ),
        # --- evaluation.py ---
        (
            "evaluation-order",
            "evaluation.py",
            "back = np.argsort(order)",
            "back = order",
            "Predictions return in the wrong order: a permutation instead of its inverse.",
            "evaluation",
        ),
        (
            "evaluation-training-mode",
            "evaluation.py",
            "model.eval()\n    # longest",
            "# longest",
            "Evaluation keeps dropout on.",
            "evaluation",
        ),
        # --- tasks.py ---
        (
            "evaluation-norm",
            "tasks.py",
            "return (value - self.low) / (self.high - self.low)",
            "return value",
            "norm takes the correlation as it is instead of (r + 1) / 2.",
            "evaluation",
        ),
        # --- evaluation.py ---
        (
            "evaluation-confusion",
            "evaluation.py",
            "confusion_matrix(labels, values, labels",
            "confusion_matrix(values, labels, labels",
            "Rows and columns of the confusion matrix are swapped.",
            "evaluation",
        ),
        (
            "evaluation-f1",
            "evaluation.py",
            'average="macro"',
            'average="micro"',
            "F1 is the precision: the row sums are missing.",
            "evaluation",
        ),
        (
            "evaluation-shares",
            "evaluation.py",
            "shares = confusion.sum(0) / confusion.sum()",
            "shares = confusion.sum(1) / confusion.sum()",
            "The shares of the predicted classes are those of the gold classes.",
            "evaluation",
        ),
        (
            "evaluation-usable",
            "evaluation.py",
            "predict(model, data, data.usable, **options)",
            "predict(model, data, None, **options)",
            "Rows without a label are scored too.",
            "evaluation",
        ),
        (
            "evaluation-threshold-ties",
            "evaluation.py",
            "np.where(distinct, right, -1).argmax()",
            "right.argmax()",
            "A fitted threshold may lie between two equal scores.",
            "evaluation",
        ),
        (
            "evaluation-probability",
            "evaluation.py",
            "predictions.probabilities[i, int(value)]",
            "predictions.probabilities[i, 1]",
            "The readable files give the probability of class 1 instead of the predicted class.",
            "evaluation predict",
        ),
        # --- early_exit.py ---
        (
            "exit-leave-at",
            "early_exit.py",
            ">= self.thresholds[task.name]",
            "> self.thresholds[task.name]",
            "A certainty equal to the threshold does not leave.",
            "early_exit",
        ),
        (
            "exit-simulated-leave-at",
            "early_exit.py",
            "sure = certainty >= np",
            "sure = certainty > np",
            "The threshold search leaves only above the threshold.",
            "early_exit",
        ),
        (
            "exit-layer-count",
            "early_exit.py",
            "return sure.argmax(1) + 1",
            "return sure.argmax(1)",
            "The executed layers are counted from 0.",
            "early_exit",
        ),
        (
            "exit-lte-detach",
            "early_exit.py",
            "decode(logits.detach(), decision_threshold)",
            "decode(logits, decision_threshold)",
            "The target of LTE is not detached, so the heads learn to please it.",
            "early_exit",
        ),
        (
            "exit-lte-scale",
            "early_exit.py",
            "(values - labels).abs() / ((high - low) / 2)",
            "(values - labels).abs() / (high - low)",
            "The regression error of LTE is measured in whole label ranges instead of halves.",
            "early_exit",
        ),
        (
            "exit-weighted",
            "early_exit.py",
            "{i: 2 * i / (depth + 1) for i in range(1, depth + 1)}",
            "{i: 2 * (i - 1) / (depth + 1) for i in range(1, depth + 1)}",
            "The weights of the exits are off by one layer.",
            "early_exit",
        ),
        (
            "exit-mask-move",
            "early_exit.py",
            "mask[front] = mask[part][stays]",
            "mask[front] = mask[part][: len(stays)]",
            "Rows that stay get the masks of rows that left.",
            "early_exit",
        ),
        (
            "exit-price-sign",
            "early_exit.py",
            "np.argmax(scores - price * layers)",
            "np.argmax(scores + price * layers)",
            "The threshold search rewards layers instead of charging for them.",
            "early_exit",
        ),
        # --- slf.py ---
        (
            "slf-keep",
            "slf.py",
            "keep=False,  # the layers above are as they were pretrained",
            "keep=True,",
            "A model of SLF's first stage may become the best model.",
            "slf",
        ),
        (
            "slf-alternate-ties",
            "slf.py",
            "if not score > previous:",
            "if not score >= previous:",
            "Smart Alternating keeps the stage when the score only stays the same.",
            "slf",
        ),
        (
            "slf-two-stage-exits",
            "slf.py",
            "for i, weight in joint.items() if i != depth}",
            "for i, weight in joint.items()}",
            "The second stage of two-stage training includes the last exit.",
            "slf",
        ),
        (
            "slf-two-stage-keep",
            "slf.py",
            "keep=is_last)",
            "keep=True)",
            "Two-stage training may keep a model with untrained exits.",
            "slf",
        ),
        # --- multitask_classifier.py ---
        (
            "slf-exit-index",
            "multitask_classifier.py",
            "if i == self.depth else [self.exits[i - 1]]",
            "if i == self.depth else [self.exits[i - 2]]",
            "SLF trains the exit of the next layer.",
            "slf",
        ),
        # --- slf.py ---
        (
            "slf-budget",
            "slf.py",
            "layer_epochs,\n            ({i: 1.0},)",
            "layer_epochs / depth,\n            ({i: 1.0},)",
            "A layer's budget counts for all layers instead of for each.",
            "slf",
        ),
        # --- smart.py ---
        (
            "smart-descent",
            "smart.py",
            "(x + step * g).clamp(-radius, radius)",
            "(x - step * g).clamp(-radius, radius)",
            "SMART moves down the gradient instead of up.",
            "smart",
        ),
        (
            "smart-clip",
            "smart.py",
            "(x + step * g).clamp(-radius, radius)",
            "(x + step * g)",
            "SMART's perturbation may leave the box.",
            "smart",
        ),
        (
            "smart-noise-padding",
            "smart.py",
            "x[positions].to(h.device) * mask.unsqueeze(-1)",
            "x[positions].to(h.device)",
            "Noise is added to padding too.",
            "smart",
        ),
        (
            "smart-dropout-masks",
            "smart.py",
            "set_state(rng)",
            "pass",
            "The second pass has other dropout masks than the first.",
            "smart",
        ),
        (
            "smart-rms",
            "smart.py",
            "(tokens * hidden[0].shape[-1])).sqrt()[:, None, None]",
            "(tokens * hidden[0].shape[-1]))[:, None, None]",
            "The size of the embeddings is the mean square without the root.",
            "smart",
        ),
        (
            "smart-exit-weights",
            "smart.py",
            "sum(w * task.objective.divergence(logits[i], other[i])",
            "sum(task.objective.divergence(logits[i], other[i])",
            "SMART ignores the weights of the exits.",
            "smart",
        ),
        (
            "smart-gaussian-sum",
            "smart.py",
            "widen(noisy[i])).square().mean(-1)",
            "widen(noisy[i])).square().sum(-1)",
            "Gaussian SMART sums over the outputs instead of taking their mean.",
            "smart",
        ),
        (
            "bregman-teacher",
            "smart.py",
            "for name in self.teacher], 1 - decay)",
            "for name in self.teacher], 1.0)",
            "Bregman's teacher is the latest model instead of a slow average.",
            "smart",
        ),
        (
            "bregman-decay",
            "smart.py",
            "for name in self.teacher], 1 - decay)",
            "for name in self.teacher], decay)",
            "Bregman's teacher gives the newest model the weight beta.",
            "smart",
        ),
        (
            "bregman-resume",
            "smart.py",
            'parameter.copy_(state["teacher"][name])',
            "pass",
            "A resumed run has a new teacher.",
            "smart",
        ),
        (
            "lnsr-padding",
            "smart.py",
            "((x - y).square().mean(-1) * mask).sum(-1)",
            "(x - y).square().mean(-1).sum(-1)",
            "Layer-wise noise stability counts padding.",
            "smart",
        ),
        (
            "lnsr-layers",
            "smart.py",
            "change / (stop * sum(",
            "change / (sum(",
            "Layer-wise noise stability is a sum over the layers instead of a mean.",
            "smart",
        ),
        # --- adapters.py ---
        (
            "adapters-lhuc",
            "adapters.py",
            "output * (2 * torch.sigmoid(self.r))",
            "output * torch.sigmoid(self.r)",
            "LHUC lacks the factor 2 and starts by halving every unit.",
            "adapters",
        ),
        (
            "adapters-residual",
            "adapters.py",
            "return output + self.decoder(middle)",
            "return self.decoder(middle)",
            "The bottleneck lacks its residual.",
            "adapters",
        ),
        (
            "adapters-pal-input",
            "adapters.py",
            "context.shared.encoder(context.h)",
            "context.shared.encoder(output)",
            "PAL reads the feed-forward output instead of the layer's input.",
            "adapters",
        ),
        (
            "adapters-pal-sqrt",
            "adapters.py",
            "scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])",
            "scores = query @ key.transpose(-1, -2)",
            "PAL's attention scores are not divided by sqrt(k).",
            "adapters",
        ),
        (
            "adapters-houlsby-sites",
            "adapters.py",
            '"houlsby": Kind(("attention", "feed_forward")',
            '"houlsby": Kind(("attention", "output")',
            "Houlsby's second adapter sits after the LayerNorm instead of before the residual.",
            "adapters",
        ),
        (
            "adapters-houlsby-norms",
            "adapters.py",
            '"layer_norm" in name and any(KINDS[kind].layer_norms for kind in kinds)',
            '"layer_norm" in name',
            "BERT's LayerNorms train with every adapter instead of Houlsby's only.",
            "adapters",
        ),
        # --- gradients.py ---
        (
            "gradients-wrong-vector",
            "gradients.py",
            "row[j] += self.factor(",
            "row[i] += self.factor(",
            "PCGrad subtracts the projection along g_i instead of g_j.",
            "gradients",
        ),
        (
            "gradients-wrong-norm",
            "gradients.py",
            "return -dot / other_norm**2 if dot < 0 else 0.0",
            "return -dot / norm**2 if dot < 0 else 0.0",
            "PCGrad divides by |g_i|^2 instead of |g_j|^2.",
            "gradients",
        ),
        (
            "gradients-always",
            "gradients.py",
            "return -dot / other_norm**2 if dot < 0 else 0.0",
            "return -dot / other_norm**2",
            "PCGrad projects gradients that do not conflict too.",
            "gradients",
        ),
        (
            "gradients-fixed-order",
            "gradients.py",
            "for k in torch.randperm(len(others), generator=self.generator).tolist():",
            "for k in range(len(others)):",
            "PCGrad visits the other tasks in a fixed order.",
            "gradients",
        ),
        (
            "gradients-own-head",
            "gradients.py",
            "chosen = [weights[k] for k in present] if len(present) > 1 else [1.0]",
            "chosen = [weights[k] for k in present]",
            "A task's own head is scaled by the surgery on the shared part.",
            "gradients",
        ),
        (
            "gradients-gradvac-sine",
            "gradients.py",
            "(target * sine - cosine * target_sine)",
            "(target * target_sine - cosine * sine)",
            "GradVac swaps the two sines.",
            "gradients",
        ),
        (
            "gradients-gradvac-resume",
            "gradients.py",
            'self.targets = dict(state["targets"])',
            "pass",
            "A resumed run with GradVac starts its targets at 0.",
            "gradients",
        ),
        # --- predict.py ---
        (
            "predict-full-depth",
            "predict.py",
            "infer=run.infer,",
            "",
            "predict.py ignores the exits of a run that leaves early.",
            "predict",
        ),
        (
            "predict-spaces",
            "predict.py",
            'line.split("\\t")',
            "line.split()",
            "A pair on standard input is split at spaces instead of the tab.",
            "predict",
        ),
        (
            "predict-blank-line",
            "predict.py",
            'texts = [""] * len(task.columns)',
            "continue",
            "A blank line gets no answer, so later answers belong to the wrong lines.",
            "predict",
        ),
        (
            "predict-numbering",
            "predict.py",
            "for number, texts in enumerate(rows, start=1):",
            "for number, texts in enumerate(rows):",
            "The answers are numbered from 0.",
            "predict",
        ),
        # --- runs.py ---
        (
            "runs-same-flags",
            "runs.py",
            "for name in typed - FREE_FLAGS:",
            "for name in typed & FREE_FLAGS:",
            "A run is resumed with other flags, and unimportant flags are refused.",
            "program:not_continued_as",
        ),
        (
            "runs-identity",
            "runs.py",
            ' or state.get("id") != self.id:',
            ":",
            "A run continues from the saved state of another run.",
            "program:state_of_another",
        ),
        (
            "runs-lock",
            "runs.py",
            "fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
            "pass",
            "Two processes train in one run directory.",
            "inputs:second_process",
        ),
        (
            "runs-overwrite-user-files",
            "runs.py",
            "for path in [*(self.path / name for name in FILES), *self.half_written()]:",
            "for path in [path for path in self.path.iterdir() if path.is_file()]:",
            "--overwrite removes a user's files.",
            "inputs:overwrite_removes",
        ),
        (
            "runs-owner",
            "runs.py",
            'if not self.exists() or read_json(self.path / "config.json").get("id") != self.id:',
            "if False:",
            "A run goes on writing into the directory of the run that took its place.",
            "inputs:directory_was_taken",
        ),
        # --- flags.py ---
        (
            "flags-per-task",
            "methods.py",
            'sorted(entries or (), key=lambda entry: "=" in entry)',
            "(entries or ())",
            "A value for all tasks overrides a task's own value if it comes later.",
            "methods:names_a_task_wins",
        ),
        # --- methods.py ---
        (
            "flags-share",
            "methods.py",
            "if value >= 1:",
            "if value > 1:",
            "A dropout of 1 is accepted.",
            "program:bad_flags",
        ),
    ]
]


def git(*arguments):
    """The output of a git command in the repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def copy_tree(folder):
    """Copy the repository's files to a folder: tracked and new ones, not what git ignores; weights/ is linked."""
    for name in git("ls-files", "-co", "--exclude-standard", "-z").split("\0"):
        source, target = ROOT / name, folder / name
        if name and source.is_file() and not source.is_symlink() and not name.startswith("results/"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    if (ROOT / "weights").is_dir():
        (folder / "weights").symlink_to((ROOT / "weights").resolve())


def mutated(mutant, folder):
    """The text of the mutant's file with the mistake in it. It must be Python, and `old` must occur exactly once."""
    path = folder / mutant.file
    text = path.read_text() if path.is_file() else ""
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.id}: found {text.count(mutant.old)} times in {mutant.file}, not once: {mutant.old}")
    text = text.replace(mutant.old, mutant.new)
    compile(text, mutant.file, "exec")
    return text


def first_failure(folder, test):
    """Run the tests of one entry in a copy of the repository. Returns (id, reason) of the first that fails, or None.

    A mutant with which the file cannot even be imported is a bad mutant: it DID NOT RUN.
    """
    test, _, keyword = test.partition(":")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--basetemp", folder / "tmp"]
    process = subprocess.Popen(
        [*command, "-k", keyword, f"tests/test_{test}.py"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"},  # pytest cuts a reason at the terminal's width
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        # the tests start processes of their own, which are in the same session
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"TIMEOUT of {SECONDS} s in tests/test_{test}.py", ""
    if process.returncode in (0, 5):  # all passed, or no test has the keyword in its name
        return None
    # a mistake that the program itself refuses, as the task table does, shows when the tests are collected
    failed = re.search(r"^(?:FAILED|ERROR) (tests/\S+::.*?)(?: - (.*))?$", output, re.MULTILINE)
    failed = failed or re.search(r"^ERROR (tests/\S+) - (errors.InputError.*)$", output, re.MULTILINE)
    if not failed:
        return f"{DID_NOT_RUN} tests/test_{test}.py", output[-2000:]
    return failed[1], failed[2]


def run_mutant(mutant):
    """Run the tests on one mutant. Returns the id of the first failing test, or SURVIVED, and prints it."""
    listed = mutant.tests.split()
    with tempfile.TemporaryDirectory(prefix=f"mutant-{mutant.id}-") as name:
        folder = Path(name)
        copy_tree(folder)
        (folder / mutant.file).write_text(mutated(mutant, folder))
        for test in [*listed, *(test for test in TESTS if test not in listed)]:
            if failure := first_failure(folder, test):
                unlisted = "" if test in listed else "   (not in a listed file)"
                print(f"{mutant.id}: {failure[0]}{unlisted}\n    {failure[1]}", flush=True)
                return failure[0]
    print(f"{mutant.id}: {SURVIVED}", flush=True)
    return SURVIVED


def check_unmutated(tests):
    """Stop where the tests fail without any mistake."""
    with tempfile.TemporaryDirectory(prefix="mutant-none-") as name:
        copy_tree(Path(name))
        for test in tests:
            if failure := first_failure(Path(name), test):
                raise SystemExit(f"fails without any mutant: {failure[0]}: {failure[1]}")


def results_before():
    """What became of each mutant before the house was rebuilt: {id: "killed" or "survived"}."""
    rows = re.findall(r"^\| (\S+) \|.*\| (.*) \|$", BEFORE.read_text(), re.MULTILINE)
    return {name: "survived" if SURVIVED in result else "killed" for name, result in rows}


def table(mutants, results):
    """The lines of results/mutants.md."""
    changed = git("status", "--porcelain", "-uno", "--", "*.py", ":!tests/mutants.py")
    commit = git("rev-parse", "--short=12", "HEAD").strip() + "+" * bool(changed)
    survived, broken = results.count(SURVIVED), sum(result.startswith(DID_NOT_RUN) for result in results)
    before = results_before()
    revived = [
        mutant.id
        for mutant, result in zip(mutants, results, strict=True)
        if result == SURVIVED and before.get(mutant.id) == "killed"
    ]
    lines = [
        "# Mutants: mistakes that the tests have to notice",
        "",
        f"Commit {commit}: {len(mutants)} mutants, {len(mutants) - survived - broken} killed, {survived} survived, "
        f"{broken} did not run.",
        f"Killed before the house was rebuilt, and surviving now: {', '.join(revived) or 'none'}.",
        "Each row is one mistake, made alone. `killed by` is the first test that fails; a mutant that SURVIVED passes",
        f"all tests of the training code; `before` is from [{BEFORE.name}]({BEFORE.name}).",
        "Written by `python tests/mutants.py`.",
        "",
        "| id | file | mistake | killed by | before |",
        "|---|---|---|---|---|",
    ]
    for mutant, result in zip(mutants, results, strict=True):
        row = (mutant.id, mutant.file, mutant.mistake, result, before.get(mutant.id, "new"))
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description="Run the tests on programs with one mistake each.")
    parser.add_argument("ids", nargs="*", metavar="ID", help="mutants to run; default all, which writes the table")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--check", action="store_true", help="only check that every mutant fits its file")
    options = parser.parse_args()
    by_id = {mutant.id: mutant for mutant in MUTANTS}
    if len(by_id) < len(MUTANTS) or not by_id.keys() >= set(options.ids):
        parser.error("an id comes twice in the list" if len(by_id) < len(MUTANTS) else "no mutant has such an id")
    mutants = [by_id[name] for name in options.ids] or MUTANTS
    for mutant in mutants:
        mutated(mutant, ROOT)
    if options.check:
        return
    check_unmutated(sorted({entry.partition(":")[0] for mutant in mutants for entry in mutant.tests.split()}))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run_mutant, mutants))
    lines = table(mutants, results)
    if options.ids:
        print("\n".join(lines[-len(mutants) :]))
    else:
        TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
