"""The task table against torch.distributions, closed forms, hand-worked values and finite differences."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn import functional as F

from errors import InputError
from tasks import (
    CosineHead,
    bernoulli_divergence,
    build_tasks,
    cosine_embedding,
    cosine_squared_error,
    decode_bernoulli,
    decode_cosine,
    decode_fraction,
    decode_softmax,
    decode_value,
    softmax_divergence,
)

NAMES = ("sst", "cfimdb", "para", "sts")
SIAMESE = {"para": "siamese", "sts": "siamese"}


def variants():
    """Every row that the flags can make."""
    cases = {}
    for para_loss in ("bce", "mse", "cosine"):
        for sts_loss in ("mse", "cosine"):
            tasks = build_tasks(NAMES, SIAMESE, losses={"para": para_loss, "sts": sts_loss})
            for task in tasks.values():
                loss = {"para": para_loss, "sts": sts_loss}.get(task.name, "ce")
                cases[f"{task.name}-{loss}"] = pytest.param(task, id=f"{task.name}-{loss}")
    return list(cases.values())


def outputs_of(task):
    """The number of outputs of a task's head."""
    return task.objective.make_head(8)(torch.zeros(1, 8)).shape[-1]


def random_logits(task, seed, n=7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, outputs_of(task), generator=generator, dtype=torch.float64)
    if task.objective.make_head(8).__class__ is CosineHead:
        logits = logits.tanh() * 0.9
    return logits


def random_labels(task, seed, n=7):
    generator = torch.Generator().manual_seed(seed)
    low, high = task.label_range
    if task.is_regression:
        return torch.rand(n, generator=generator, dtype=torch.float64) * (high - low) + low
    return torch.randint(low, high + 1, (n,), generator=generator).double()


# --- losses -------------------------------------------------------------------------------------------------


def test_cross_entropy_is_minus_log_probability_of_the_label():
    task = build_tasks(("sst",))["sst"]
    logits, labels = random_logits(task, 0), random_labels(task, 1)
    expected = -Categorical(logits=logits).log_prob(labels.long())
    torch.testing.assert_close(task.objective.loss(logits, labels), expected, rtol=1e-12, atol=1e-12)
    # softmax(ln 1, ln 3, ...) by hand: p = 1/8, 3/8, 1/8, 2/8, 1/8
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]], dtype=torch.float64).log()
    assert task.objective.loss(logits, torch.tensor([3.0])).item() == pytest.approx(math.log(4))


def test_binary_cross_entropy_is_minus_log_probability_of_the_label():
    task = build_tasks(("para",))["para"]
    logits, labels = random_logits(task, 0), random_labels(task, 1)
    expected = -Bernoulli(logits=logits.squeeze(-1)).log_prob(labels)
    torch.testing.assert_close(task.objective.loss(logits, labels), expected, rtol=1e-12, atol=1e-12)
    # p = 3/4: -ln 3/4 for label 1, -ln 1/4 for label 0
    logits = torch.full((2, 1), math.log(3), dtype=torch.float64)
    assert task.objective.loss(logits, torch.tensor([1.0, 0.0])).tolist() == pytest.approx(
        [math.log(4 / 3), math.log(4)]
    )


def test_binary_cross_entropy_is_finite_far_out():
    task = build_tasks(("para",))["para"]
    loss = task.objective.loss(torch.tensor([[200.0], [-200.0]]), torch.tensor([0.0, 1.0]))
    assert loss.tolist() == [200.0, 200.0]


def test_squared_errors_by_hand():
    sts = build_tasks(("sts",))["sts"]
    assert sts.objective.loss(torch.tensor([[3.0], [5.5]]), torch.tensor([4.2, 5.0])).tolist() == pytest.approx(
        [1.44, 0.25]
    )
    para = build_tasks(("para",), losses={"para": "mse"})["para"]
    assert para.objective.loss(torch.tensor([[0.25], [2.0]]), torch.tensor([1.0, 1.0])).tolist() == [0.5625, 1.0]
    # cos .5 against 4/5
    loss = cosine_squared_error(5.0)(torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([4.0]))
    assert loss.item() == pytest.approx(0.09)


def test_cosine_embedding_equals_torch():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 50, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(50, dtype=torch.float64) % 2
    cosine = CosineHead()(torch.cat([u, v], dim=-1))
    expected = F.cosine_embedding_loss(u, v, labels * 2 - 1, margin=0.0, reduction="none")
    torch.testing.assert_close(cosine_embedding(cosine, labels), expected, rtol=1e-9, atol=1e-9)


def test_cosine_head_by_hand_and_in_double_precision():
    state = torch.tensor([[3.0, 4.0, 4.0, 3.0], [1.0, 0.0, -2.0, 0.0]], dtype=torch.float64)
    cosine = CosineHead()(state)
    assert cosine.shape == (2, 1)
    assert cosine.dtype == torch.float64
    assert cosine.squeeze(-1).tolist() == pytest.approx([0.96, -1.0], abs=1e-15)


@pytest.mark.parametrize("task", variants())
def test_losses_are_per_example_with_the_gradient_of_finite_differences(task):
    logits, labels = random_logits(task, 2).requires_grad_(), random_labels(task, 3)
    assert task.objective.loss(logits, labels).shape == labels.shape
    assert torch.autograd.gradcheck(lambda x: task.objective.loss(x, labels), logits)
    # no example looks at another
    for i in range(len(labels)):
        alone = task.objective.loss(logits[i : i + 1], labels[i : i + 1])
        assert alone.item() == pytest.approx(task.objective.loss(logits, labels)[i].item(), rel=1e-12)


@pytest.mark.parametrize("task", variants())
def test_half_precision_is_widened(task):
    logits, labels = random_logits(task, 2).bfloat16(), random_labels(task, 3)
    wide = logits.float()
    assert task.objective.loss(logits, labels).dtype == torch.float32
    assert torch.equal(task.objective.loss(logits, labels), task.objective.loss(wide, labels))
    other = random_logits(task, 9).bfloat16()
    assert torch.equal(task.objective.divergence(logits, other), task.objective.divergence(wide, other.float()))
    assert torch.equal(task.objective.decode(logits, 0.5)[0], task.objective.decode(wide, 0.5)[0])


# --- divergences --------------------------------------------------------------------------------------------


def test_softmax_divergence_is_the_symmetrised_kl():
    p, q = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    a, b = Categorical(logits=p), Categorical(logits=q)
    expected = kl_divergence(a, b) + kl_divergence(b, a)
    torch.testing.assert_close(softmax_divergence(p, q), expected, rtol=1e-10, atol=1e-12)


def test_bernoulli_divergence_is_the_symmetrised_kl():
    p, q = torch.randn(2, 20, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    a, b = Bernoulli(logits=p.squeeze(-1)), Bernoulli(logits=q.squeeze(-1))
    expected = kl_divergence(a, b) + kl_divergence(b, a)
    torch.testing.assert_close(bernoulli_divergence(p, q), expected, rtol=1e-10, atol=1e-12)


def test_bernoulli_divergence_of_certain_pairs_keeps_its_digits():
    """In float32 the sigmoids of 14 and 14.01 are equal. The closed form: (p - q) sinh((p - q)/2) / (2 cosh cosh)."""
    p = torch.tensor([[6.0], [10.0], [14.0], [30.0], [-14.0]])
    q = p + 0.01
    a, b = p.double(), q.double()
    exact = (a - b) * torch.sinh((a - b) / 2) / (2 * torch.cosh(a / 2) * torch.cosh(b / 2))
    assert (exact > 0).all()
    torch.testing.assert_close(bernoulli_divergence(p, q).double(), exact.squeeze(-1), rtol=1e-4, atol=0.0)


def test_bernoulli_divergence_is_not_the_softmax_over_one_logit():
    """p = 3/4, q = 1/4: (3/4 - 1/4) (ln 3 + ln 3) = ln 3, where a softmax over one logit gives 0."""
    p, q = torch.tensor([[math.log(3)]]), torch.tensor([[-math.log(3)]])
    task = build_tasks(("para",))["para"]
    assert task.objective.divergence(p, q).item() == pytest.approx(math.log(3), rel=1e-6)
    assert softmax_divergence(p, q).item() == 0


def test_bernoulli_divergence_is_the_two_class_softmax_divergence():
    p, q = torch.randn(2, 20, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    zero = torch.zeros_like(p)
    expected = softmax_divergence(torch.cat([zero, p], -1), torch.cat([zero, q], -1))
    torch.testing.assert_close(bernoulli_divergence(p, q), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("task", variants())
def test_divergences_vanish_only_at_equality_and_have_gradients_on_both_sides(task):
    p, q = random_logits(task, 4).requires_grad_(), random_logits(task, 5).requires_grad_()
    assert task.objective.divergence(p, q).shape == (len(p),)
    assert torch.equal(task.objective.divergence(p, p), torch.zeros(len(p), dtype=torch.float64))
    assert (task.objective.divergence(p, q) > 0).all()
    torch.testing.assert_close(task.objective.divergence(p, q), task.objective.divergence(q, p), rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(task.objective.divergence, (p, q))


def test_divergences_are_finite_far_out():
    far = torch.tensor([[300.0, -300.0, 0.0, 0.0, 0.0]])
    assert softmax_divergence(far, -far).isfinite().all()
    assert bernoulli_divergence(far[:, :1], -far[:, :1]).item() == 600


# --- decoding -----------------------------------------------------------------------------------------------


def test_decode_softmax_takes_the_most_probable_class():
    values, probabilities = decode_softmax(torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0], [9.0, 1.0, 1.0, 1.0, 1.0]]).log())
    assert values.tolist() == [1.0, 0.0]
    assert probabilities[0].tolist() == pytest.approx([0.125, 0.375, 0.125, 0.25, 0.125])


def test_decode_bernoulli_at_the_default_threshold_gives_the_sigmoid():
    logits = torch.tensor([[-math.log(3)], [0.0], [1e-3], [math.log(3)]])
    values, probabilities = decode_bernoulli(logits)
    assert values.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert torch.equal(probabilities[:, 1], logits.squeeze(-1).sigmoid())
    assert probabilities[:, 1].tolist() == pytest.approx([0.25, 0.5, 0.50025, 0.75])


def test_decode_cosine_maps_the_threshold_to_one_half():
    """(cos + 1) / 2 = .5, .8, .9, 1 with threshold .8: p = .5 * .5/.8, .5, .5 + .5 * .1/.2, 1."""
    values, probabilities = decode_cosine(torch.tensor([[0.0], [0.6], [0.8], [1.0], [-1.0]]).double(), 0.8)
    assert probabilities[:, 1].tolist() == pytest.approx([0.3125, 0.5, 0.75, 1.0, 0.0])
    assert values[[0, 2, 3, 4]].tolist() == [0.0, 1.0, 1.0, 0.0]
    # at the default threshold every positive cosine is a paraphrase: why the threshold is fitted
    assert decode_cosine(torch.tensor([[0.2], [0.6]]))[0].tolist() == [1.0, 1.0]
    # a cosine may round to above 1; the divisor 2 (1 - threshold) must not make much of it
    assert decode_cosine(torch.tensor([[1.0 + 2.4e-7]]), 0.999999)[1].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("decode", [decode_bernoulli, decode_cosine, decode_fraction])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.62, 0.999])
def test_decisions_and_probabilities_agree_at_every_threshold(decode, threshold):
    logits = torch.linspace(-1, 1, 401, dtype=torch.float64).unsqueeze(-1)
    score = {
        decode_bernoulli: logits.sigmoid(),
        decode_cosine: (logits + 1) / 2,
        decode_fraction: logits.clamp(0, 1),
    }[decode].squeeze(-1)
    values, probabilities = decode(logits, threshold)
    clear = (score - threshold).abs() > 1e-9
    assert torch.equal(values[clear], (score > threshold).double()[clear])
    assert torch.equal(values[clear], probabilities.argmax(-1).double()[clear])
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(401, dtype=torch.float64))
    assert (probabilities >= 0).all()
    assert (probabilities[1:, 1] - probabilities[:-1, 1] >= -1e-15).all()


def test_decode_value_scales_and_stays_inside_the_range():
    outputs = torch.tensor([[-1.0], [0.25], [4.2], [7.0]])
    values, probabilities = decode_value(0.0, 5.0, 1.0)(outputs)
    assert probabilities is None
    assert values.tolist() == pytest.approx([0.0, 0.25, 4.2, 5.0])
    assert decode_value(0.0, 5.0, 5.0)(outputs / 5)[0].tolist() == pytest.approx([0.0, 0.25, 4.2, 5.0])


@pytest.mark.parametrize("task", variants())
def test_decoding_gives_a_prediction_per_example_in_the_label_range(task):
    values, probabilities = task.objective.decode(random_logits(task, 6) * 3, 0.5)
    low, high = task.label_range
    assert values.shape == (7,)
    assert ((values >= low) & (values <= high)).all()
    if task.is_regression:
        assert probabilities is None
    else:
        assert probabilities.shape == (7, len(task.label_names))


# --- the table ----------------------------------------------------------------------------------------------


def test_the_table_of_the_course():
    tasks = build_tasks(NAMES)
    assert list(tasks) == list(NAMES)
    assert [t.file("train") for t in tasks.values()] == [
        "ids-sst-train.csv", "ids-cfimdb-train.csv", "quora-train.csv", "sts-train.csv",
    ]  # fmt: skip
    assert [t.file("test") for t in tasks.values()] == [
        "ids-sst-test-student.csv", "ids-cfimdb-test-student.csv",
        "quora-test-student.csv", "sts-test-student.csv",
    ]  # fmt: skip
    assert [t.label_column for t in tasks.values()] == [
        "sentiment",
        "sentiment",
        "is_duplicate",
        "similarity",
    ]
    assert [t.label_range for t in tasks.values()] == [(0, 4), (0, 1), (0, 1), (0, 5)]
    assert [outputs_of(t) for t in tasks.values()] == [5, 2, 1, 1]
    assert [t.metric.name for t in tasks.values()] == ["accuracy", "accuracy", "accuracy", "pearson"]
    assert [t.is_regression for t in tasks.values()] == [False, False, False, True]
    assert [t.encoding for t in tasks.values()] == ["single", "single", "concat", "concat"]
    assert [t.objective.fits_threshold for t in tasks.values()] == [False] * 4
    for task in tasks.values():
        assert len(task.label_names) in (0, task.label_range[1] + 1)
        assert task.objective.make_head(12)(torch.zeros(3, 12)).shape == (3, outputs_of(task))


def test_order_and_choice_of_tasks():
    assert list(build_tasks(("sts", "sst"))) == ["sts", "sst"]
    assert list(build_tasks()) == ["sst", "para", "sts"]


def test_pair_encodings_and_siamese_features_are_per_task():
    tasks = build_tasks(pairs={"para": "embed_concat"}, siamese_features="uv")
    assert (tasks["para"].encoding, tasks["sts"].encoding) == ("embed_concat", "concat")
    assert tasks["sts"].siamese_features == "uv"
    # a cosine has two halves whatever the flag says
    tasks = build_tasks(pairs=SIAMESE, losses={"para": "cosine"}, siamese_features="uvd")
    assert (tasks["para"].siamese_features, tasks["sts"].siamese_features) == ("uv", "uvd")
    assert tasks["para"].objective.fits_threshold


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(names=("sst", "imdb")), ["--tasks", "imdb", "cfimdb"]),
        (dict(losses={"para": "cosine"}), ["--para_loss", "concat", "--pairs para=siamese"]),
        (dict(losses={"para": "cosine"}, pairs={"para": "embed_concat"}), ["--para_loss", "embed_concat"]),
        (dict(losses={"sts": "cosine"}), ["--sts_loss", "concat", "--pairs sts=siamese"]),
        (dict(losses={"sts": "cosine"}, pairs={"para": "siamese"}), ["--sts_loss", "--pairs sts=siamese"]),
        (dict(losses={"para": "hinge"}), ["--para_loss", "hinge", "bce"]),
        (dict(losses={"sts": "bce"}), ["--sts_loss", "bce", "mse"]),
        (dict(pairs={"para": "cross"}), ["--pairs para", "cross", "embed_concat"]),
        (dict(pairs={"sst": "siamese"}), ["--pairs", "sst", "para"]),
        (dict(siamese_features="u"), ["--siamese_features", "u", "uvd"]),
    ],
)
def test_inconsistent_flags_are_refused_in_one_line(flags, words):
    with pytest.raises(InputError) as error:
        build_tasks(**flags)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_loss_of_a_task_that_is_not_trained_is_no_obstacle():
    assert list(build_tasks(("sst", "para"), losses={"sts": "cosine"})) == ["sst", "para"]
