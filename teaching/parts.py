"""The table of the course: for each part its points, its time, what a student writes, and how it is graded.

Everything else in this folder is made from this table and from the syntax tree of the modules at the top level:
starter.py removes the blanks, grade.py compares a student's functions with the reference, the handout prints a page a
part. To add a part, write a row, checks/PART.py with one function per check and pages/PART.md, and name it in
handout.WEEKS. To remove one, take it out of WEEKS and of scores.RUNS too.

A check earns all of its points or none. The points of a part are spread so that a mistake in any one of its functions
costs at least a quarter of the part. tests/test_teaching.py makes sure of it with a list of typical mistakes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check of a part: the function `name` in checks/PART.py runs it."""

    name: str
    points: int
    title: str  # what is compared
    hint: str  # the function and the equation to look at where the check fails


@dataclass(frozen=True)
class Part:
    """One part of the course.

    Functions are named by module: "bert.BertLayer.forward" is the method forward of the class BertLayer in bert.py.
    """

    title: str
    minutes: int  # time for a student who has read the module's docstring
    blanks: tuple[str, ...]  # the functions whose bodies a student writes
    checks: tuple[Check, ...]
    forbidden: tuple[str, ...] = ()  # names that these functions may not use: a library's ready answer
    equivalents: tuple[str, ...] = ()  # other functions of the project that show the answer: left out with the blanks

    @property
    def points(self):
        """The points of all checks."""
        return sum(check.points for check in self.checks)

    @property
    def modules(self):
        """The modules that a student edits, in the order of the blanks."""
        return tuple(dict.fromkeys(name.split(".")[0] for name in self.blanks))


# what stands behind torch's attention, and can be called too
TORCHS_ATTENTION = (
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)
PARTS = {
    "tokenizer": Part(
        "WordPiece and pairs of texts",
        45,
        blanks=("tokenizer.split_word_pieces", "tokenizer.truncate_pair"),
        checks=(
            Check(
                "longest_match",
                2,
                "words of known pieces",
                "split_word_pieces: take the longest piece that fits, from left to right; every piece but the first "
                'starts with "##" (Wu et al. 2016, section 4.1)',
            ),
            Check(
                "unknown_words",
                2,
                "words without pieces, and very long words",
                "split_word_pieces: if no piece fits at some place, the entire word becomes [UNK]; so does a word of "
                "more than MAX_WORD_CHARACTERS characters",
            ),
            Check(
                "sentences",
                1,
                "the ids of whole sentences",
                "split_word_pieces: BertTokenizer.tokenize calls it once a word and looks the pieces up in the "
                "vocabulary",
            ),
            Check(
                "truncation",
                3,
                "pairs that are cut",
                "truncate_pair: drop one token at a time from the end of the longer text until len(a) + len(b) <= "
                "room; "
                "if both are cut and room is odd, the longer one keeps the odd token, or b if both had the same "
                "length",
            ),
        ),
    ),
    "attention": Part(
        "Multi-head attention",
        60,
        blanks=(
            "bert.attend_plain",
            "bert.BertSelfAttention.split_heads",
            "bert.BertSelfAttention.merge_heads",
        ),
        forbidden=(
            "attend_sdpa",
            "scaled_dot_product_attention",
            "multi_head_attention_forward",
            "MultiheadAttention",
            "ProjectedAttention",
            "flex_attention",
            *TORCHS_ATTENTION,
        ),
        equivalents=(
            "bert.attend_sdpa",
            "adapters.ProjectedAttention.split_heads",
            "adapters.ProjectedAttention.attend",
        ),
        checks=(
            Check(
                "heads",
                3,
                "cutting into heads and joining them",
                "split_heads: [b,s,d] -> [b,s,h,k] -> [b,h,s,k]; merge_heads goes the same way back",
            ),
            Check(
                "scores",
                3,
                "attention without padding",
                "attend_plain: softmax(Q K^T / sqrt(k)) V, with the softmax over the keys (Vaswani et al. 2017, eq. 1)",
            ),
            Check(
                "padding",
                3,
                "attention with padding",
                "attend_plain: softmax(Q K^T / sqrt(k) + mask) V: add extended_mask to the scores, before the softmax",
            ),
            Check(
                "dropout",
                3,
                "dropout and half precision",
                "attend_plain: dropout(softmax(...)) V: drop the weights, after the softmax; cast the mask to the "
                "scores' dtype",
            ),
        ),
    ),
    "layer": Part(
        "One Transformer layer",
        30,
        blanks=("bert.BertLayer.forward",),
        equivalents=("bert.add_norm",),
        forbidden=("TransformerEncoderLayer", "TransformerEncoder", "MultiheadAttention", *TORCHS_ATTENTION),
        checks=(
            Check(
                "residuals",
                3,
                "the next hidden state",
                "BertLayer.forward: x = LN(h + MH(h)), then LN(x + FFN(x)): both sums are residuals, and each "
                "LayerNorm "
                "comes after its sum (Devlin et al. 2019, section 3)",
            ),
            Check(
                "masked",
                1,
                "the next hidden state with padding",
                "BertLayer.forward: pass extended_mask to the self-attention, MH(h)",
            ),
            Check(
                "dropout",
                2,
                "where dropout acts",
                "BertLayer.forward: attention_dropout(W_O ...) and out_dropout(W_2 ...): dropout acts on the output "
                "of "
                "each sub-layer, before the residual is added",
            ),
            Check(
                "adapters",
                2,
                "what the adapter slot sees and replaces",
                'BertLayer.forward: adapt("attention", MH(h)) and adapt("feed_forward", FFN(x)) after dropout, before '
                'the residuals; adapt("output", ...) after the last LayerNorm; the self-attention gets adapt too',
            ),
        ),
    ),
    "embeddings": Part(
        "Embeddings, mask and pooler",
        30,
        blanks=(
            "bert.BertModel.embed",
            "bert.BertModel.extend_mask",
            "bert.BertModel.pool",
            "early_exit.Exit.pool",
        ),
        checks=(
            Check(
                "lookup",
                2,
                "the embeddings of a batch",
                "BertModel.embed: h_0 = LN(word + position + segment), then dropout (Devlin et al. 2019, section 3)",
            ),
            Check(
                "limits",
                2,
                "texts without segment ids, and too long texts",
                "BertModel.embed: without token_type_ids all segment ids are 0; more tokens than "
                "max_position_embeddings raise an InputError",
            ),
            Check(
                "mask",
                2,
                "the mask for the attention scores",
                "BertModel.extend_mask: (1 - mask) * MASKED_SCORE, [b,s] -> [b,1,1,s], in the given dtype",
            ),
            Check(
                "pooler",
                2,
                "the sentence vectors of the model and of an exit",
                "BertModel.pool, Exit.pool: pooled = tanh(W_P h[first token] + b_P), each with its own W_P and b_P",
            ),
        ),
    ),
    "optimizer": Part(
        "Update rules, schedules and clipping",
        90,
        blanks=(
            "optimizer.AdamW.update",
            "optimizer.RMSprop.update",
            "optimizer.SGD.update",
            "optimizer.linear",
            "optimizer.cosine",
            "optimizer.clip_gradients",
        ),
        forbidden=("optim", "lr_scheduler", "clip_grad_norm", "clip_grad_norm_", "clip_grads_with_norm_"),
        checks=(
            Check(
                "adamw",
                3,
                "steps of AdamW",
                "AdamW.update: p <- p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps), then the decay "
                "p <- p - p (lr weight_decay) (Loshchilov and Hutter 2019, algorithm 2), which does not pass through "
                "m and v; without correct_bias the step is lr m / (sqrt(v) + eps); change p, m and v in place",
            ),
            Check(
                "rmsprop_and_sgd",
                3,
                "steps of RMSprop and SGD",
                "RMSprop.update: v <- gamma v + (1 - gamma) g^2, then p <- p - lr g / (sqrt(v) + eps); SGD.update: "
                "p <- p - lr g; then the decay p <- p - p (lr weight_decay); change p and v in place",
            ),
            Check(
                "schedules",
                3,
                "the linear and the cosine schedule",
                "linear: (1 - progress) / (1 - warmup) after the warm-up; cosine: 1/2 (1 + cos(pi (progress - "
                "warmup) / "
                "(1 - warmup))); both rise from 0 to 1 during the warm-up",
            ),
            Check(
                "clipping",
                3,
                "gradients with a norm above and below the maximum",
                "clip_gradients: g <- g min(1, max_norm / |g|) with |g| the joint norm of all gradients; return |g| "
                "before; skip a parameter whose grad is None, and do not divide 0 by 0 (Pascanu et al. 2013, "
                "algorithm 1)",
            ),
        ),
    ),
    "losses": Part(
        "From rows to losses and predictions",
        60,
        blanks=(
            "tokenizer.pack",
            "tasks.cross_entropy",
            "tasks.binary_cross_entropy",
            "tasks.squared_error",
            "tasks.cosine_embedding",
            "tasks.softmax_divergence",
            "tasks.bernoulli_divergence",
            "tasks.decode_softmax",
            "tasks.decide",
        ),
        checks=(
            Check(
                "packing",
                2,
                "packed texts and pairs",
                "pack: [CLS] A [SEP] or [CLS] A [SEP] B [SEP]; segment ids are 0 for [CLS] A [SEP], 1 for B [SEP]; "
                "cut "
                "the texts to limit - 2 or limit - 3 tokens",
            ),
            Check(
                "losses",
                2,
                "the loss of each example",
                "cross_entropy, binary_cross_entropy: -log p(label); squared_error: (output - label)^2; "
                "cosine_embedding: 1 - cos for label 1, max(0, cos) for label 0; each returns one number per example",
            ),
            Check(
                "divergences",
                2,
                "both symmetrised KL divergences",
                "softmax_divergence: sum_k (p_k - q_k)(log p_k - log q_k); bernoulli_divergence: (p - q)(logit p - "
                "logit q)",
            ),
            Check(
                "decoding",
                2,
                "predictions and probabilities",
                "decode_softmax: argmax of the softmax; decide: p = s / (2 t) below the threshold t, "
                "1/2 + (s - t) / (2 (1 - t)) above; predict 1 where p > 1/2",
            ),
        ),
    ),
    "classifier": Part(
        "The model's forward pass and the training step",
        120,
        blanks=(
            "multitask_classifier.MultitaskBERT.forward",
            "multitask_classifier.TaskLoss.__call__",
            "multitask_classifier.train_step",
        ),
        checks=(
            Check(
                "logits",
                1,
                "the logits of single sentences and pairs",
                "MultitaskBERT.forward: embed, encode up to the last exit, then state and head of that exit",
            ),
            Check(
                "exits",
                3,
                "several exits, given embeddings, cached features",
                "MultitaskBERT.forward: return states and logits for every layer in `exits`, run no layer above the "
                "last of them, use `embeds` in place of the lookup, and pass cached features to the last head; `rng` "
                "is the generator's state before the first layer",
            ),
            Check(
                "loss",
                2,
                "the weighted loss of the exits",
                "TaskLoss.__call__: sum_i w_i L_i, one number per example [b]",
            ),
            Check(
                "normalisation",
                3,
                "the gradient of a step",
                "train_step: loss = task_weight * sum(terms) / examples, with `examples` the task's examples in all "
                "batches of the step, so that k accumulated batches equal one batch k times as large; "
                "parallel.share says which rows are this process's and by how much to multiply; the change of the "
                "parameters contains lr = initial_lr * multiplier too",
            ),
            Check(
                "step",
                3,
                "the update, the learning rate, clipping and what the step returns",
                "train_step: combine the gradients, set lr = initial_lr * multiplier, clip, take the step, clear the "
                "gradients; return (task, rows, {term: sum over the examples}) for each batch, the sums detached; the "
                "rows are this process's share (parallel.share)",
            ),
        ),
    ),
    "evaluation": Part(
        "Thresholds and constant predictions",
        45,
        blanks=("evaluation.fit_decision_threshold", "evaluation.score_regression"),
        checks=(
            Check(
                "threshold",
                1,
                "the threshold that separates two classes",
                "fit_decision_threshold: the threshold with the best accuracy, in the middle between two "
                "neighbouring scores",
            ),
            Check(
                "ties",
                1,
                "equal scores, one class, and scores near 0 and 1",
                "fit_decision_threshold: no threshold separates two equal scores; candidates lie below the "
                "lowest and above "
                "the "
                "highest score too; the result stays within [THRESHOLD_ROOM, 1 - THRESHOLD_ROOM]",
            ),
            Check(
                "regression",
                1,
                "the metrics of a regression",
                "score_regression: Pearson's r, Spearman's rank correlation, mean and standard deviation of the "
                "predictions",
            ),
            Check(
                "constant",
                1,
                "predictions that are one value plus rounding error",
                "score_regression: with std(values) <= CONSTANT every correlation counts as 0, and there is a warning",
            ),
        ),
    ),
    "early_exit": Part(
        "Early exit",
        60,
        blanks=(
            "early_exit.certainty_target",
            "early_exit.LTELoss.__call__",
            "early_exit.first_exit",
            "early_exit.ExitInference.run_exit",
        ),
        checks=(
            Check(
                "target",
                2,
                "the target of learning to exit",
                "certainty_target: t = 1 where the prediction is right, else 0; for a regression "
                "t = 1 - tanh(|g - y| / (half the labels' range)), with g clamped to this range; no gradient (BERTer, "
                "section 3.3)",
            ),
            Check(
                "loss",
                2,
                "the loss of learning to exit and its gradient",
                "LTELoss.__call__: sum_i w_i (u_i - t_i)^2 for each row, with t_i from certainty_target and a gradient "
                "through u_i and the states only",
            ),
            Check(
                "first",
                2,
                "the layer after which a row leaves",
                "first_exit: the first layer whose certainty is at least the threshold; every row leaves at the last "
                "layer",
            ),
            Check(
                "inference",
                2,
                "inference that leaves early",
                "ExitInference.run_exit: a row leaves where certainty >= the task's threshold, and all rows leave at "
                "exit L",
            ),
        ),
    ),
    "slf": Part(
        "Training plans",
        60,
        blanks=("slf.sequential_layer_focus", "slf.smart_alternating"),
        checks=(
            Check(
                "layers",
                1,
                "the first stage of Sequential Layer Focus",
                "sequential_layer_focus: for i = 1..L one phase of layer_epochs that trains LayerAndExit(i) on L_i "
                "alone, without LTELoss; it is scored, but its model is not kept (BERTer, section 3.3)",
            ),
            Check(
                "second_stage",
                1,
                "the second stage and the scores it receives",
                "sequential_layer_focus: after layer L all phases of the plan `second`; it receives the scores of "
                "its "
                "own phases",
            ),
            Check(
                "alternating",
                1,
                "the stages that Smart Alternating chooses",
                "smart_alternating: start with stage A; keep the stage while score > previous score, otherwise "
                "switch; "
                "a NaN is no improvement",
            ),
            Check(
                "weights",
                1,
                "the exit weights and the schedule of Smart Alternating",
                "smart_alternating: stage A trains {L: 1}, stage B the weights `joint`; all epochs share one "
                "schedule, "
                "part = (epoch, epochs)",
            ),
        ),
    ),
    "smart": Part(
        "SMART and Bregman",
        90,
        blanks=(
            "smart.AdversarialSmart.perturb",
            "smart.AdversarialSmart.penalty",
            "smart.GaussianSmart.penalty",
            "smart.Bregman.after_step",
        ),
        checks=(
            Check(
                "ascent",
                2,
                "the perturbation after one ascent step",
                "AdversarialSmart.perturb: delta = clip(delta_0 + step * g / |g|_inf, -radius, radius), with g the "
                "gradient of l_s at delta_0 and |g|_inf that of each example (Jiang et al. 2020, algorithm 1)",
            ),
            Check(
                "penalty",
                2,
                "the adversarial penalty and its gradient",
                "AdversarialSmart.penalty: lambda * l_s(f(x + delta), f(x)), with a gradient through both passes",
            ),
            Check(
                "gaussian",
                2,
                "the Gaussian penalty and its gradient",
                "GaussianSmart.penalty: lambda * mean over the outputs of (f(x + noise) - f(x))^2, noise = sigma * "
                "N(0, 1)",
            ),
            Check(
                "teacher",
                2,
                "the teacher's average",
                "Bregman.after_step: theta_t <- beta theta_t + (1 - beta) theta, with EARLY_DECAY in the first tenth "
                "of the training and LATE_DECAY after it",
            ),
        ),
    ),
    "gradients": Part(
        "Gradient surgery",
        45,
        blanks=(
            "gradients.PCGrad.factor",
            "gradients.PCGrad.coefficients",
            "gradients.GradVac.factor",
        ),
        checks=(
            Check(
                "projection",
                1,
                "PCGrad's factor",
                "PCGrad.factor: if g_i.g_j < 0, add -(g_i.g_j / |g_j|^2) g_j to g_i (Yu et al. 2020, algorithm 1)",
            ),
            Check(
                "three_tasks",
                1,
                "PCGrad's update for several tasks",
                "PCGrad.coefficients: visit the other tasks in random order; g_i as changed so far, g_j always the "
                "original; g_i.g_j = row @ gram[:, j]",
            ),
            Check(
                "turn",
                1,
                "GradVac's factor and its moving targets",
                "GradVac.factor: if cos < phi, add g_j |g_i| (phi sqrt(1 - cos^2) - cos sqrt(1 - phi^2)) / "
                "(|g_j| sqrt(1 - phi^2)); then phi <- (1 - BETA) phi + BETA cos in any case (Wang et al. 2021, "
                "algorithm 1)",
            ),
            Check(
                "vaccine",
                1,
                "GradVac's updates over several steps",
                "GradVac.factor: the target of a pair is moved at every visit, also where g_i is not turned",
            ),
        ),
    ),
    "adapters": Part(
        "Adapters",
        45,
        blanks=(
            "adapters.Bottleneck.forward",
            "adapters.LHUC.forward",
            "adapters.LoRA.forward",
            "adapters.ProjectedAttention.split_heads",
            "adapters.ProjectedAttention.attend",
            "adapters.ProjectedAttention.forward",
        ),
        forbidden=(
            "scaled_dot_product_attention",
            "multi_head_attention_forward",
            "MultiheadAttention",
            "attend_sdpa",
            *TORCHS_ATTENTION,
        ),
        checks=(
            Check(
                "bottleneck",
                1,
                "the bottleneck adapter",
                "Bottleneck.forward: y + W_D GELU(W_E y + b_E) + b_D, with y = output (Houlsby et al. 2019, 2.1)",
            ),
            Check(
                "lhuc",
                1,
                "LHUC",
                "LHUC.forward: y * 2 sigmoid(r), with y = output (Swietojanski and Renals 2014, eq. 3)",
            ),
            Check(
                "lora",
                1,
                "LoRA",
                "LoRA.forward: W h + b + (alpha / m) B A h, with h the layer's input (Hu et al. 2021, eq. 3)",
            ),
            Check(
                "pal",
                1,
                "the projected attention layer",
                "ProjectedAttention.forward: FFN(x) + V_D g(V_E h), with g = softmax(Q K^T / sqrt(k) + mask) V in "
                "each head (split_heads, attend)",
            ),
        ),
    ),
}
