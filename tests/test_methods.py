"""The extensions together: off is off, on is on, every pair that is not refused trains, and all of it resumes."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tiny import make_batch, weights_of

from bert import BertModel
from building import build, build_table, read_data
from errors import InputError
from flags import check_flags, parse_flags
from methods import per_task
from multitask_classifier import TaskLoss, make_model, pair_features, phase_steps, set_trainable, train_step
from tokenizer import BertTokenizer

EXTENSIONS = {
    "early exit": "--early_exit",
    "weighted exits": "--early_exit --exit_loss weighted",
    "alternating exits": "--early_exit --exit_loss alternating",
    "two stage": "--early_exit --exit_loss two_stage",
    "slf": "--slf",
    "smart alternating": "--smart_alternating",
    "smart": "--smart",
    "smart para": "--smart para",
    "gaussian": "--smart --smart_form gaussian",
    "bregman": "--bregman",
    "bregman sst": "--bregman sst",
    "lnsr": "--lnsr",
    "layer decay": "--layer_decay 0.5",
    "gradual unfreezing": "--gradual_unfreezing 0.5",
    "distilled exits": "--early_exit --exit_loss distilled",
    "lora": "--adapter lora",
    "embed_concat": "--pairs embed_concat",
    "siamese": "--pairs para=siamese sts=siamese",
    "cosine": "--pairs siamese --para_loss cosine --sts_loss cosine",
    "quora mse": "--para_loss mse",
    "mean pooling": "--pooling mean",
    "before": "--adapter before",
    "after lhuc": "--adapter after lhuc",
    "houlsby": "--adapter houlsby",
    "lhuc": "--adapter lhuc",
    "pal": "--adapter pal --train_backbone",
    "pcgrad": "--gradients pcgrad",
    "gradvac": "--gradients gradvac",
    "all tasks": "--step all_tasks",
    "rmsprop": "--optimizer rmsprop",
    "sgd": "--optimizer sgd",
    "accumulate": "--accumulate 2",
    "bf16": "--precision bf16",
    "pretrain": "--option pretrain",
}
OFF = ("--smart --smart_weight 0", "--bregman --bregman_weight 0", "--lnsr --lnsr_weight 0", "--adapter none")
OFF += ("--layer_decay 1",)
# what changes nothing in the first two steps (the first phase is the plain one, or the sampling of tasks is alike)
STARTS_PLAIN = {"two stage", "smart alternating"}


@pytest.fixture(scope="module")
def start(program):
    """What every run starts from, read once: (tokenizer, BERT, data by how they are read)."""
    return BertTokenizer.from_pretrained(program.weights), BertModel.from_pretrained(program.weights), {}


def make_parts(program, start, text):
    """The parts of a run with the given flags; every task has its turn soon, since random order is round robin."""
    usual = f"--epochs 1 --batch_size 4 --lr 0.003 --max_length 40 --pooling cls --split full --data_dir {program.data}"
    flags, given, _ = parse_flags([*usual.split(), *text.split()])
    check_flags(flags, given)
    flags["sampler"] = "round_robin"
    torch.manual_seed(0)
    tasks = build_table(flags)
    tokenizer, bert, cache = start
    key = (tuple(tasks), tuple(task.encoding for task in tasks.values()), flags["para_loss"], flags["sts_loss"])
    if key not in cache:
        cache[key] = read_data(flags, tasks, tokenizer)[0]
    data = cache[key]
    model = make_model(flags, tasks, deepcopy(bert))
    return build(flags, model, data, torch.device("cpu"), {"loss": TaskLoss()})


def first_steps(program, start, text, steps=2):
    """Weights and losses after the first steps of a run with the given flags."""
    parts = make_parts(program, start, text)
    model, phase, terms = parts.model, next(parts.plan()), []
    optimizer = parts.make_optimizer(set_trainable(model, phase, parts.trainable))
    counted = {name: term for name, term in parts.terms.items() if not isinstance(term, phase.without)}
    for step in phase_steps(parts, phase, 0.0)[:steps]:
        results, _ = train_step(parts, optimizer, counted, step, 1.0)
        terms += [value for _, _, values in results for value in values.values()]
        for term in parts.terms.values():
            term.after_step(model, 0.0)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.stack(terms)


@pytest.fixture(scope="module")
def baseline(program, start):
    return first_steps(program, start, "", steps=3)[0]


@pytest.mark.parametrize("text", OFF)
def test_off_is_off(program, start, baseline, text):
    weights, _ = first_steps(program, start, text, steps=3)
    assert weights.keys() == baseline.keys()
    assert all(torch.equal(weights[name], baseline[name]) for name in baseline)


@pytest.fixture(scope="module")
def extended(program, start):
    """{extension: weights after three steps, one of each task}."""
    names = [name for name in EXTENSIONS if name not in STARTS_PLAIN]
    return {name: first_steps(program, start, EXTENSIONS[name], steps=3)[0] for name in names}


def differ(weights, other):
    """Whether some weight that both models have is another."""
    shared = [name for name in weights if name in other and weights[name].shape == other[name].shape]
    return any(not torch.equal(weights[name], other[name]) for name in shared)


def test_on_is_on(baseline, extended):
    assert [name for name, weights in extended.items() if not differ(weights, baseline)] == []


def test_every_extension_does_something_of_its_own(extended):
    """A variant that is taken for another one (a form, a kind, a task's name) would train the same weights."""
    assert [pair for pair in combinations(extended, 2) if not differ(*map(extended.get, pair))] == []


@pytest.mark.parametrize("order", ["sequential", "round_robin", "random", "proportional"])
def test_alternating_exits_reach_every_task_in_turn_whatever_the_order_of_tasks(program, start, order):
    """Taken by the steps of all tasks, an even number of tasks in turn would give each the same exits for ever."""
    parts = make_parts(program, start, "--tasks para sts --early_exit --exit_loss alternating")
    parts = replace(parts, settings=replace(parts.settings, sampler=order))
    met = {name: [] for name in parts.data}
    for step in phase_steps(parts, next(parts.plan()), 0.0):
        for name, _, weights in step:
            met[name].append(len(weights))
    depth = parts.model.depth
    for name, counts in met.items():
        assert counts == [(1, depth)[k % 2] for k in range(len(counts))] and len(counts) > 1, name


@pytest.mark.parametrize("batch_size", [4, 16, 1000])
def test_alternating_exits_reach_a_task_whose_batches_come_again(program, start, batch_size):
    """In a step of all tasks a short task starts again, and a task of one batch has one step in an epoch."""
    flags = f"--early_exit --exit_loss alternating --step all_tasks --epochs 2 --batch_size {batch_size}"
    parts = make_parts(program, start, flags)
    parts = replace(parts, rows=parts.rows | {"sts": parts.rows["sts"][:10]})
    plan, met, batches = parts.plan(), {name: [] for name in parts.data}, {name: [] for name in parts.data}
    for position, phase in enumerate((next(plan), plan.send(0.0))):
        for step in phase_steps(parts, phase, float(position)):
            for name, groups, weights in step:
                met[name].append(len(weights))
                batches[name] += [group.tolist() for group in groups if position == 0]
    for name, counts in met.items():
        assert len(set(counts)) == 2 and abs(counts.count(1) - len(counts) / 2) <= 1, (name, counts)
        first = batches[name][: -(-len(parts.rows[name]) // batch_size)]
        assert sorted(sum(first, [])) == sorted(parts.rows[name].tolist()), name
        assert batches[name] == [first[k % len(first)] for k in range(len(batches[name]))], name


def test_exits_for_training_alone_have_no_learning_to_exit(program, start):
    """Sequential Layer Focus by itself trains exits to teach the layers, not to leave by."""
    assert set(make_parts(program, start, "--slf").terms) == {"loss"}
    assert set(make_parts(program, start, "--slf --early_exit").terms) == {"loss", "lte"}


@pytest.mark.parametrize("entries", [["sst=0.9", "0.5"], ["0.5", "sst=0.9"]])
def test_an_entry_that_names_a_task_wins(entries):
    assert per_task(entries, "--flag", ["sst", "sts"], float) == {"sst": 0.9, "sts": 0.5}


def test_the_schedule_multiplies_the_peak_learning_rate_and_not_the_last_one(program, start):
    parts = make_parts(program, start, "")
    phase = next(parts.plan())
    optimizer = parts.make_optimizer(set_trainable(parts.model, phase, parts.trainable))
    for step in phase_steps(parts, phase, 0.0)[:2]:
        train_step(parts, optimizer, parts.terms, step, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0015, 0.0015]


def test_a_frozen_bert_has_no_gradients_even_where_its_features_are_not_cached(program, start):
    parts = make_parts(program, start, "--option pretrain --early_exit")
    trained = set_trainable(parts.model, next(parts.plan()), parts.trainable)
    assert trained and not any(name.startswith("bert.") or "pooler" in name for name in trained)
    assert any(name.startswith("exits.0.heads.") for name in trained)


def test_a_frozen_bert_runs_without_dropout_and_its_heads_with_it(program, start):
    """The features of a row are the same in every pass, as where they are cached. Other runs keep BERT's dropout."""
    frozen = "--option pretrain --early_exit"
    for text in (frozen, "--early_exit", "--adapter before --early_exit"):
        parts = make_parts(program, start, text)
        set_trainable(parts.model, next(parts.plan()), parts.trainable)
        batch = make_batch(parts.model.tasks["sts"], s=8)
        first, second = (parts.model(batch, exits=(1, 2)) for _ in range(2))
        assert [torch.equal(first.states[i], second.states[i]) for i in (1, 2)] == [text == frozen] * 2
        assert not torch.equal(first.logits[2], second.logits[2])


def test_the_loss_of_a_task_is_the_weighted_sum_over_the_exits(program, start):
    model = make_parts(program, start, "--early_exit").model.eval()
    batch = make_batch(model.tasks["sts"], s=8)
    outputs = model(batch, exits=(1, 2))
    first, second = (batch.task.objective.loss(outputs.logits[i], batch.labels) for i in (1, 2))
    loss = TaskLoss()(model, batch, outputs, {1: 0.5, 2: 3.0})
    torch.testing.assert_close(loss, 0.5 * first + 3.0 * second)


def test_pair_features_by_hand():
    u, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert pair_features(u, v, "uvd").tolist() == [[1, 2, 3, 1, 2, 1]]
    assert pair_features(u, v, "uv").tolist() == [[1, 2, 3, 1]]


def test_a_regression_head_starts_at_the_middle_of_the_labels(program, start):
    heads = make_parts(program, start, "--para_loss mse --early_exit").model
    for module in (heads.heads, heads.exits[0].heads):
        assert (module["sts"].bias.item(), module["para"].bias.item()) == (2.5, 0.5)
        assert module["sst"].bias.tolist() == [0.0] * 5


def test_a_cosine_is_trained_on_what_it_answers_with(program, start):
    """No dropout between the sentence vectors and their cosine: it would shrink it by 1 - p, in training alone."""
    parts = make_parts(program, start, EXTENSIONS["cosine"] + " --hidden_dropout_prob 0.5 --early_exit")
    model = parts.model
    for name, task in model.tasks.items():
        state = torch.randn(4, model.width(task), generator=torch.Generator().manual_seed(1))
        answers = [(model.train(mode), model.head(1, state, task))[1] for mode in (True, False)]
        assert torch.equal(*answers) == (name in ("para", "sts"))


# not adversarial SMART, which waits once a step for the flag that its perturbation has not vanished, and not gradient
# surgery, whose coefficients are computed on the host
WAITLESS = [
    "",
    "--early_exit --pooling mean",
    "--slf --pairs siamese --sts_loss cosine",
    "--smart --smart_form gaussian",
    "--bregman",
    "--lnsr --adapter houlsby lhuc",
    "--adapter lora --train_backbone --layer_decay 0.9",
    "--early_exit --exit_loss distilled",
    "--accumulate 2 --step all_tasks",
]


@pytest.mark.parametrize("text", WAITLESS)
def test_a_training_step_never_waits_for_the_device(program, start, text, monkeypatch):
    """The meta device holds no numbers: what would make the host wait for a GPU's number fails there."""
    # which does not know the meta device; in float32 it is off anyway
    monkeypatch.setattr(torch, "autocast", lambda *how, **kw: nullcontext())
    flags, given, _ = parse_flags(
        ["--batch_size", "2", "--max_length", "40", "--pooling", "cls", "--data_dir", str(program.data), *text.split()]
    )
    check_flags(flags, given)
    tokenizer, bert, _ = start
    tasks, device = build_table(flags), torch.device("meta")
    data = read_data(flags, tasks, tokenizer)[0]
    model = make_model(flags, tasks, deepcopy(bert)).to(device)
    parts = build(flags, model, data, device, {"loss": TaskLoss()})
    assert parts.model.thresholds.device.type == "cpu"
    phase = next(parts.plan())
    parameters = set_trainable(parts.model, phase, parts.trainable)
    optimizer = parts.make_optimizer(parameters)
    for step in phase_steps(parts, phase, 0.0)[:3]:
        results, _ = train_step(parts, optimizer, parts.terms, step, 1.0)
        for term in parts.terms.values():
            term.after_step(parts.model, 0.0)
        assert all(value.is_meta for _, _, values in results for value in values.values())
    assert len(optimizer.state) > 0


def overrides(second, first):
    """Whether all flags of the first extension are set again by the second, which then stands there alone."""
    flags = [{word for word in EXTENSIONS[name].split() if word.startswith("--")} for name in (first, second)]
    return flags[0] <= flags[1]


PAIRS = [(first, second) for first, second in combinations(EXTENSIONS, 2) if not overrides(second, first)]


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_every_pair_that_is_not_refused_trains(program, start, pair):
    """Two steps with finite losses and weights; what is refused is refused with a sentence, before anything is read."""
    text = " ".join(EXTENSIONS[name] for name in pair)
    try:
        weights, losses = first_steps(program, start, text)
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith("--")
        return
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


EVERYTHING = (
    "--slf --slf_epochs 0.5 --smart_alternating --early_exit --smart --bregman --gradients pcgrad "
    "--save_minutes 0.00005 --keep_last"
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_everything_together_resumes_bit_for_bit(program, kill, precision):
    """Killed within stage 1, at its end and within stage 2, the run ends like one that was never stopped."""
    flags = [*EVERYTHING.split(), "--precision", precision]
    whole = program.train(f"everything-{precision}", *flags)
    name, resume = f"everything-killed-{precision}", ()
    for at in (3, 4, 5):
        kill(program.command(name, *flags, *resume), "multitask_classifier", "train_step", at)
        resume = ("--resume",)
    run = program.train(name, *flags, "--resume")
    ours, theirs = weights_of(run), weights_of(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (run / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()
