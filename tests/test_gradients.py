"""PCGrad and GradVac: two-dimensional examples by hand, and the direct algorithms on whole vectors."""

import argparse
import io

import pytest
import torch
from tiny import make_batch, make_model

from gradients import BETA, COMBINERS, SURGERY, Combiner, GradVac, PCGrad, Sum
from methods import Method
from optimizer import AdamW

METHODS = [PCGrad, GradVac]


def vector(*values):
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def generator(seed=0):
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def make(method, parameters, targets=None, seed=0):
    """A combiner with given GradVac targets."""
    combiner = method(parameters, generator(seed))
    if targets:
        combiner.load_state_dict({"generator": combiner.generator.get_state(), "targets": targets})
    return combiner


def combine(method, gradients, targets=None, seed=0):
    """The update for one parameter with the given gradient per task, and the combiner."""
    parameter = torch.zeros_like(next(iter(gradients.values()))).requires_grad_()
    combiner = make(method, [parameter], targets, seed)
    for task, gradient in gradients.items():
        combiner.add(task, parameter @ gradient)
    combiner.combine()
    return parameter.grad, combiner


# --- PCGrad by hand ---------------------------------------------------------------------------------------------------


def test_pcgrad_by_hand():
    """g_1 = (1, 0), g_2 = (-1, 1): g_1.g_2 = -1, |g_1|^2 = 1, |g_2|^2 = 2.

    g_1' = (1, 0) + 1/2 (-1, 1) = (1/2, 1/2), at a right angle to g_2.
    g_2' = (-1, 1) + 1/1 (1, 0) = (0, 1), at a right angle to the original g_1.
    Their sum is (1/2, 3/2); projecting g_2 against g_1' instead would change nothing, as g_1'.g_2 = 0.
    cos = -1 / sqrt(2).
    """
    update, combiner = combine(PCGrad, {"sst": vector(1, 0), "para": vector(-1, 1)})
    torch.testing.assert_close(update, vector(0.5, 1.5), rtol=1e-14, atol=0)
    assert set(combiner.cosines) == {"sst-para"}
    assert combiner.cosines["sst-para"].item() == pytest.approx(-(0.5**0.5), rel=1e-14)


def test_pcgrad_depends_on_the_random_order_of_the_others():
    """g_1 = (1, 0), g_2 = (-1, 1), g_3 = (-1, -2): only the order in which a task meets the others is random.

    Dot products: g_1.g_2 = -1, g_1.g_3 = -1, g_2.g_3 = -1; squared norms 1, 2, 5.
    g_1: against 2: (1/2, 1/2); then against 3: dot -3/2, + 3/10 (-1, -2) = (1/5, -1/10).
         against 3: (4/5, -2/5); then against 2: dot -6/5, + 3/5 (-1, 1) = (1/5, 1/5).
    g_2: against 1: (0, 1); then against 3: dot -2, + 2/5 (-1, -2) = (-2/5, 1/5).
         against 3: (-6/5, 3/5); then against 1: dot -6/5, + 6/5 (1, 0) = (0, 3/5).
    g_3: against 1: (0, -2); then against 2: dot -2, + (-1, 1) = (-1, -1).
         against 2: (-3/2, -3/2); then against 1: dot -3/2, + 3/2 (1, 0) = (0, -3/2).
    Eight sums, all of which must occur.
    """
    gradients = {"sst": vector(1, 0), "para": vector(-1, 1), "sts": vector(-1, -2)}
    choices = (((0.2, -0.1), (0.2, 0.2)), ((-0.4, 0.2), (0.0, 0.6)), ((-1.0, -1.0), (0.0, -1.5)))
    possible = {
        tuple(round(a[k] + b[k] + c[k], 9) for k in (0, 1)) for a in choices[0] for b in choices[1] for c in choices[2]
    }
    updates = [combine(PCGrad, gradients, seed=seed)[0] for seed in range(64)]
    assert {tuple(round(v, 9) for v in update.tolist()) for update in updates} == possible
    assert len(possible) == 8
    assert torch.equal(updates[0], combine(PCGrad, gradients, seed=0)[0])


# --- GradVac by hand --------------------------------------------------------------------------------------------------


def test_gradvac_turns_a_gradient_to_the_target_by_hand():
    """g_1 = (1, 0), g_2 = (0, 2), targets 1/2: cos = 0, so the factor for g_1 is 1 (1/2) / (2 sqrt(3/4)).

    g_1' = (1, 0) + (0, 2) / (2 sqrt 3) = (1, 1/sqrt 3), whose cosine with g_2 is (1/sqrt 3) / (2/sqrt 3) = 1/2.
    g_2' = (0, 2) + (1, 0) 2 (1/2) / sqrt(3/4) = (2/sqrt 3, 2), whose cosine with g_1 is 1/2.
    """
    gradients = {"sst": vector(1, 0), "para": vector(0, 2)}
    update, combiner = combine(GradVac, gradients, targets={"sst-para": 0.5, "para-sst": 0.5})
    torch.testing.assert_close(update, vector(1 + 2 / 3**0.5, 2 + 1 / 3**0.5), rtol=1e-14, atol=0)
    moved = 0.5 * (1 - BETA)
    assert combiner.targets == pytest.approx({"sst-para": moved, "para-sst": moved}, rel=1e-14)


def test_gradvac_target_moves_also_where_nothing_is_turned():
    """g_1 = (1, 0), g_2 = (3, 4): cos = 3/5 is above the first target, 0, so the update is the sum.

    The target becomes BETA 3/5, and after a second such step (1 - BETA) BETA 3/5 + BETA 3/5.
    """
    gradients = {"sst": vector(1, 0), "para": vector(3, 4)}
    update, combiner = combine(GradVac, gradients)
    assert torch.equal(update, vector(4, 4))
    once = BETA * 0.6
    assert combiner.targets == pytest.approx({"sst-para": once, "para-sst": once}, rel=1e-14)
    update, combiner = combine(GradVac, gradients, targets=combiner.targets)
    assert torch.equal(update, vector(4, 4))
    twice = (1 - BETA) * once + BETA * 0.6
    assert combiner.targets == pytest.approx({"sst-para": twice, "para-sst": twice}, rel=1e-14)


def test_the_first_step_of_gradvac_is_pcgrad():
    """Targets start at zero, and for phi = 0 the factor is -cos |g_i| / |g_j|, that of the projection."""
    rng = generator(5)
    gradients = {name: torch.randn(4, generator=rng, dtype=torch.float64) for name in ("sst", "para", "sts")}
    for seed in range(8):
        vaccinated, _ = combine(GradVac, gradients, seed=seed)
        projected, combiner = combine(PCGrad, gradients, seed=seed)
        torch.testing.assert_close(vaccinated, projected, rtol=1e-13, atol=1e-15)
    assert min(combiner.cosines.values()) < 0


def test_a_target_of_one_turns_nothing():
    """tan(arccos(1)) = 0 would divide by zero: no finite multiple of g_j makes g_i parallel to it."""
    update, _ = combine(GradVac, {"sst": vector(1, 0), "para": vector(0, 1)}, {"sst-para": 1.0, "para-sst": 1.0})
    assert torch.equal(update, vector(1, 1))


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_without_conflict_the_update_is_the_sum_to_the_last_bit(method):
    rng = generator(1)
    gradients = {name: torch.rand(50, generator=rng) for name in ("sst", "para", "sts")}
    summed, _ = combine(Sum, gradients)
    assert torch.equal(combine(method, gradients)[0], summed)


@pytest.mark.parametrize("method", METHODS)
def test_zero_gradients_are_safe(method):
    gradients = {"sst": vector(1, 0), "para": vector(0, 0), "sts": vector(-1, 1)}
    update, combiner = combine(method, gradients)
    torch.testing.assert_close(update, vector(0.5, 1.5), rtol=1e-14, atol=0)
    assert set(combiner.cosines) == {"sst-sts"}
    nothing, combiner = combine(method, dict.fromkeys(gradients, vector(0, 0)))
    assert torch.equal(nothing, vector(0, 0)) and combiner.cosines == {}


@pytest.mark.parametrize("method", METHODS)
def test_opposite_gradients_cancel(method):
    update, _ = combine(method, {"sst": vector(1, 2), "para": vector(-1, -2)})
    torch.testing.assert_close(update, vector(0, 0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_stays_visible_and_leaves_no_trace(method):
    """A gradient scaler skips a step whose gradients are not finite: the next one must start from sane targets."""
    parameter = torch.zeros(2, requires_grad=True)
    combiner = method([parameter], generator())
    for values in ([float("inf"), 1.0], [-1.0, 1.0]):
        combiner.add(str(values), parameter @ torch.tensor(values))
    combiner.combine()
    assert not torch.isfinite(parameter.grad).all()
    assert combiner.state_dict().get("targets", {}) == {} and combiner.cosines == {}


@pytest.mark.parametrize("method", METHODS)
def test_one_task_alone_keeps_its_gradient(method):
    update, combiner = combine(method, {"sst": vector(3, -4)})
    assert torch.equal(update, vector(3, -4)) and combiner.cosines == {}


@pytest.mark.parametrize("method", METHODS)
def test_only_shared_parameters_are_projected(method):
    """The shared pair is (1, 0) against (-1, 1), as above; a large own gradient must not enter the dot products.

    `two_of_three` has gradients from the first two tasks only. Over (shared, two_of_three), with g_3 = (0, 0; 0):
    g_1 = (1, 0; 1), g_2 = (-1, 1; 2), g_1.g_2 = 1: no conflict, so the sums are plain.
    """
    shared, own, unused, two_of_three = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1, 1))
    combiner = method([shared, own, unused], generator())
    combiner.add("sst", shared @ vector(1, 0) + 100 * own.sum())
    combiner.add("para", shared @ vector(-1, 1))
    combiner.combine()
    torch.testing.assert_close(shared.grad, vector(0.5, 1.5), rtol=1e-14, atol=0)
    assert torch.equal(own.grad, vector(100)) and unused.grad is None

    shared.grad = None
    combiner = method([shared, two_of_three], generator())
    combiner.add("sst", shared @ vector(1, 0) + two_of_three.sum())
    combiner.add("para", shared @ vector(-1, 1) + 2 * two_of_three.sum())
    combiner.add("sts", shared @ vector(0, 0))
    combiner.combine()
    assert torch.equal(shared.grad, vector(0, 1)) and torch.equal(two_of_three.grad, vector(3))


@pytest.mark.parametrize("method", METHODS)
def test_several_batches_of_a_task_are_one_gradient(method):
    """(1, 0) comes as (3, -1) and (-2, 1): taken apart they would be four conflicts, together one."""
    parameter = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    combiner = method([parameter], generator())
    for task, gradient in (("sst", (3, -1)), ("para", (-1, 1)), ("sst", (-2, 1))):
        combiner.add(task, parameter @ vector(*gradient))
        assert parameter.grad is None
    combiner.combine()
    torch.testing.assert_close(parameter.grad, vector(0.5, 1.5), rtol=1e-14, atol=0)
    parameter.grad = None
    combiner.add("sst", parameter @ vector(1, 1))
    combiner.combine()
    assert torch.equal(parameter.grad, vector(1, 1))


# --- the direct algorithms --------------------------------------------------------------------------------------------


def direct(method, gradients, targets, rng):
    """PCGrad or GradVac as printed: on whole vectors, one change after another. Returns the update."""
    tasks, total = list(gradients), 0
    for mine in tasks:
        g, others = gradients[mine].clone(), [task for task in tasks if task != mine]
        for k in torch.randperm(len(others), generator=rng).tolist():
            other = gradients[others[k]]
            if method is PCGrad:
                if g @ other < 0:
                    g = g - (g @ other) / (other @ other) * other
                continue
            cos, phi = (g @ other / (g.norm() * other.norm())).item(), targets.get((mine, others[k]), 0.0)
            if cos < phi:
                turn = phi * (1 - cos**2) ** 0.5 - cos * (1 - phi**2) ** 0.5
                g = g + other * g.norm() * turn / (other.norm() * (1 - phi**2) ** 0.5)
            targets[mine, others[k]] = (1 - 0.01) * phi + 0.01 * cos
        total = total + g
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_coefficients_equal_the_algorithm_on_vectors(method, count):
    """Twenty steps with a common part, so that GradVac's targets become positive and do something."""
    rng, order, targets = generator(count), generator(9), {}
    parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4,), (1, 2))]
    combiner, turned = method(parameters, generator(9)), 0
    for _ in range(20):
        common = torch.randn(12, generator=rng, dtype=torch.float64)
        gradients = {
            f"task{k}": 0.5 * common + torch.randn(12, generator=rng, dtype=torch.float64) for k in range(count)
        }
        for task, gradient in gradients.items():
            pieces = zip(parameters, gradient.split([6, 4, 2]), strict=True)
            combiner.add(task, sum((p.flatten() * piece).sum() for p, piece in pieces))
        combiner.combine()
        update = torch.cat([p.grad.flatten() for p in parameters])
        expected = direct(method, gradients, targets, order)
        torch.testing.assert_close(update, expected, rtol=1e-11, atol=1e-12)
        turned += not torch.allclose(expected, sum(gradients.values()))
    assert turned >= 3
    if method is GradVac:
        named = {f"{mine}-{other}": phi for (mine, other), phi in targets.items()}
        assert combiner.targets == pytest.approx(named, abs=1e-12)


def tiny_losses(model):
    """One loss per task of the tiny model."""
    for name, task in model.tasks.items():
        batch = make_batch(task, seed=3)
        yield name, task.objective.loss(model(batch).logits[model.depth], batch.labels).mean()


@pytest.mark.parametrize("method", METHODS)
def test_on_a_model_equals_the_algorithm_on_vectors(method):
    """Shared: what all three tasks have a gradient for. Heads keep their own; exits have none and do not move."""
    model = make_model(layers=2, with_exits=True)
    names, parameters = zip(*model.named_parameters(), strict=True)
    own = {}
    for task, loss in tiny_losses(model):
        own[task] = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
    shared = [name for name in names if all(own[task][name] is not None for task in own)]
    flat = {task: torch.cat([own[task][name].flatten() for name in shared]) for task in own}
    expected = direct(method, flat, {}, generator(4))
    combiner = method(list(parameters), generator(4))
    for task, loss in tiny_losses(model):
        combiner.add(task, loss)
    combiner.combine()
    after = dict(model.named_parameters())
    update = torch.cat([after[name].grad.flatten() for name in shared])
    torch.testing.assert_close(update, expected, rtol=1e-10, atol=1e-12)
    for first, second in (("sst", "para"), ("sst", "sts"), ("para", "sts")):
        cosine = torch.nn.functional.cosine_similarity(flat[first], flat[second], dim=0)
        torch.testing.assert_close(combiner.cosines[f"{first}-{second}"], cosine, rtol=1e-10, atol=1e-12)
    for task in own:
        for name in (f"heads.{task}.weight", f"heads.{task}.bias"):
            torch.testing.assert_close(after[name].grad, own[task][name], rtol=1e-12, atol=0)
    unused = {name for name in names if all(own[task][name] is None for task in own)}
    assert any(name.startswith("exits.") for name in unused)
    assert {name for name in names if after[name].grad is None} == unused
    before = {name: after[name].detach().clone() for name in names}
    AdamW(parameters, lr=1e-2, weight_decay=0.1).step()
    assert {name for name in names if torch.equal(after[name], before[name])} == unused


@pytest.mark.parametrize("method", METHODS)
def test_resumes_with_targets_and_order(method):
    """Four steps, or two, saved and loaded with weights_only, and two more."""
    rng = generator(2)
    steps = [
        {name: torch.randn(3, generator=rng, dtype=torch.float64) for name in ("sst", "para", "sts")} for _ in range(4)
    ]
    parameter = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def run(combiner, part):
        updates = []
        for gradients in part:
            for task, gradient in gradients.items():
                combiner.add(task, parameter @ gradient)
            combiner.combine()
            updates.append(parameter.grad)
            parameter.grad = None
        return updates

    whole = run(method([parameter], generator(7)), steps)
    first = method([parameter], generator(7))
    run(first, steps[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = method([parameter], generator(8))
    second.load_state_dict(torch.load(file, weights_only=True))
    for update, expected in zip(run(second, steps[2:]), whole[2:], strict=True):
        assert torch.equal(update, expected)


def test_sum_is_plain_backward():
    model = make_model(layers=2)
    sum(loss for _, loss in tiny_losses(model)).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    combiner = Sum(list(model.parameters()), generator())
    for task, loss in tiny_losses(model):
        combiner.add(task, loss)
    combiner.combine()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)
    assert combiner.cosines == {}


# --- the base class and the record ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", COMBINERS.values())
def test_every_combiner_has_all_of_the_interface(method):
    """The loop and the saved state need no question about which combiner they have."""
    parameter = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    combiner = method([parameter], generator())
    assert isinstance(combiner, Combiner) and combiner.cosines == {}
    later = method([parameter], generator(3))
    later.load_state_dict(combiner.state_dict())
    assert later.state_dict().keys() == combiner.state_dict().keys()
    assert (combiner.state_dict() == {}) == (method is Sum)
    for gradient in ((1, 2), (3, 5)):
        combiner.add("sst", parameter @ vector(*gradient))
        assert parameter.grad is None  # PyTorch finds nothing to add to
    combiner.combine()
    assert torch.equal(parameter.grad, vector(4, 7))


def surgery_parser():
    """A parser with the record's flags alone."""
    parser = argparse.ArgumentParser()
    SURGERY.add_flags(parser.add_argument_group(SURGERY.title))
    return parser


def test_the_flag_reads_the_registry_when_the_parser_is_made(monkeypatch, capsys):
    monkeypatch.setitem(COMBINERS, "mean", type("Mean", (Sum,), {}))
    assert surgery_parser().parse_args(["--gradients", "mean"]).gradients == "mean"
    monkeypatch.delitem(COMBINERS, "mean")
    with pytest.raises(SystemExit):
        surgery_parser().parse_args(["--gradients", "mean"])
    assert "--gradients" in capsys.readouterr().err


def test_the_record_of_gradient_surgery():
    assert isinstance(SURGERY, Method)
    flags = vars(surgery_parser().parse_args([])) | {"tasks": ["sst"], "step": "one_task", "option": "pretrain"}
    assert flags["gradients"] == "sum" and SURGERY.needs(flags) == set()
    assert not any(applies for applies, _ in SURGERY.conflicts(flags, {"step"}))
    for name in ("pcgrad", "gradvac"):
        flags |= {"gradients": name}
        assert SURGERY.needs(flags) == {"all_tasks"}
        sentences = [sentence for applies, sentence in SURGERY.conflicts(flags, {"step"}) if applies]
        assert all(w in line for w, line in zip(("--tasks", "pretrain", "--step one_task"), sentences, strict=True))
        assert all(f"--gradients {name}" in sentence for sentence in sentences)
        fine = flags | {"tasks": ["sst", "para"], "step": None, "option": "finetune"}
        assert not any(applies for applies, _ in SURGERY.conflicts(fine, set()))
