"""SMART (both forms), Bregman and LNSR: closed forms, finite differences, and what public code gets wrong."""

import argparse
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_batch, make_model
from torch import distributions, nn

import smart
from bert import BertModel
from datasets import read_dataset
from errors import InputError
from methods import LossTerm, Method
from multitask_classifier import MultitaskBERT, Outputs, TaskLoss
from smart import BREGMAN, LNSR, NOISE_STABILITY, SMART, AdversarialSmart, Bregman, GaussianSmart
from tasks import build_tasks
from tokenizer import BertTokenizer
from weights import find_weights

NAMES = ("sst", "para", "sts")
ENCODINGS = ("concat", "embed_concat", "siamese")
DATA = Path(__file__).parents[1].parent / "shared" / "data"
WEIGHTS = Path(__file__).parents[1] / "weights" / "all-MiniLM-L6-v2"


def seeded(seed=0):
    """A generator for noise."""
    return torch.Generator().manual_seed(seed)


def tables(encoding="concat"):
    """The tasks, pairs in one encoding."""
    return build_tasks(pairs={"para": encoding, "sts": encoding})


def forward(model, batch, exit_weights=None):
    """The loop's forward pass and its exit weights."""
    exit_weights = exit_weights or {model.depth: 1.0}
    return model(batch, exits=tuple(exit_weights)), exit_weights


def count_layers(model):
    """Hooks that write the index of every executed layer into the returned list."""
    seen = []
    for i, layer in enumerate(model.bert.bert_layers, start=1):
        layer.register_forward_hook(lambda *_, i=i: seen.append(i))
    return seen


class LinearModel(nn.Module):
    """f(x) = sum of w * x over the real tokens, and layers h_r = 2 h_(r - 1): every term has a closed form."""

    depth = 3

    def __init__(self, d=4):
        super().__init__()
        self.w = nn.Parameter(torch.randn(d, generator=seeded(5), dtype=torch.float64))
        self.table = nn.Embedding.from_pretrained(
            torch.randn(50, d, generator=seeded(6), dtype=torch.float64), freeze=False
        )

    def masks(self, batch):
        return tuple(mask for _, mask, _ in batch.segments)

    def encode(self, hidden, masks, task, start=0, stop=None):
        for i in range(start, stop):
            hidden = tuple(2 * h for h in hidden)
            yield i + 1, hidden

    def forward(self, batch, embeds=None, exits=None):
        embeds = embeds or tuple(self.table(ids) for ids, _, _ in batch.segments)
        rng = torch.get_rng_state()
        total = sum(((h @ self.w) * m).sum(-1) for h, m in zip(embeds, self.masks(batch), strict=True))
        return Outputs(embeds, {}, {i: total[:, None] for i in exits or (self.depth,)}, rng)


def real_tokens_rms(outputs, masks):
    """RMS of the embeddings of each example's real tokens, the long way. Shapes: [b,1,1]."""
    examples = []
    for i in range(len(masks[0])):
        tokens = torch.cat([h[i][m[i].bool()] for h, m in zip(outputs.embeds, masks, strict=True)])
        examples.append(tokens.pow(2).mean().sqrt().detach())
    return torch.stack(examples)[:, None, None]


# --- SMART, adversarial -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_ascent_follows_the_divergence_gradient_by_finite_differences(name, monkeypatch):
    model = make_model()
    batch = make_batch(model.tasks[name], b=2, s=5)
    outputs, weights = forward(model, batch)
    # a step of half the radius, so that most coordinates move by the gradient itself and are not clipped
    monkeypatch.setattr(smart, "STEP_PER_RADIUS", 0.5)
    term = AdversarialSmart([name], seeded(), radius=0.1)
    clean = {model.depth: outputs.logits[model.depth].detach()}
    (start,), (final,) = term.perturb(model, batch, outputs, weights)
    numeric, small = torch.zeros_like(start), 1e-5
    with torch.no_grad():
        for j in range(start[0].numel()):
            values = []
            for sign in (1, -1):
                moved = start.clone().flatten(1)
                moved[:, j] += sign * small
                noisy = model(batch, embeds=(outputs.embeds[0] + moved.view_as(start),)).logits[model.depth]
                values.append(batch.task.objective.divergence(noisy, clean[model.depth]))
            numeric.flatten(1)[:, j] = (values[0] - values[1]) / (2 * small)
    steepest = numeric.abs().amax(dim=(1, 2), keepdim=True)
    radius = 0.1 * real_tokens_rms(outputs, model.masks(batch))
    expected = (start + 0.5 * radius * numeric / steepest).clamp(-radius, radius)
    assert torch.allclose(final, expected, atol=1e-6)
    assert (final - start).abs().max() > 0.01
    inside = (final.abs() < radius)[model.masks(batch)[0].bool()]
    assert 0.4 < inside.double().mean() < 1


def test_closed_form_on_a_linear_model():
    """Divergence (w.delta)^2 has the slope 2 (w.delta_0) w: a long step ends in the corner radius * sign(w) * +-1."""
    model, tasks = LinearModel(), tables("siamese")
    batch = make_batch(tasks["sts"])
    outputs, weights = forward(model, batch)
    term = AdversarialSmart(["sts"], seeded(), weight=3.0, radius=0.1)
    value = term(model, batch, outputs, weights)
    masks = model.masks(batch)
    reach = 0.1 * real_tokens_rms(outputs, masks).flatten() * sum(m.sum(-1) for m in masks)
    assert torch.allclose(value, 3 * (reach * model.w.abs().sum()) ** 2, rtol=1e-12)
    # gradient through both outputs: f(x + delta) - f(x) = w.delta, so the embeddings cancel
    value.sum().backward()
    expected = 2 * 3 * (reach**2).sum() * model.w.detach().abs().sum() * model.w.detach().sign()
    assert torch.allclose(model.w.grad, expected, rtol=1e-9)
    assert model.table.weight.grad.abs().max() < 1e-9


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_perturbation_moves_every_segment_within_the_radius_and_never_padding(encoding, name):
    model = make_model(tables(encoding), dropout=0.2).train()
    batch = make_batch(model.tasks[name])
    outputs, weights = forward(model, batch)
    term = AdversarialSmart([name], seeded(), radius=0.02)
    starts, finals = term.perturb(model, batch, outputs, weights)
    masks = model.masks(batch)
    assert len(finals) == (2 if batch.task.encoding == "siamese" else 1)
    radius = 0.02 * real_tokens_rms(outputs, masks)
    for start, final, mask in zip(starts, finals, masks, strict=True):
        real = mask.bool()
        assert not real.all() and (final[~real] == 0).all() and (start[~real] == 0).all()
        assert (torch.maximum(final.abs(), start.abs()) <= radius * (1 + 1e-12)).all()
        # every real token of every segment of this pass has moved: of A, of B, or of both joined
        assert torch.equal((final != start).any(-1), real)


def test_longer_steps_end_on_the_edge_of_the_box(monkeypatch):
    model = make_model()
    batch = make_batch(model.tasks["sst"])
    outputs, weights = forward(model, batch)
    monkeypatch.setattr(smart, "STEP_PER_RADIUS", 1e13)
    term = AdversarialSmart(["sst"], seeded(), radius=0.02)
    _, (final,) = term.perturb(model, batch, outputs, weights)
    radius = 0.02 * real_tokens_rms(outputs, model.masks(batch))
    real = model.masks(batch)[0].bool()
    assert torch.allclose(final[real].abs(), radius.expand_as(final)[real], rtol=1e-12)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "make_term",
    [lambda: AdversarialSmart(NAMES, seeded()), lambda: GaussianSmart(NAMES, seeded()), lambda: LNSR(NAMES, seeded())],
    ids=["adversarial", "gaussian", "lnsr"],
)
def test_an_example_has_the_same_term_whichever_examples_it_is_computed_with(make_term, encoding):
    """The rows of a batch in two halves, as two processes take them, against all of them together."""
    model = make_model(tables(encoding))
    batch = make_batch(model.tasks["para"], b=5)
    outputs, weights = forward(model, batch)
    together = make_term()(model, batch, outputs, weights)
    for positions in (slice(0, 5, 2), slice(1, 5, 2)):
        segments = tuple(tuple(x[positions] for x in segment) for segment in batch.segments)
        half = replace(batch, segments=segments, labels=batch.labels[positions], ids=batch.ids[positions])
        half = replace(half, place=(positions, 5))
        assert torch.allclose(make_term()(model, half, *forward(model, half)), together[positions], rtol=1e-9)


def reference_divergence(name, p, q):
    """l_s by torch.distributions: symmetrised KL of the softmax, of the Bernoulli; squared difference for STS."""
    if name == "sts":
        return (p - q).squeeze(-1) ** 2
    if name == "para":
        p, q = (distributions.Bernoulli(logits=x.squeeze(-1)) for x in (p, q))
    else:
        p, q = (distributions.Categorical(logits=x) for x in (p, q))
    return distributions.kl_divergence(p, q) + distributions.kl_divergence(q, p)


@pytest.mark.parametrize("name", NAMES)
def test_the_term_is_the_weighted_divergence_summed_over_the_exits(name):
    model = make_model(with_exits=True)
    batch = make_batch(model.tasks[name])
    outputs, weights = forward(model, batch, {1: 0.5, 3: 2.0})
    value = AdversarialSmart([name], seeded(), weight=4.0)(model, batch, outputs, weights)
    again = AdversarialSmart([name], seeded())
    _, final = again.perturb(model, batch, outputs, weights)
    noisy = model(batch, embeds=smart.add(outputs.embeds, final), exits=(1, 3)).logits
    expected = sum(w * reference_divergence(name, noisy[i], outputs.logits[i]) for i, w in weights.items())
    assert torch.allclose(value, 4 * expected, rtol=1e-6)
    assert value.shape == (len(batch),) and (value > 0).all()


def test_layers_above_the_deepest_exit_do_not_run():
    model = make_model(with_exits=True)
    batch = make_batch(model.tasks["sst"])
    outputs, weights = forward(model, batch, {1: 1.0})
    seen = count_layers(model)
    for term, passes in (
        (AdversarialSmart(["sst"], seeded()), 2),
        (AdversarialSmart(["sst"], seeded(), mixed_precision=True), 3),
        (GaussianSmart(["sst"], seeded()), 1),
        (LNSR(NAMES, seeded()), 2),
        (Bregman(model, 1.0, NAMES), 1),
    ):
        seen.clear()
        term(model, batch, outputs, weights)
        assert seen == [1] * passes


def test_the_ascent_leaves_no_gradient_in_the_parameters():
    model = make_model()
    batch = make_batch(model.tasks["sst"])
    outputs, weights = forward(model, batch)
    AdversarialSmart(["sst"], seeded())(model, batch, outputs, weights)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_both_passes_have_the_same_dropout_masks(encoding, monkeypatch):
    """With other masks the term would stay as large as two training passes differ, however small the noise is."""
    model = make_model(tables(encoding), dropout=0.3, with_exits=True).train()
    batch = make_batch(model.tasks["para"])
    outputs, weights = forward(model, batch, {2: 1.0, 3: 1.0})
    other, _ = forward(model, batch, weights)
    floor = batch.task.objective.divergence(outputs.logits[3], other.logits[3]).mean()
    before = torch.get_rng_state()
    for mixed in (False, True):
        term = AdversarialSmart(["para"], seeded(), radius=1e-6, mixed_precision=mixed)
        assert term(model, batch, outputs, weights).max() < 1e-6 * floor
        still = GaussianSmart(["para"], seeded(), sigma=0.0, mixed_precision=mixed)
        assert (still(model, batch, outputs, weights) == 0).all()
    monkeypatch.setattr(smart, "LNSR_SIGMA", 0.0)
    assert (LNSR(NAMES, seeded())(model, batch, outputs, weights) == 0).all()
    assert torch.equal(torch.get_rng_state(), before)


def train_two_steps(make_term):
    """Parameters after two SGD steps with dropout, with the term that make_term makes of the model (or none)."""
    torch.manual_seed(3)
    model = make_model(dropout=0.2, dtype=torch.float32).train()
    term = make_term(model)
    for k, name in enumerate(("sst", "para")):
        batch = make_batch(model.tasks[name], seed=k)
        outputs, weights = forward(model, batch)
        loss = TaskLoss()(model, batch, outputs, weights)
        if term:
            loss = loss + term(model, batch, outputs, weights)
        model.zero_grad()
        loss.sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        if term:
            term.after_step(model, 0.5)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    "make_term",
    [
        lambda model, **kw: AdversarialSmart(NAMES, seeded(), **kw),
        lambda model, **kw: GaussianSmart(NAMES, seeded(), **kw),
        lambda model, weight: Bregman(model, weight, NAMES),
        lambda model, **kw: LNSR(NAMES, seeded(), **kw),
    ],
    ids=["adversarial", "gaussian", "bregman", "lnsr"],
)
def test_weight_zero_is_bit_identical_to_off_and_weight_one_is_not(make_term):
    off = train_two_steps(lambda model: None)
    assert torch.equal(train_two_steps(lambda model: make_term(model, weight=0.0)), off)
    assert not torch.equal(train_two_steps(lambda model: make_term(model, weight=1.0)), off)


@pytest.mark.parametrize("kind", [AdversarialSmart, GaussianSmart, LNSR])
def test_a_task_that_is_not_named_is_left_alone(kind):
    model = make_model()
    batch = make_batch(model.tasks["sst"])
    outputs, weights = forward(model, batch)
    generator = seeded()
    value = kind(["para"], generator)(model, batch, outputs, weights)
    assert value.shape == (4,) and (value == 0).all()
    assert torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", [AdversarialSmart, GaussianSmart])
def test_under_bf16_the_term_is_that_of_a_float32_run(kind, encoding):
    model = make_model(tables(encoding), dropout=0.2, dtype=torch.float32).train()
    batch = make_batch(model.tasks["para"])
    torch.manual_seed(1)
    outputs, weights = forward(model, batch)
    expected = kind(["para"], seeded())(model, batch, outputs, weights)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = forward(model, batch)
    assert rounded.logits[3].dtype == torch.bfloat16
    value = kind(["para"], seeded(), mixed_precision=True)(model, batch, rounded, weights)
    assert value.dtype == torch.float32
    assert torch.allclose(value, expected, rtol=1e-3)
    value.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.bert.bert_layers.parameters())


@pytest.mark.parametrize(
    ("radius", "step", "start"),
    [
        (1e-9, 100, 1.0),  # below float32's spacing at the embeddings
        (0.01, 0.0, 1.0),  # the start is never left
        (0.01, 100, 0.0),  # no slope at the start
        (0.0, 100, 1.0),
    ],
)
def test_a_vanished_perturbation_stops_the_run(radius, step, start, monkeypatch):
    monkeypatch.setattr(smart, "STEP_PER_RADIUS", step)
    draw = AdversarialSmart.draw
    monkeypatch.setattr(AdversarialSmart, "draw", lambda *arguments: tuple(start * x for x in draw(*arguments)))
    model = make_model(dtype=torch.float32)
    batch = make_batch(model.tasks["sst"])
    outputs, weights = forward(model, batch)
    with pytest.raises(InputError, match="vanished in torch.float32") as caught:
        AdversarialSmart(["sst"], seeded(), radius=radius)(model, batch, outputs, weights)
    message = str(caught.value)
    assert f"--smart_radius {radius:g}:" in message and "raise --smart_radius" in message and "\n" not in message


@pytest.mark.parametrize("radius", [0.03, 1.0, 1e4])
def test_an_example_without_a_slope_stays_where_it_started(radius):
    """Its step is divided by a number near 0: infinite, it would make 0 * infinity of a gradient of 0."""
    model = make_model(dtype=torch.float32)
    batch = make_batch(model.tasks["para"])
    outputs, weights = forward(model, batch)
    with torch.no_grad():
        model.heads["para"].weight.zero_()
    start, end = AdversarialSmart(["para"], seeded(), radius=radius).perturb(model, batch, outputs, weights)
    assert all(torch.equal(before, after) and after.abs().sum() > 0 for before, after in zip(start, end, strict=True))


def test_outputs_that_never_move_stop_the_run():
    model = make_model(dtype=torch.float32)
    nn.init.zeros_(model.heads["sst"].weight)
    batch = make_batch(model.tasks["sst"])
    outputs, weights = forward(model, batch)
    with pytest.raises(InputError, match="batch of sst vanished"):
        AdversarialSmart(["sst"], seeded())(model, batch, outputs, weights)


def first_rows(task, folder, count=12):
    """A dev file's first rows, so that a test need not read all of it."""
    path = folder / task.file("dev")
    with open(DATA / task.file("dev"), encoding="utf-8") as file:
        path.write_text("".join(next(file) for _ in range(count + 1)), encoding="utf-8")
    return path


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the small weights are not in weights/ (./setup.sh gets them)")
@pytest.mark.skipif(not DATA.is_dir(), reason="the course data is not beside the repository")
def test_on_real_sentences_the_default_ascends_at_least_three_times_sign_noise(tmp_path):
    folder, tasks = find_weights("all-MiniLM-L6-v2"), build_tasks()
    model = MultitaskBERT(BertModel.from_pretrained(folder), tasks, init=seeded()).eval()
    tokenizer = BertTokenizer.from_pretrained(folder)
    for name, task in tasks.items():
        data = read_dataset(task, first_rows(task, tmp_path), tokenizer)
        batch = data.batch(sorted(data.usable[:8], key=lambda row: data.lengths()[row]))
        outputs, weights = forward(model, batch)
        adversarial = AdversarialSmart([name], seeded())(model, batch, outputs, weights).mean()
        (mask,), (x,) = model.masks(batch), outputs.embeds
        signs = torch.randint(0, 2, x.shape, generator=seeded(1)) * 2 - 1
        noise = smart.RADIUS * real_tokens_rms(outputs, (mask,)) * signs * mask.unsqueeze(-1)
        with torch.no_grad():
            noisy = model(batch, embeds=(x + noise,)).logits[model.depth]
            random = task.objective.divergence(noisy, outputs.logits[model.depth]).mean()
        assert adversarial >= 3 * random > 0


# --- SMART, Gaussian ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_gaussian_form_is_algorithm_1(name):
    """Lines 5-10 of SMARTer BERT's algorithm 1, on a batch without padding and a model without dropout."""
    model = make_model()
    batch = make_batch(model.tasks[name], b=3, s=5)
    ids = torch.randint(5, 50, (3, 5), generator=seeded(2))
    segment = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    batch = type(batch)(batch.task, (segment,), batch.labels, batch.ids)
    outputs, weights = forward(model, batch)
    value = GaussianSmart([name], seeded(), weight=10.0, sigma=0.05)(model, batch, outputs, weights)

    embeddings = model.bert.embed(ids, segment[2])
    perturbed = embeddings + 0.05 * torch.randn(embeddings.shape, generator=seeded(), dtype=embeddings.dtype)
    logits, logits_perturbed = (model(batch, embeds=(x,)).logits[model.depth] for x in (embeddings, perturbed))
    expected = 10.0 * torch.mean((logits - logits_perturbed) ** 2)
    assert torch.allclose(value.mean(), expected, rtol=1e-10)
    weight = model.bert.bert_layers[0].interm_dense.weight
    ours, theirs = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (value.mean(), expected))
    assert torch.allclose(ours, theirs, rtol=1e-8)


def test_noise_is_zero_on_padding_and_its_generator_resumes():
    model = make_model(tables("siamese"))
    batch = make_batch(model.tasks["sts"])
    outputs, weights = forward(model, batch)
    term = GaussianSmart(["sts"], seeded())
    masks = model.masks(batch)
    for noise, mask in zip(term.draw(outputs.embeds, masks, batch), masks, strict=True):
        assert torch.equal((noise != 0).all(-1), mask.bool()) and (noise[~mask.bool()] == 0).all()
    buffer = io.BytesIO()
    torch.save(term.state_dict(), buffer)
    buffer.seek(0)
    later = GaussianSmart(["sts"], seeded(9))
    later.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(later(model, batch, outputs, weights), term(model, batch, outputs, weights))


# --- Bregman ------------------------------------------------------------------------------------------------------


def forward_of(model, name):
    """A batch of a task, the model's answer to it, and the exit's weight."""
    batch = make_batch(model.tasks[name])
    return batch, *forward(model, batch)


def test_bregman_on_a_quadratic():
    """Task loss a (w - c)^2 and f = w x: the proximal minimiser is (a c + mu x^2 w_t) / (a + mu x^2)."""
    model, a, c, mu = LinearModel(d=1), 0.7, 2.0, 3.0
    batch = make_batch(build_tasks()["sts"], b=1, s=4)
    term = Bregman(model, mu, NAMES)
    teacher = model.w.detach().clone()
    with torch.no_grad():
        x = (forward(model, batch)[0].logits[model.depth] / model.w).view(1)
        model.w.copy_((a * c + mu * x**2 * teacher) / (a + mu * x**2))
    outputs, weights = forward(model, batch)
    value = term(model, batch, outputs, weights)
    assert torch.allclose(value, mu * (x * (model.w - teacher)) ** 2, rtol=1e-12) and value > 0
    (slope,) = torch.autograd.grad((a * (model.w - c) ** 2 + value).sum(), model.w)
    assert slope.abs().item() < 1e-12


def test_bregman_for_some_tasks_leaves_the_others_alone():
    model = make_model()
    term = Bregman(model, 1.0, ["sts"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    values = {name: term(model, *forward_of(model, name)) for name in ("sst", "sts")}
    assert values["sst"].shape == (4,) and (values["sst"] == 0).all() and (values["sts"] > 0).all()


def test_the_teacher_is_the_average_by_hand_after_three_steps():
    """Early steps keep .99 of the teacher, later ones .999: from 1, with weights 2, 3 and 4."""
    model = LinearModel(d=1)
    nn.init.ones_(model.w)
    term = Bregman(model, 1.0, NAMES)
    for value, progress in ((2.0, 0.0), (3.0, 0.05), (4.0, 0.1)):
        nn.init.constant_(model.w, value)
        term.after_step(model, progress)
    expected = 0.999 * (0.99 * (0.99 * 1 + 0.01 * 2) + 0.01 * 3) + 0.001 * 4
    assert math.isclose(term.teacher["w"].item(), expected, rel_tol=1e-12)


def test_the_teacher_has_no_gradient_and_no_dropout():
    model = make_model(dropout=0.4, with_exits=True).train()
    batch = make_batch(model.tasks["sst"])
    term = Bregman(model, 1.0, NAMES)
    outputs, weights = forward(model, batch, {2: 1.0, 3: 0.5})
    before = torch.get_rng_state()
    answers = term.teacher_logits(model, batch, weights)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not logits.requires_grad for logits in answers.values())
    still = make_model(dropout=0.4, with_exits=True).eval()(batch, exits=(2, 3)).logits
    assert all(torch.equal(answers[i], still[i]) for i in weights)
    value = term(model, batch, outputs, weights)
    expected = sum(w * reference_divergence("sst", outputs.logits[i], still[i]) for i, w in weights.items())
    assert torch.allclose(value, expected, rtol=1e-9)
    value.sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in term.teacher.values())


def test_the_teacher_leaves_a_frozen_bert_in_evaluation_mode():
    model = make_model(dropout=0.4).train()
    model.bert.eval()  # as set_trainable leaves it where nothing of BERT trains
    modes = [module.training for module in model.modules()]
    Bregman(model, 1.0, NAMES).teacher_logits(model, make_batch(model.tasks["sst"]), (model.depth,))
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes


def test_at_the_start_the_divergence_without_dropout_is_zero_and_then_grows():
    model = make_model()
    batch = make_batch(model.tasks["para"])
    term = Bregman(model, 1.0, NAMES)
    outputs, weights = forward(model, batch)
    assert (term(model, batch, outputs, weights) == 0).all()
    with torch.no_grad():
        model.bert.pooler_dense.weight.mul_(1.5)
    outputs, weights = forward(model, batch)
    assert (term(model, batch, outputs, weights) > 0).all()


def test_the_teacher_is_saved_and_resumed():
    torch.manual_seed(0)
    model = make_model()
    term, later = Bregman(model, 1.0, NAMES), Bregman(make_model(seed=7), 1.0, NAMES)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    term.after_step(model, 0.0)
    buffer = io.BytesIO()
    torch.save(term.state_dict(), buffer)
    buffer.seek(0)
    later.load_state_dict(torch.load(buffer, weights_only=True))
    for progress in (0.05, 0.5):
        assert all(torch.equal(later.teacher[name], p) for name, p in term.teacher.items())
        term.after_step(model, progress)
        later.after_step(model, progress)
    assert all(torch.equal(later.teacher[name], p) for name, p in term.teacher.items())


def test_parameters_that_a_phase_does_not_train_stay_equal_in_the_teacher():
    model = make_model(with_exits=True, dtype=torch.float32)
    prefix = "bert.bert_layers.0."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefix))
    term = Bregman(model, 1.0, NAMES)
    batch = make_batch(model.tasks["sts"])
    with torch.no_grad():
        for parameter in model.bert.bert_layers[0].parameters():
            parameter += 0.1
    outputs, weights = forward(model, batch, {1: 1.0})
    term(model, batch, outputs, weights).sum().backward()
    term.after_step(model, 0.5)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(prefix)
        assert torch.equal(term.teacher[name], parameter) != name.startswith(prefix)


# --- LNSR ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", NAMES)
def test_lnsr_equals_the_sum_written_out(name, encoding):
    model = make_model(tables(encoding), with_exits=True)
    batch = make_batch(model.tasks[name])
    outputs, weights = forward(model, batch, {1: 1.0, 2: 1.0})
    value = LNSR(NAMES, seeded(), weight=2.0)(model, batch, outputs, weights)
    masks, generator, total, tokens = model.masks(batch), seeded(), 0.0, 0
    scale = smart.LNSR_SIGMA * real_tokens_rms(outputs, masks)
    for x, mask in zip(outputs.embeds, masks, strict=True):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) * mask[..., None]
        extended = model.bert.extend_mask(mask, x.dtype)
        clean, noisy = x, x + scale * noise
        for layer in model.bert.bert_layers[:2]:
            clean, noisy = layer(clean, extended), layer(noisy, extended)
            changes = [((c - n)[m.bool()] ** 2).sum() for c, n, m in zip(clean, noisy, mask, strict=True)]
            total = total + torch.stack(changes)
        tokens = tokens + mask.sum(-1)
    assert torch.allclose(value, 2.0 * total / (2 * tokens * x.shape[-1]), rtol=1e-10)
    assert (value > 0).all()


def test_lnsr_on_a_linear_model():
    """Layers that double: the change after layer r is 4^r times the squared noise."""
    model = LinearModel()
    batch = make_batch(build_tasks()["sst"])
    outputs, weights = forward(model, batch)
    value = LNSR(NAMES, seeded())(model, batch, outputs, weights)
    (mask,), (x,) = model.masks(batch), outputs.embeds
    noise = torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    noise = 0.05 * real_tokens_rms(outputs, (mask,)) * noise
    noise = [n[m.bool()] for n, m in zip(noise, mask, strict=True)]
    expected = torch.stack([n.pow(2).mean() for n in noise]) * (4 + 16 + 64) / 3
    assert torch.allclose(value, expected, rtol=1e-12)


def test_lnsr_works_under_bf16_training():
    model = make_model(dropout=0.2, dtype=torch.float32).train()
    batch = make_batch(model.tasks["para"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, weights = forward(model, batch)
    value = LNSR(NAMES, seeded())(model, batch, outputs, weights)
    assert value.dtype == torch.float32 and (value > 0).all()
    value.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.bert.bert_layers.parameters())


# --- the records --------------------------------------------------------------------------------------------------

RECORDS = {"smart": SMART, "bregman": BREGMAN, "lnsr": NOISE_STABILITY}


def parse(text):
    """The flags of the three records, with those of other files that they read, and the names that were typed."""
    parser = argparse.ArgumentParser()
    for record in RECORDS.values():
        record.add_flags(parser.add_argument_group(record.title))
    flags = vars(parser.parse_args(text.split()))
    typed = {word[2:] for word in text.split() if word.startswith("--")}
    return flags | {"tasks": list(NAMES), "option": "finetune", "precision": "fp32"}, typed


def build_terms(text, model, **other):
    """The terms that the records build for a command line, and the purposes that they draw noise for."""
    purposes, terms = [], {}

    def noise(purpose):
        purposes.append(purpose)
        return seeded()

    for record in RECORDS.values():
        terms |= record.terms(parse(text)[0] | other, model, noise)
    return terms, purposes


@pytest.mark.parametrize(
    "text", ["", "--smart --smart_weight 0", "--bregman --bregman_weight 0", "--lnsr --lnsr_weight 0"]
)
def test_a_term_that_is_off_or_weighs_nothing_is_not_built(text):
    assert all(isinstance(record, Method) for record in RECORDS.values())
    assert build_terms(text, make_model()) == ({}, [])
    assert [record.needs(parse(text)[0]) for record in (SMART, NOISE_STABILITY)] == [set(), set()]


def test_the_records_build_what_the_flags_say():
    model = make_model()
    terms, purposes = build_terms("--smart --bregman sts --lnsr para sst --lnsr_weight 7", model)
    assert list(terms) == ["smart", "bregman", "lnsr"] and purposes == ["smart", "lnsr"]
    assert all(isinstance(term, LossTerm) for term in terms.values())
    assert [term.tasks for term in terms.values()] == [NAMES, ("sts",), ("para", "sst")]
    assert [term.weight for term in terms.values()] == [1.0, 1.0, 7.0]
    assert isinstance(terms["smart"], AdversarialSmart) and terms["smart"].radius == smart.RADIUS
    assert not terms["smart"].mixed_precision

    terms, _ = build_terms("--smart sst --smart_radius .2 --smart_weight 3 --bregman_weight 2 --bregman", model)
    assert (terms["smart"].tasks, terms["smart"].radius, terms["smart"].weight) == (("sst",), 0.2, 3.0)
    assert (terms["bregman"].tasks, terms["bregman"].weight) == (NAMES, 2.0)

    for text, sigma, weight in (("", 0.05, 10.0), (" --smart_radius .2 --smart_weight 3", 0.2, 3.0)):
        terms, _ = build_terms("--smart --smart_form gaussian" + text, model, precision="bf16")
        assert isinstance(terms["smart"], GaussianSmart) and terms["smart"].mixed_precision
        assert (terms["smart"].sigma, terms["smart"].weight) == (sigma, weight)


def test_the_published_proportions():
    """Start, step and radius 1e-5, 1e-3, 1e-5: the step is 100 radii, the start's standard deviation is one."""
    assert smart.STEP_PER_RADIUS == 100 and smart.STEP_PER_RADIUS * smart.RADIUS == 3.0


def test_only_terms_that_look_at_the_embeddings_forbid_cached_features():
    needs = {name: record.needs(parse(f"--{name}")[0]) for name, record in RECORDS.items()}
    assert {name: set(need) for name, need in needs.items()} == {
        "smart": {"embeddings"},
        "bregman": set(),
        "lnsr": {"embeddings"},
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--smart_weight 2", "--smart_weight belongs to --smart"),
        ("--smart_form gaussian", "--smart_form belongs to --smart"),
        ("--smart_radius 2", "--smart_radius belongs to --smart"),
        ("--bregman_weight 2", "--bregman_weight belongs to --bregman"),
        ("--lnsr_weight 2", "--lnsr_weight belongs to --lnsr"),
        ("--smart sst cfimdb", "--smart cfimdb: not among --tasks sst para sts"),
        ("--bregman cfimdb", "--bregman cfimdb: not among"),
        ("--lnsr cfimdb", "--lnsr cfimdb: not among"),
        (
            "--smart --smart_form gaussian --smart_radius .1 --bregman sst --bregman_weight 2 --lnsr --lnsr_weight 3",
            None,
        ),
        ("", None),
    ],
)
def test_conflicts(text, words):
    flags, typed = parse(text)
    pairs = [pair for record in RECORDS.values() for pair in record.conflicts(flags, typed)]
    assert [sentence for applies, sentence in pairs if applies and words not in sentence] == []
    assert sum(applies for applies, _ in pairs) == (words is not None)


@pytest.mark.parametrize(("text", "applies"), [("--lnsr", True), ("--lnsr --lnsr_weight 0", False), ("--smart", False)])
def test_noise_stability_of_frozen_layers_is_refused(text, applies):
    flags, typed = parse(text)
    pairs = NOISE_STABILITY.conflicts(flags | {"option": "pretrain"}, typed)
    assert any("--option pretrain" in sentence for refused, sentence in pairs if refused) == applies


@pytest.mark.parametrize(
    "text", ["--smart_weight -1", "--smart_radius 0", "--bregman_weight nan", "--smart_form other"]
)
def test_bad_values_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse(text)
    assert text.split()[0] in capsys.readouterr().err
