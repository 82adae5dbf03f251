"""Tests of optimizer.py against torch.optim, closed forms and transformers."""

import argparse
import collections
import copy
import io
import math

import numpy as np
import pytest
import torch
from tiny import make_batch, make_model
from torch.utils._python_dispatch import TorchDispatchMode

import optimizer
from errors import InputError
from methods import Method
from optimizer import (
    LAYER_DECAY,
    OPTIMIZERS,
    SCHEDULES,
    SGD,
    AdamW,
    RMSprop,
    Tensors,
    clip_gradients,
    layer_rates,
    parameter_groups,
)

STEPS = 1000
OPTIMISERS = {
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "adamw-uncorrected": (AdamW, {"weight_decay": 0.1, "correct_bias": False}),
    "rmsprop": (RMSprop, {"weight_decay": 0.1}),
    "sgd": (SGD, {"weight_decay": 0.1}),
}


def problem(seed=0, dtype=torch.float64):
    """Parameters of several shapes, a scalar and two without flat view among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (1,), (7,), (5, 3), (2, 3, 4)]
    draw = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    draw.append(torch.randn(4, 6, generator=generator, dtype=dtype).t())
    draw.append(torch.randn(6, 8, generator=generator, dtype=dtype)[:, ::2])
    return [torch.nn.Parameter(tensor) for tensor in draw]


def set_gradients(parameters, seed):
    """Gradient of a quadratic with noise, so that two trajectories that differ stay different."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = parameter.detach() - 0.5 + noise


def assert_equal_after_training(ours, theirs, before_their_step=None, after_their_step=None):
    """Train two copies of the problem, comparing as they go; ours and theirs build an optimiser."""
    left, right = problem(), problem()
    start = problem()
    left_optimiser, right_optimiser = ours(left), theirs(right)
    for step in range(1, STEPS + 1):
        set_gradients(left, step)
        set_gradients(right, step)
        left_optimiser.step()
        if before_their_step:
            before_their_step(right_optimiser, step)
        right_optimiser.step()
        if after_their_step:
            after_their_step(right)
        if step % 100 == 0 or step < 5:
            torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
    for moved, original in zip(left, start, strict=True):
        assert (moved - original).abs().max() > 1e-2


def test_non_contiguous_parameters_are_in_the_problem():
    assert [parameter.is_contiguous() for parameter in problem()].count(False) == 2


def rescale_eps(their_optimiser, step):
    """The eps at which torch.optim.AdamW takes the course's step (derived in AdamW's docstring)."""
    for group in their_optimiser.param_groups:
        group["eps"] = 1e-3 / math.sqrt(1 - 0.99**step)


def test_adamw_is_torchs_with_rescaled_eps():
    """eps is large here, so that a wrong place for it would show."""
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.0}
    assert_equal_after_training(
        lambda params: AdamW(params, **settings),
        lambda params: torch.optim.AdamW(params, **settings),
        before_their_step=rescale_eps,
    )


def test_adamw_differs_from_torchs_without_rescaled_eps():
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.0}
    left, right = problem(), problem()
    for parameters, build in ((left, AdamW), (right, torch.optim.AdamW)):
        set_gradients(parameters, 1)
        build(parameters, **settings).step()
    assert (left[4] - right[4]).abs().max() > 1e-6


def test_adamw_decays_after_the_step_where_torch_decays_before():
    """With torch's own decay off, shrinking the parameters after its step gives ours, step after step."""
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-3}

    @torch.no_grad()
    def shrink(parameters):
        for parameter in parameters:
            parameter.mul_(1 - 1e-2 * 0.1)

    assert_equal_after_training(
        lambda params: AdamW(params, weight_decay=0.1, **settings),
        lambda params: torch.optim.AdamW(params, weight_decay=0.0, **settings),
        before_their_step=rescale_eps,
        after_their_step=shrink,
    )


def test_adamw_one_step_exceeds_torchs_by_decay_times_step():
    """course - torch = (p - step)(1 - d) - (p (1 - d) - step) = d step, d = lr weight_decay."""
    settings = {"lr": 0.5, "betas": (0.8, 0.99), "eps": 1e-3}
    results = []
    for build, decay in ((AdamW, 0.3), (torch.optim.AdamW, 0.3), (AdamW, 0.0)):
        parameters = problem()
        set_gradients(parameters, 1)
        optimiser = build(parameters, weight_decay=decay, **settings)
        if build is torch.optim.AdamW:
            rescale_eps(optimiser, 1)
        optimiser.step()
        results.append(parameters)
    for start, course, theirs, undecayed in zip(problem(), *results, strict=True):
        torch.testing.assert_close(course - theirs, 0.5 * 0.3 * (start - undecayed), rtol=0, atol=1e-12)


def test_adamw_without_bias_correction_by_hand():
    """One step from p = 2 with g = 3: m = .3, v = .009, step = .1 * .3 / (sqrt(.009) + eps), then decay."""
    parameter = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    parameter.grad = torch.tensor(3.0, dtype=torch.float64)
    AdamW([parameter], lr=0.1, weight_decay=0.5, correct_bias=False).step()
    expected = (2 - 0.1 * 0.3 / (math.sqrt(0.009) + 1e-6)) * 0.95
    assert parameter.item() == pytest.approx(expected, abs=1e-14)


def test_rmsprop_is_torchs():
    assert_equal_after_training(
        lambda params: RMSprop(params, lr=1e-2, gamma=0.9, eps=1e-3),
        lambda params: torch.optim.RMSprop(params, lr=1e-2, alpha=0.9, eps=1e-3),
    )


def test_sgd_is_torchs():
    assert_equal_after_training(lambda params: SGD(params, lr=1e-2), lambda params: torch.optim.SGD(params, lr=1e-2))


@pytest.mark.parametrize("name", ["rmsprop", "sgd"])
def test_decay_shrinks_after_the_step(name):
    build, settings = OPTIMISERS[name]
    results = []
    for decay in (settings["weight_decay"], 0.0):
        parameters = problem()
        set_gradients(parameters, 1)
        build(parameters, **{**settings, "lr": 0.2, "weight_decay": decay}).step()
        results.append(parameters)
    for decayed, undecayed in zip(*results, strict=True):
        torch.testing.assert_close(decayed.data, undecayed.data * (1 - 0.2 * 0.1), rtol=0, atol=1e-14)


def test_rmsprop_leaves_a_row_without_gradient_finite():
    """The gradient of an unused embedding row is 0: without eps it would become 0 / 0."""
    embedding = torch.nn.Parameter(torch.ones(3, 2))
    embedding.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    RMSprop([embedding], lr=0.1).step()
    assert torch.equal(embedding[1], torch.ones(2))
    assert (embedding[[0, 2]] < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_blocks_change_no_bit(name, dtype, monkeypatch):
    """A block of 64 cuts the largest parameter into 17 pieces, the last a short one."""
    build, settings = OPTIMISERS[name]
    results = []
    for block in (64, 1 << 30):
        monkeypatch.setattr(optimizer, "BLOCK", block)
        generator = torch.Generator().manual_seed(1)
        draw = [torch.randn(rows, 7, generator=generator, dtype=dtype) for rows in (151, 3)]
        parameters = [torch.nn.Parameter(tensor) for tensor in draw]
        optimiser = build(parameters, lr=1e-2, **settings)
        for step in range(20):
            set_gradients(parameters, step)
            optimiser.step()
        results.append(parameters)
    for blocked, whole in zip(*results, strict=True):
        assert torch.equal(blocked, whole)


def test_blocks_cover_each_element_once(monkeypatch):
    monkeypatch.setattr(optimizer, "BLOCK", 4)
    numbers = torch.arange(10)
    first, second = zip(*optimizer.split_into_blocks([numbers, numbers + 100]), strict=True)
    assert [len(piece) for piece in first] == [4, 4, 2]
    assert torch.equal(torch.cat(first), numbers) and torch.equal(torch.cat(second), numbers + 100)
    assert len(list(optimizer.split_into_blocks([torch.ones(4, 5).t()]))) == 1


# the weights that the optimizer test of the CS224N default final project expects (its optimizer_test.npy)
COURSE_WEIGHTS = [[0.55482787, 0.86665666, 0.07291982], [-0.44724506, -0.2951228, -0.2717272]]


def test_adamw_reaches_the_weights_of_the_courses_own_test():
    """A thousand steps on a linear map in float32, at numpy's default tolerance."""
    random = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2, bias=False)
    optimiser = AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(1000):
        x = torch.tensor(random.uniform(size=3), dtype=torch.float32)
        optimiser.zero_grad()
        (torch.stack([x[0] + x[1], -x[2]]) - model(x)).square().sum().backward()
        optimiser.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), np.float32(COURSE_WEIGHTS), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_weight_decay_is_exact_in_float32(name):
    """Without a gradient a step is the decay alone: 1 - 1e-7 is no number of float32, p - p 1e-7 is rounded once."""
    build, settings = OPTIMISERS[name]
    parameter = torch.nn.Parameter(torch.linspace(1, 2, 1000))
    exact = parameter.detach().double() * (1 - 1e-7)
    parameter.grad = torch.zeros_like(parameter)
    build([parameter], lr=1e-6, **settings).step()  # the decay of the settings is .1
    spacing = 2.0**-23  # of float32 between 1 and 2
    assert (parameter.detach().double() - exact).abs().max() <= 0.5 * spacing * (1 + 1e-6)


# --- all parameters in one call -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMISERS)
def test_one_call_for_all_parameters_takes_the_same_steps(name, monkeypatch):
    """The arrangement of a GPU on the CPU. One parameter gets gradients late, so that two counts of updates meet."""
    build, settings = OPTIMISERS[name]
    results = []
    for together in (False, True):
        if together:
            columns = lambda rows: [[Tensors(column) for column in zip(*rows, strict=True)]]  # noqa: E731
            monkeypatch.setattr(optimizer, "arrange", columns)
        parameters = problem()
        optimiser = build(parameters, lr=1e-2, **settings)
        for step in range(30):
            set_gradients(parameters, step)
            if step < 10:
                parameters[3].grad = None
            optimiser.step()
        results.append(parameters)
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)


class CountCalls(TorchDispatchMode):
    """Count the operations that torch runs."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not name.startswith("_record_function"):  # torch's own mark around Optimizer.step, for profiles
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_off_the_cpu_starts_few_operations(name):
    """Clipping and a step for 30 and 300 parameters: the same operations, at most 20, none waits for a result."""
    build, settings = OPTIMISERS[name]
    counts = []
    for number in (30, 300):
        shapes = [(8, 4) if i % 2 else (8,) for i in range(number)]
        parameters = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in shapes]
        optimiser = build(parameter_groups([(str(i), p) for i, p in enumerate(parameters)], 0.1), lr=1e-2)
        for counter in (CountCalls(), CountCalls()):  # the first step also makes the optimiser's state
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            with counter:
                optimiser.step()
                foreach = {name: count for name, count in counter.calls.items() if name.startswith("_foreach")}
        assert foreach == counter.calls  # nothing runs parameter by parameter
        counts.append(foreach)
    assert counts[0] == counts[1]
    clipping = 2  # the norms and the scaling, see the test of clip_gradients
    assert sum(counts[0].values()) + clipping <= 20


@pytest.mark.parametrize("name", OPTIMISERS)
def test_resuming_changes_no_bit(name):
    """Ten steps, saving, loading into a fresh optimiser with other settings, ten more: as twenty at once."""
    build, settings = OPTIMISERS[name]
    through = problem()
    optimiser = build(through, lr=1e-2, **settings)
    for step in range(20):
        if step == 10:
            file = io.BytesIO()
            values = [parameter.detach().clone() for parameter in through]
            torch.save({"parameters": values, "state": optimiser.state_dict()}, file)
        set_gradients(through, step)
        optimiser.step()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(tensor) for tensor in saved["parameters"]]
    optimiser = build(resumed, lr=0.5)
    optimiser.load_state_dict(saved["state"])
    for step in range(10, 20):
        set_gradients(resumed, step)
        optimiser.step()
    for left, right in zip(through, resumed, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_parameter_without_gradient_is_left_alone(name):
    build, settings = OPTIMISERS[name]
    used, unused = problem()[2:4]
    before = copy.deepcopy(unused)
    optimiser = build([used, unused], lr=0.1, **settings)
    set_gradients([used], 0)
    optimiser.step()
    assert torch.equal(unused, before)
    assert used in optimiser.state and unused not in optimiser.state


def test_late_gradient_starts_its_own_bias_correction():
    """The first step of a parameter is lr sign(g), eps aside, whenever it comes."""
    early, late = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimiser = AdamW([early, late], lr=0.1, eps=1e-12)
    for _ in range(5):
        early.grad = torch.ones_like(early)
        optimiser.step()
    late.grad = torch.tensor([3.0, -4.0], dtype=torch.float64)
    optimiser.step()
    torch.testing.assert_close(late.data, torch.tensor([-0.1, 0.1], dtype=torch.float64), rtol=0, atol=1e-9)


def test_groups_keep_their_settings_and_lr_may_change_between_steps():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimiser = SGD([{"params": [first]}, {"params": [second], "lr": 0.25}], lr=0.5)
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    optimiser.step()
    optimiser.param_groups[0]["lr"] = 0.0
    optimiser.step()
    assert first.tolist() == [0.5, 0.5] and second.tolist() == [0.5, 0.5]


def test_step_returns_the_closures_loss():
    parameter = torch.nn.Parameter(torch.tensor(3.0))
    optimiser = SGD([parameter], lr=0.5)

    def closure():
        loss = parameter**2
        loss.backward()
        return loss

    assert optimiser.step(closure).item() == 9.0
    assert parameter.item() == 0.0


@pytest.mark.parametrize(
    ("build", "settings", "name"),
    [
        (AdamW, {"lr": -1.0}, "lr"),
        (AdamW, {"lr": math.nan}, "lr"),
        (AdamW, {"lr": math.inf}, "lr"),
        (AdamW, {"betas": (1.0, 0.9)}, r"betas\[0\]"),
        (AdamW, {"betas": (0.9, -0.1)}, r"betas\[1\]"),
        (AdamW, {"eps": 0.0}, "eps"),
        (AdamW, {"weight_decay": -0.1}, "weight_decay"),
        (RMSprop, {"lr": -1.0}, "lr"),
        (RMSprop, {"gamma": 1.0}, "gamma"),
        (RMSprop, {"eps": -1e-8}, "eps"),
        (RMSprop, {"weight_decay": math.nan}, "weight_decay"),
        (SGD, {"lr": -1.0}, "lr"),
        (SGD, {"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_bad_settings_are_refused(build, settings, name):
    with pytest.raises(InputError, match=f"setting {name} is"):
        build(problem(), **settings)
    with pytest.raises(InputError, match=f"setting {name} is"):
        build([{"params": problem(), **settings}])


def test_schedules_by_hand():
    """Warm-up over a fifth: half way up at .1, at the top at .2; .6 is half way from there to the end."""
    table = {
        "constant": [0.0, 0.5, 1.0, 1.0, 1.0, 1.0],
        "linear": [0.0, 0.5, 1.0, 0.75, 0.5, 0.0],
        "cosine": [0.0, 0.5, 1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.0],
    }
    assert table.keys() == SCHEDULES.keys()
    for name, expected in table.items():
        found = [SCHEDULES[name](progress, 0.2) for progress in (0.0, 0.1, 0.2, 0.4, 0.6, 1.0)]
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_at_the_extremes(name):
    schedule = SCHEDULES[name]
    assert schedule(0.0, 0.0) == 1.0
    assert [schedule(progress, 1.0) for progress in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("warmup_steps", [0, 3, 20])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_are_transformers(name, warmup_steps):
    transformers = pytest.importorskip("transformers")
    steps = 50
    theirs = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "constant":
        schedule = transformers.get_constant_schedule_with_warmup(theirs, warmup_steps)
    else:
        schedule = getattr(transformers, f"get_{name}_schedule_with_warmup")(theirs, warmup_steps, steps)
    for step in range(steps + 1):
        assert SCHEDULES[name](step / steps, warmup_steps / steps) == pytest.approx(
            schedule.get_last_lr()[0], abs=1e-12
        )
        theirs.step()
        schedule.step()


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6, math.inf])
def test_clipping_is_torchs(max_norm):
    left, right = problem(), problem()
    set_gradients(left, 0)
    set_gradients(right, 0)
    left[3].grad = right[3].grad = None
    before = math.sqrt(sum((p.grad**2).sum().item() for p in left if p.grad is not None))
    ours = clip_gradients(iter(left), max_norm)
    theirs = torch.nn.utils.clip_grad_norm_(right, max_norm)
    assert ours.dim() == 0 and ours.item() == pytest.approx(before, abs=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for mine, other in zip(left, right, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-6)


def test_clipping_in_float32_brings_the_norm_to_its_maximum():
    parameter = torch.nn.Parameter(torch.zeros(300, 1000))
    parameter.grad = torch.full_like(parameter, 2.0)
    assert clip_gradients([parameter], 0.5).item() == pytest.approx(2 * math.sqrt(300_000), rel=1e-6)
    assert parameter.grad.double().norm().item() == pytest.approx(0.5, rel=1e-6)


def test_clipping_without_gradients_and_with_a_bad_maximum():
    assert clip_gradients(problem(), 1.0).item() == 0.0
    for max_norm in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="gradient norm is"):
            clip_gradients(problem(), max_norm)


def test_parameter_groups_split_by_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    decayed, undecayed = parameter_groups(model.named_parameters(), 0.01)
    assert decayed["weight_decay"] == 0.01 and [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert undecayed["weight_decay"] == 0.0 and [group["rate"] for group in (decayed, undecayed)] == [1.0, 1.0]
    expected = [model[0].bias, model[1].weight, model[1].bias, model[2].bias]
    assert [id(p) for p in undecayed["params"]] == [id(p) for p in expected]


def test_parameter_groups_leave_out_an_empty_group():
    norm = torch.nn.LayerNorm(4)
    (group,) = parameter_groups(norm.named_parameters(), 0.01)
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 2
    norm.requires_grad_(False)
    assert parameter_groups(norm.named_parameters(), 0.01) == []


def test_parameter_groups_split_by_rate_too():
    """Two layers at .5 and 1: four groups, the full rate first, and in each pair the decayed group first."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = parameter_groups(model.named_parameters(), 0.01, {"0.weight": 0.5, "0.bias": 0.5})
    described = [(group["rate"], group["weight_decay"], [id(p) for p in group["params"]]) for group in groups]
    assert described == [
        (1.0, 0.01, [id(model[1].weight)]),
        (1.0, 0.0, [id(model[1].bias)]),
        (0.5, 0.01, [id(model[0].weight)]),
        (0.5, 0.0, [id(model[0].bias)]),
    ]


# --- layer-wise learning-rate decay -------------------------------------------------------------------------------


def test_layer_rates_by_hand():
    """Three layers and decay 1/2: embeddings 1/8, then 1/4, 1/2, 1, and 1 for pooler, heads, exits and LTE."""
    model = make_model(with_exits=True)
    rates = layer_rates(model, 0.5)
    assert rates.keys() == dict(model.named_parameters()).keys()
    embeddings = ("word_embedding", "pos_embedding", "tk_type_embedding", "embed_layer_norm")
    expected = {f"bert.{name}.": 0.125 for name in embeddings}
    expected |= {f"bert.bert_layers.{i}.": factor for i, factor in enumerate((0.25, 0.5, 1.0))}
    expected |= dict.fromkeys(("bert.pooler_dense.", "heads.", "exits.", "lte."), 1.0)
    for name, factor in rates.items():
        [prefix] = [prefix for prefix in expected if name.startswith(prefix)]
        assert factor == expected[prefix], name
    assert all(any(name.startswith(prefix) for name in rates) for prefix in expected)


def train_a_step(model, rates, build, lr):
    """One step as the loop takes it; returns {name: (value before, gradient, value after)}."""
    batch = make_batch(model.tasks["sst"])
    optimiser = build(parameter_groups(model.named_parameters(), 0.0, rates))
    model(batch).logits[model.depth].square().sum().backward()
    before = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    for group in optimiser.param_groups:
        group["lr"] = lr * group["rate"]
    optimiser.step()
    return {name: (*before[name], p.detach()) for name, p in model.named_parameters()}


def test_a_step_with_rates_moves_each_layer_by_factor_times_lr_times_gradient():
    model = make_model()
    rates, moved = layer_rates(model, 0.5), set()
    for name, (before, gradient, after) in train_a_step(model, rates, SGD, lr=0.1).items():
        if gradient is not None:
            torch.testing.assert_close(after, before - rates[name] * 0.1 * gradient, rtol=1e-12, atol=1e-14)
            moved |= {rates[name]} if (after != before).any() else set()
    assert moved == {0.125, 0.25, 0.5, 1.0}


@pytest.mark.parametrize("build", OPTIMIZERS.values())
def test_decay_1_is_the_baseline_to_the_last_bit(build):
    off = train_a_step(make_model(), None, build, lr=0.1)
    on = train_a_step(make_model(), layer_rates(make_model(), 1.0), build, lr=0.1)
    other = train_a_step(make_model(), layer_rates(make_model(), 0.9), build, lr=0.1)
    assert all(torch.equal(off[name][2], on[name][2]) for name in off)
    assert not all(torch.equal(off[name][2], other[name][2]) for name in off)


def test_the_record_of_layer_decay(capsys):
    parser = argparse.ArgumentParser()
    LAYER_DECAY.add_flags(parser.add_argument_group(LAYER_DECAY.title))
    assert isinstance(LAYER_DECAY, Method) and "layer_decay" in parser.format_help()
    model = make_model()
    for arguments, rates in (
        ([], {}),
        (["--layer_decay", "1"], {}),
        (["--layer_decay", ".5"], layer_rates(model, 0.5)),
    ):
        assert LAYER_DECAY.rates(vars(parser.parse_args(arguments)), model) == rates
    for text in ("0", "-1", "1.01", "nan", "much"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--layer_decay", text])
        assert "--layer_decay" in capsys.readouterr().err
    usual = {"layer_decay": 0.9, "option": "finetune", "adapter": ["none"], "train_backbone": False}
    for flags, refused in (
        ({}, ""),
        ({"option": "pretrain"}, "--option pretrain"),
        ({"option": "pretrain", "layer_decay": 1.0}, ""),
        ({"adapter": ["lora"]}, "--train_backbone"),
        ({"adapter": ["lora"], "train_backbone": True}, ""),
    ):
        sentences = [sentence for applies, sentence in LAYER_DECAY.conflicts(usual | flags, set()) if applies]
        assert all("--layer_decay" in sentence and refused in sentence for sentence in sentences)
        assert len(sentences) == bool(refused)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OPTIMISERS)
def test_cuda_takes_the_same_steps(name):
    build, settings = OPTIMISERS[name]
    results = []
    for device in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(p.detach().to(device)) for p in problem()]
        optimiser = build(parameters, lr=1e-2, **settings)
        for step in range(20):
            cpu = [torch.nn.Parameter(p.detach().cpu()) for p in parameters]
            set_gradients(cpu, step)
            for parameter, source in zip(parameters, cpu, strict=True):
                parameter.grad = source.grad.to(device)
            clip_gradients(parameters, 1.0)
            optimiser.step()
        results.append([p.detach().cpu() for p in parameters])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
