#!/usr/bin/env python3
"""Fine-tune one BERT on sentiment, paraphrase and similarity at once: the model and the one training loop.

    python multitask_classifier.py --option finetune --use_gpu

Read here in this order: `MultitaskBERT` (a BERT with a head for each task), `train_step` (the loss), `train` (the
loop). Neither the model nor the loop sees a flag. building.py turns the flags into `Parts`. Methods fill its slots
`terms`, `plan` and `gradients`; `adapters` and `exits` are parts of the model:

    terms        term(model, batch, outputs, exit_weights) -> [b]   added to the task's loss        (smart.py)
    plan         a generator of phases: what trains, and on which exits                             (slf.py)
    gradients    how the tasks' gradients become one                                                (gradients.py)
    adapters     small modules inside BERT's layers                                                 (adapters.py)
    exits        a classifier after every layer                                                     (early_exit.py)
"""

import sys
from dataclasses import asdict, dataclass

# imported before torch, because it needs no package: it prints what to do if one is not installed
from errors import InputError, run_script, explain_out_of_memory, stop_without  # isort: skip

try:
    import torch
    from torch import nn
except ImportError as error:
    stop_without(error.name)

import building
import parallel
from base_bert import BertConfig, Dropout, dropout_state
from bert import BertModel
from datasets import Batch, bucketed_batches
from early_exit import LTE, Exit, ExitInference, sweep_levels
from evaluation import AtExit, evaluate, fit_decision_threshold, predict
from flags import EVALUATE_FLAGS, check_flags, file_flags, parse_flags, recorded_flags
from methods import LossTerm
from optimizer import clip_gradients
from report import close_run, close_sweep, copy_predictions, describe_run, finish, write_page
from runs import FREE_FLAGS, Interrupted, Recorder, RunFolder, SignalGuard, check_same_run, name_run, sha256
from samplers import SAMPLERS, all_tasks_order, make_rng, phase_rows, rows_per_epoch
from tokenizer import BertTokenizer, pack, pad

# about how many training rows a decision threshold is fitted on
THRESHOLD_ROWS = 2000


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass
class Outputs:
    """The results of one forward pass.

    Shapes: embeds: one [b,s,d] per encoder pass (two passes for a siamese pair, otherwise one);
        states and logits: {exit layer: [b,w]} and {exit layer: [b,o]}.
    `rng` is the state of the dropout generator after embedding: replayed, it repeats the layers' dropout masks.
    """

    embeds: tuple
    states: dict
    logits: dict
    rng: torch.Tensor


class MultitaskBERT(nn.Module):
    """A BERT with one head per task and, with `with_exits`, an exit after every layer.

    Source: BERTer 3.1 (heads), 3.3 (exits), 3.4 (pair encodings); SMARTer BERT 4.1.
    """

    def __init__(self, bert, tasks, hidden_dropout_prob=0.3, pooling="cls", with_exits=False, adapters=None, init=None):
        super().__init__()
        self.bert, self.tasks, self.pooling = bert, tasks, pooling
        self.depth = bert.config.num_hidden_layers  # L
        self.dropout = Dropout(hidden_dropout_prob)
        self.heads = make_heads(self, init)
        earlier = range(self.depth - 1) if with_exits else ()  # the last layer's exit is the ordinary pooler and heads
        self.exits = nn.ModuleList(Exit(bert, make_heads(self, init), pooling == "cls") for _ in earlier)
        self.lte = nn.ModuleDict({name: LTE(self.width(task)) for name, task in tasks.items() if with_exits})
        self.adapters = adapters
        if adapters is not None:
            adapters.attach(bert)
        self.register_buffer("thresholds", torch.full((len(tasks),), 0.5))  # decision thresholds (not those of exits)

    def width(self, task):
        """Size w of the vector that a task's heads see: d, or d for each letter of uv and uvd."""
        d = self.bert.config.hidden_size
        return d * len(task.siamese_features) if task.encoding == "siamese" else d

    def _apply(self, *arguments, **keywords):
        """Move or convert the model, but keep the thresholds on the CPU: reading one never waits for the GPU."""
        thresholds = self.thresholds
        super()._apply(*arguments, **keywords)
        self.thresholds = thresholds
        return self

    def decision_threshold(self, name):
        """Decision threshold of a task."""
        return float(self.thresholds[list(self.tasks).index(name)])

    def set_decision_threshold(self, name, value):
        """Set the decision threshold of a task."""
        self.thresholds[list(self.tasks).index(name)] = value

    def layer_modules(self, i):
        """What belongs to layer i alone: the layer, and its adapters where there are some."""
        return [self.bert.bert_layers[i - 1]] + ([] if self.adapters is None else [self.adapters.layers[i - 1]])

    def exit_modules(self, i):
        """What belongs to exit i alone: its pooler and its heads."""
        return [self.bert.pooler_dense, self.heads] if i == self.depth else [self.exits[i - 1]]

    def embed(self, batch):
        """The embeddings that enter layer 1, one tensor per encoder pass. Shapes: tuple of [b,s,d]."""
        embeds = tuple(self.bert.embed(ids, segment_ids) for ids, _, segment_ids in batch.segments)
        # embed_concat: the two texts are embedded separately and enter layer 1 as one sequence, [b,s_1+s_2,d]
        return (torch.cat(embeds, dim=1),) if batch.task.encoding == "embed_concat" else embeds

    def masks(self, batch):
        """The attention mask of every encoder pass. Shapes: tuple of [b,s]."""
        masks = tuple(mask for _, mask, _ in batch.segments)
        return (torch.cat(masks, dim=1),) if batch.task.encoding == "embed_concat" else masks

    def state(self, i, hidden, masks, task):
        """The vector that the heads of exit i see. Shapes: hidden: one [b,s,d] per pass; returns [b,w]."""
        if self.pooling == "mean":
            vectors = [mean_pool(h, mask) for h, mask in zip(hidden, masks, strict=True)]
        else:
            pool = self.bert.pool if i == self.depth else self.exits[i - 1].pool
            vectors = [pool(h) for h in hidden]
        return vectors[0] if len(vectors) == 1 else pair_features(*vectors, task.siamese_features)

    def head(self, i, state, task):
        """Output of exit i's head for a task. Shapes: [b,w] -> [b,o]."""
        heads = self.heads if i == self.depth else self.exits[i - 1].heads
        return heads[task.name](self.dropout(state) if task.objective.head_dropout else state)

    def encode(self, hidden, masks, task, start=0, stop=None):
        """Run layers start + 1 .. stop, yielding (i, hidden) after layer i. Shapes: hidden: one [b,s,d] per pass."""
        passes = [self.bert.encode(h, m, task.name, start, stop) for h, m in zip(hidden, masks, strict=True)]
        for states in zip(*passes, strict=True):  # one (i, h) per pass, all after the same layer
            yield states[0][0], tuple(h for _, h in states)

    def forward(self, batch, embeds=None, exits=None):
        """Run the layers up to the last of `exits` (by default the full depth), and the head of each exit.

        `embeds` replaces the embedding lookup (SMART).
        """
        exits, task = exits or (self.depth,), batch.task
        if batch.features is not None:  # a frozen BERT: the state that the last exit sees is cached
            logits = {self.depth: self.head(self.depth, batch.features, task)}
            return Outputs((), {self.depth: batch.features}, logits, None)
        embeds = embeds or self.embed(batch)
        get_state, _ = dropout_state(embeds[0].device)
        rng, masks = get_state(), self.masks(batch)
        states, logits = {}, {}
        for i, hidden in self.encode(embeds, masks, task, 0, max(exits)):
            if i in exits:
                states[i] = self.state(i, hidden, masks, task)  # [b,w]
                logits[i] = self.head(i, states[i], task)  # [b,o]
        return Outputs(embeds, states, logits, rng)

    def predict_sentiment(self, input_ids, attention_mask):
        """Five logits for SST. Shapes: [b,s], [b,s] -> [b,5]. Source: the course's interface."""
        return predict_texts(self, "sst", (input_ids, attention_mask))

    def predict_paraphrase(self, input_ids_1, attention_mask_1, input_ids_2, attention_mask_2):
        """One logit for Quora. Shapes: four [b,s] -> [b]. Source: the course's interface."""
        return predict_texts(self, "para", (input_ids_1, attention_mask_1), (input_ids_2, attention_mask_2)).squeeze(-1)

    def predict_similarity(self, input_ids_1, attention_mask_1, input_ids_2, attention_mask_2):
        """One value for STS. Shapes: four [b,s] -> [b]. Source: the course's interface."""
        return predict_texts(self, "sts", (input_ids_1, attention_mask_1), (input_ids_2, attention_mask_2)).squeeze(-1)


def make_heads(model, init):
    """A head for each task, drawn from the generator `init`."""
    heads = nn.ModuleDict()
    for name, task in model.tasks.items():
        heads[name] = task.objective.make_head(model.width(task))
        for parameter in heads[name].parameters():
            if parameter.dim() > 1:  # a weight matrix [o,w]
                nn.init.normal_(parameter, 0.0, model.bert.config.initializer_range, generator=init)
            else:  # a bias [o]
                nn.init.constant_(parameter, task.objective.start)
    return heads


def mean_pool(h, mask):
    """Mean of the hidden states of the real tokens. Shapes: [b,s,d], [b,s] -> [b,d]."""
    weights = mask.unsqueeze(-1).to(h.dtype)  # [b,s,1], 0 on padding
    return (h * weights).sum(1) / weights.sum(1)  # [b,d] / [b,1]


def pair_features(u, v, kind):
    """Features of two sentence vectors: [u; v] or [u; v; |u - v|]. Source: Sentence-BERT, section 3."""
    return torch.cat([u, v] if kind == "uv" else [u, v, (u - v).abs()], dim=-1)  # [b,2d] or [b,3d]


def predict_texts(model, name, *segments):
    """Logits of a task for raw (input_ids, attention_mask) segments. Shapes: [b,s] -> [b,o]."""
    task, ids = model.tasks[name], segments[0][0]
    if task.encoding == "concat":
        # read row by row, so on the CPU
        segments, rows = [[x.cpu() for x in segment] for segment in segments], []
        for ids_a, mask_a, ids_b, mask_b in zip(*segments[0], *segments[1], strict=True):
            a, b = ids_a[mask_a.bool()].tolist(), ids_b[mask_b.bool()].tolist()
            # without their [CLS] (first) and [SEP] (last), then joined: no padding between the texts
            rows.append(pack(a[1:-1], b[1:-1], a[0], a[-1], model.bert.config.max_position_embeddings))
        packed = [tuple(x.to(ids.device) for x in pad(rows, model.bert.config.pad_token_id))]
    else:
        # segment ids: 1 for the second text of embed_concat, 0 otherwise
        second = int(task.encoding == "embed_concat")
        packed = [(x, mask, torch.full_like(x, k * second)) for k, (x, mask) in enumerate(segments)]  # [b,s] each
    batch = Batch(task, tuple(packed), None, tuple(range(len(ids))))
    return model(batch).logits[model.depth]


# --- the loop -----------------------------------------------------------------------------------------------------


class TaskLoss(LossTerm):
    """The loss term that every run has: the task's loss at each exit, weighted.

    Source: BERTer, "Novel Fine-Tuning Strategy", sum of L_i.
    """

    def __call__(self, model, batch, outputs, exit_weights):
        return sum(w * batch.task.objective.loss(outputs.logits[i], batch.labels) for i, w in exit_weights.items())


def set_trainable(model, phase, allowed):
    """Train only the parameters that the phase names and the run allows. Returns {name: parameter}.

    A BERT in which nothing trains runs without dropout (--option pretrain; the second stage of --exit_loss two_stage).
    So an example has the same features in every epoch, whether they are cached or not.
    """
    # compared by identity, since a parameter has no name of its own
    chosen = {id(parameter) for module in phase.modules(model) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in allowed and id(parameter) in chosen)
    inside = [module for module in (model.bert, model.adapters) if module is not None]
    model.train().bert.train(any(parameter.requires_grad for module in inside for parameter in module.parameters()))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def phase_steps(parts, phase, position):
    """The steps of a phase that starts after `position` epochs: a pure function of seed and position.

    A step is a list of (task, batches, exit weights): one entry, or one for each task with --step all_tasks. The
    batches are up to `accumulate` arrays of rows. Step k of a task takes entry k of the phase's `exit_weights`, and
    after the last entry the first one again; its steps in earlier epochs count.
    """
    settings, groups = parts.settings, {}
    sizes = {name: len(rows) for name, rows in parts.rows.items()}
    per_epoch = rows_per_epoch(parts.model.tasks, sizes, settings.data_split)
    for name, chosen in phase_rows(per_epoch, sizes, position, phase.fraction, settings.seed).items():
        rows, rng = parts.rows[name][chosen], make_rng(settings.seed, "batches", name, position)
        size = settings.batch_size * parallel.world_size()
        lengths = parts.data[name]["train"].lengths()[rows]
        # each group has one task's rows of an optimiser step, of similar length; the groups are in random order
        grouped = [rows[group] for group in bucketed_batches(lengths, size * settings.accumulate, rng)]
        groups[name] = [[group[i : i + size] for i in range(0, len(group), size)] for group in grouped]
    counts, (epoch, epochs) = {name: len(batches) for name, batches in groups.items()}, phase.part
    if settings.all_tasks:
        order = all_tasks_order(counts)
    else:
        rng = make_rng(settings.seed, "order", position)
        order = [[pair] for pair in SAMPLERS[settings.sampler](counts, epoch / max(1, epochs - 1), rng)]

    def entry(name, k):
        # e.g. alternating exits: steps 0, 2, 4 of a task train the last exit, steps 1, 3, 5 all exits
        n, cycle = counts[name], phase.exit_weights
        return name, groups[name][k % n], cycle[(epoch * n + k) % len(cycle)]

    return [[entry(*pair) for pair in step] for step in order]


def train_step(parts, optimizer, terms, step, multiplier):
    """Take one optimiser step over the (task, batches, exit weights) of `step`.

    Returns a list of (task, rows of the batch, {term: sum}) for the batches, and the cosines between the tasks'
    gradients where they are measured. A sum is over this process's examples and detached. Only gradient surgery,
    adversarial SMART and fp16's loss scaler wait for the device.
    """
    results, precision = [], parts.precision
    for name, batches, exit_weights in step:
        # A loss is divided by the task's examples in the entire step, not in the batch. So k accumulated batches equal
        # one batch k times as large, and a short last batch counts by its examples.
        examples = sum(len(rows) for rows in batches)
        for rows in batches:
            # the rows of this process, all of them if it is alone; the weight is 0 if it has none of its own, else 1
            positions, weight = parallel.share(len(rows))
            batch = parts.data[name]["train"].batch(rows, positions).to(precision.device)
            with precision.autocast():
                outputs = parts.model(batch, exits=tuple(exit_weights))
            # each term is [b], one number per example
            values = {key: weight * term(parts.model, batch, outputs, exit_weights) for key, term in terms.items()}
            if any(value.shape != (len(batch),) for value in values.values()):
                raise ValueError(f"terms return { {k: tuple(v.shape) for k, v in values.items()} }, not [{len(batch)}]")
            loss = parts.settings.task_weights[name] * sum(values.values()).sum() / examples
            parts.gradients.add(name, precision.scaler.scale(loss))
            results.append((name, rows, {key: value.detach().sum() for key, value in values.items()}))
    # the gradients of all tasks and processes become one, in the parameters' .grad
    parts.gradients.combine()
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier  # warm-up and decay
    # fp16 only: the loss was scaled up so that small gradients do not vanish; otherwise these calls do nothing
    precision.scaler.unscale_(optimizer)
    if parts.settings.clip:
        clip_gradients([p for group in optimizer.param_groups for p in group["params"]], parts.settings.clip)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return results, parts.gradients.cosines


def evaluate_dev(parts, exit_layer):
    """Dev scores and predictions at an exit, after fitting the decision thresholds of cosine losses on training rows.

    A task has one decision threshold: it is fitted at `exit_layer` and used at every exit.
    """
    keywords = parts.inference() | {"infer": AtExit(exit_layer)}
    for name, rows in parts.rows.items():
        train = parts.data[name]["train"]
        if train.task.objective.fits_threshold:
            parts.model.set_decision_threshold(name, 0.5)
            seen = predict(parts.model, train, rows[:: max(1, len(rows) // THRESHOLD_ROWS)], **keywords)
            threshold = fit_decision_threshold(seen.probabilities[:, 1], train.labels[seen.rows])
            parts.model.set_decision_threshold(name, parallel.from_first(threshold))
    return evaluate(parts.model, parts.dev(), **keywords)


def send(plan, score):
    """Send the plan the score of its last phase; return its next phase, or None at its end."""
    try:
        return plan.send(score)
    except StopIteration:
        return None


def train(parts, recorder):
    """Train the phases of the plan, step by step.

    The recorder saves, logs and handles signals. If it resumes a stopped run, its history has that run's scores.
    """
    plan = parts.plan()
    phase = next(plan)
    for norm in recorder.history.scores:  # the phases that a resumed run has finished
        phase = send(plan, norm)
    optimizer = trained = None
    while phase is not None:
        parameters = set_trainable(parts.model, phase, parts.trainable)
        # the optimiser's state lives as long as the same parameters train
        if list(parameters) != trained:
            optimizer, trained = parts.make_optimizer(parameters), list(parameters)
        terms = {name: term for name, term in parts.terms.items() if not isinstance(term, phase.without)}
        steps = phase_steps(parts, phase, recorder.history.epochs)
        k, n = phase.part
        for done, step in recorder.remaining_steps(phase, steps, optimizer, trained):
            # the middle of the step, so that neither the first nor the last step has a learning rate of 0
            progress = (k + (done + 0.5) / len(steps)) / n
            results = train_step(parts, optimizer, terms, step, parts.settings.schedule(progress))
            for term in parts.terms.values():  # also those that this phase leaves out
                term.after_step(parts.model, progress)
            recorder.after_step(results)
        # A model that cannot become the best one is evaluated at the exit it has just trained, or not at all.
        exit_layer = parts.model.depth if phase.keep else max(phase.exit_weights[-1])
        norm = recorder.after_phase(phase, lambda layer=exit_layer: evaluate_dev(parts, layer))
        phase = send(plan, norm)


# --- a run from start to end --------------------------------------------------------------------------------------


def make_model(flags, tasks, bert):
    """The model of a run around a BERT; new parts are drawn from the seed."""
    # A generator of its own, so early exit or a loss term does not change what the heads are drawn from. Adapters do,
    # because they draw from it first.
    init = torch.Generator().manual_seed(flags["seed"])
    adapters = building.build_adapters(flags, bert.config, list(tasks), init)
    dropout, with_exits = flags["hidden_dropout_prob"], "exits" in building.needs_of_methods(flags)
    return MultitaskBERT(bert, tasks, dropout, flags["pooling"], with_exits, adapters, init)


def train_run(folder, flags, typed):
    """Read everything a training run needs, make its directory, and train. Returns 130 if interrupted."""
    config = None
    if flags["resume"]:
        config = folder.config()
        check_same_run(config, flags, typed)
        flags = recorded_flags(config, folder.path) | {name: flags[name] for name in typed & FREE_FLAGS}
    # dropout differs between processes; all other random numbers come from generators that are alike
    torch.manual_seed(flags["seed"] + parallel.rank())
    device = building.choose_device(flags["use_gpu"])
    inputs = building.read_inputs(flags, typed, config)
    flags = inputs.flags
    bert = BertModel.from_pretrained(inputs.weights, attention=flags["attention"])
    model = make_model(flags, inputs.tasks, bert).to(device)
    parallel.copy_from_first(model)
    building.keep_freed_memory()
    parts = building.build(flags, model, inputs.data, device, {"loss": TaskLoss()})
    print("\n".join(building.parameter_table(model, parts.trainable)))
    counts = rows_per_epoch(model.tasks, {name: len(rows) for name, rows in parts.rows.items()}, flags["split"])
    print(f"rows in a pass (--split {flags['split']}):", ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    state = folder.load_last() if config else None
    if not config:
        folder.create(inputs.record(device) | {"bert": asdict(bert.config)}, inputs.weights, flags["overwrite"])
    print(f"run: {folder.path}", flush=True)
    advice = "free some, then go on with --resume"
    if flags["batch_size"] % 2 == 0:
        half = f"--batch_size {flags['batch_size'] // 2} --accumulate {2 * flags['accumulate']}"
        advice += f", or start again with --overwrite {half}, which takes the same rows in each step"
    try:
        with explain_out_of_memory(advice):
            recorder = Recorder(folder, parts, state)
            if config:
                folder.cut_back(state["log_position"] if state else 0)
            with recorder:
                train(parts, recorder)
            with SignalGuard(immediate=True):
                finish(parts, recorder)
                copy_predictions(folder.path, flags["outputs"])
    except (Interrupted, KeyboardInterrupt):
        if parallel.rank() == 0:
            hint = f"continue from what is saved with --resume --run_dir {folder.path}"
            print(f"\ninterrupted: {'the run is complete' if folder.complete() else hint}", file=sys.stderr)
        return 130


@dataclass
class SavedRun:
    """A finished run, ready for inference. `infer` leaves early if the run was trained with --early_exit."""

    model: MultitaskBERT
    tokenizer: BertTokenizer
    flags: dict
    infer: object


def load_run(path, device, changes=None):
    """Load a saved run; the flags in `changes` replace those that it was trained with."""
    folder = RunFolder(path)
    config = folder.config()
    flags = recorded_flags(config, folder.path) | (changes or {})
    folder.check_tokenizer(config)
    tokenizer = BertTokenizer.from_pretrained(folder.path)
    tasks = building.build_table(flags)
    with torch.device("meta"):  # shapes without numbers, which load_best compares with those in the file
        model = make_model(flags, tasks, BertModel(BertConfig(**config["bert"]), attention=flags["attention"]))
    folder.load_best(model)
    exits = folder.read_exits(tasks if flags["early_exit"] else ())
    infer = ExitInference(**exits) if exits else AtExit(None)
    return SavedRun(model.to(device).eval(), tokenizer, flags, infer)


def evaluate_run(folder, flags, typed):
    """--option evaluate: score a saved run on its dev data, and write its predictions to the folder evaluate/."""
    free = EVALUATE_FLAGS | file_flags()
    for name in typed - free - {"option", "run_dir", "early_exit"}:
        raise InputError(f"--{name}: belongs to training; --option evaluate takes it from the run")
    device, levels = building.choose_device(flags["use_gpu"]), sweep_levels(flags["exit_threshold"])
    changes = {name: flags[name] for name in typed & free}
    if levels:
        changes["exit_threshold"] = ["auto"]
    run, config = load_run(folder.path, device, changes), folder.config()
    if typed & {"early_exit", "exit_policy", "exit_threshold"} and not run.flags["early_exit"]:
        raise InputError(f"{flags['run_dir']}: was trained without --early_exit: it cannot leave early")
    data, files, _ = building.read_data(run.flags, run.model.tasks, run.tokenizer, ("dev", "test"))
    for name, path in files.items():
        if sha256(path) not in (config["data"].get(name), config["data"].get(path.name)):
            print(f"note: {path} is not a file of the training run: do not compare its scores with that run's")
    # no compiled layers and no cached features (option pretrain): for a single pass over the data neither pays
    parts = building.build(
        run.flags | {"option": "finetune", "compile": False, "train_rows": None}, run.model, data, device, {}
    )
    target = folder.path / "evaluate"
    if levels:
        close_sweep(parts, target, levels)
    else:
        page = close_run(parts, target)
        write_page(target / "report.html", describe_run(folder) | page)
        copy_predictions(target, flags["outputs"])


def main(argv=None):
    """Train or evaluate as the flags say. Returns the exit status."""
    flags, typed, defaults = parse_flags(argv)
    check_flags(flags, typed)
    use_gpu, evaluates = flags["use_gpu"], flags["option"] == "evaluate"
    folder = RunFolder(flags["run_dir"] or name_run(flags, defaults))
    if flags["resume"]:
        use_gpu = recorded_flags(folder.config(), folder.path)["use_gpu"]
    elif evaluates:
        folder.config()
    else:
        folder.refuse_existing(flags["overwrite"])
    with parallel.processes(use_gpu), folder.held():
        return evaluate_run(folder, flags, typed) if evaluates else train_run(folder, flags, typed)


if __name__ == "__main__":
    run_script(main, lenient=True)
