"""Data splitting and task order: what the papers' splits promise, as pure functions of the seed."""

import numpy as np
import pytest

import samplers
from samplers import ALPHAS, SAMPLERS, all_tasks_order, endless_rows, make_rng
from tasks import TASKS

SIZES = {"sst": 30, "para": 100, "sts": 51}
COURSE = {"sst": 8544, "para": 141_506, "sts": 6040}
STEPS = {"sst": 5, "para": 12, "sts": 3}
STS_PARTS = 17


def rows_per_epoch(sizes, split):
    return samplers.rows_per_epoch(TASKS, sizes, split)


def epoch_rows(sizes, split, start, fraction, seed):
    return samplers.phase_rows(rows_per_epoch(sizes, split), sizes, start, fraction, seed)


# --- rows ---------------------------------------------------------------------------------------------------


def test_generators_depend_on_seed_and_key_only():
    first = make_rng(1, "rows", "sst", 0).random(4)
    assert np.array_equal(first, make_rng(1, "rows", "sst", 0).random(4))
    for other in (
        make_rng(2, "rows", "sst", 0),
        make_rng(1, "rows", "sst", 1),
        make_rng(1, "rows", "sts", 0),
    ):
        assert not np.array_equal(first, other.random(4))


def test_endless_rows_are_one_permutation_after_another():
    rows = endless_rows("para", 10, 0, 35, seed=3)
    for k in range(3):
        assert sorted(rows[10 * k : 10 * k + 10]) == list(range(10))
    assert len(set(rows[30:].tolist())) == 5
    # shuffled anew when used up
    assert not np.array_equal(rows[:10], rows[10:20])
    for start, count in [(0, 10), (7, 5), (9, 1), (10, 10), (13, 22)]:
        assert np.array_equal(endless_rows("para", 10, start, count, seed=3), rows[start : start + count])


def test_rows_per_epoch_of_the_course_files():
    assert rows_per_epoch(COURSE, "full") == COURSE
    assert rows_per_epoch(COURSE, "equal") == {"sst": 8544, "para": 8544, "sts": 6040}
    proportional = rows_per_epoch(COURSE, "proportional")
    assert (proportional["sst"], proportional["para"]) == (8544, 8544)
    # seventeen parts of 6,040 rows are 355.3 rows: rounded up, so that seventeen epochs see every row
    assert proportional["sts"] == 356


def test_equal_never_asks_for_more_rows_than_there_are():
    assert rows_per_epoch({"sst": 30, "para": 20}, "equal") == {"sst": 30, "para": 20}
    assert rows_per_epoch({"para": 100, "sts": 40}, "equal") == {"para": 40, "sts": 40}
    assert rows_per_epoch({"para": 100}, "equal") == {"para": 100}
    assert rows_per_epoch({"sst": 30, "sts": 40}, "equal") == {"sst": 30, "sts": 40}


def test_full_uses_every_row_of_every_task_in_each_epoch():
    for epoch in range(3):
        rows = epoch_rows(SIZES, "full", epoch, 1.0, seed=0)
        assert {name: sorted(r.tolist()) for name, r in rows.items()} == {n: list(range(s)) for n, s in SIZES.items()}


def test_equal_takes_the_next_rows_of_a_permutation_and_reshuffles_when_used_up():
    """100 rows in epochs of 30: the fourth epoch ends the first pass with its first ten rows."""
    epochs = [epoch_rows(SIZES, "equal", e, 1.0, seed=0)["para"] for e in range(7)]
    assert [len(e) for e in epochs] == [30] * 7
    rows = np.concatenate(epochs)
    assert sorted(rows[:100]) == list(range(100))
    assert sorted(rows[100:200]) == list(range(100))
    assert not np.array_equal(rows[:100], rows[100:200])
    # the small tasks are complete in every epoch
    assert sorted(epoch_rows(SIZES, "equal", 4, 1.0, seed=0)["sst"]) == list(range(30))


def test_proportional_needs_its_number_of_parts_to_see_every_similarity_row():
    epochs = [epoch_rows(SIZES, "proportional", e, 1.0, seed=0)["sts"] for e in range(STS_PARTS)]
    assert [len(e) for e in epochs] == [51 / 17] * 17
    assert sorted(np.concatenate(epochs)) == list(range(51))


@pytest.mark.parametrize("split", ["full", "equal", "proportional"])
@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.1, 1 / 3, 0.07])
def test_every_row_once_before_any_twice_across_fractional_stretches(split, fraction):
    stretches = [epoch_rows(SIZES, split, k * fraction, fraction, seed=5) for k in range(round(3 / fraction))]
    for name, per_epoch in rows_per_epoch(SIZES, split).items():
        if per_epoch * fraction < 1:
            continue
        rows = np.concatenate([stretch[name] for stretch in stretches])
        assert abs(len(rows) - per_epoch * fraction * len(stretches)) <= 1
        for start in range(0, len(rows), SIZES[name]):
            chunk = rows[start : start + SIZES[name]]
            assert len(set(chunk.tolist())) == len(chunk)
        assert np.array_equal(rows, endless_rows(name, SIZES[name], 0, len(rows), seed=5))


def test_a_stretch_has_at_least_one_row_of_every_task():
    rows = epoch_rows(SIZES, "proportional", 0.0, 0.01, seed=0)
    assert [len(r) for r in rows.values()] == [1, 1, 1]


def test_rows_differ_with_seed_and_task_and_not_by_the_call():
    first, again = (epoch_rows({"sst": 50, "sts": 50}, "full", 2, 1.0, seed=1) for _ in range(2))
    assert np.array_equal(first["sst"], again["sst"])
    assert not np.array_equal(first["sst"], first["sts"])
    assert not np.array_equal(first["sst"], epoch_rows({"sst": 50}, "full", 2, 1.0, seed=2)["sst"])


# --- task order ---------------------------------------------------------------------------------------------


def order(sampler, seed=0, steps=STEPS, annealing=0.0):
    return SAMPLERS[sampler](steps, annealing, make_rng(seed, "order"))


@pytest.mark.parametrize("sampler", ["sequential", "round_robin", "random"])
def test_the_complete_orders_use_every_batch_once(sampler):
    found = order(sampler)
    assert sorted(found) == sorted((name, k) for name in STEPS for k in range(STEPS[name]))
    # a task's batches come in their own order
    for name in STEPS:
        assert [k for task, k in found if task == name] == list(range(STEPS[name]))


def test_sequential_ends_one_task_before_the_next():
    assert [task for task, _ in order("sequential")] == ["sst"] * 5 + ["para"] * 12 + ["sts"] * 3


def test_round_robin_takes_turns_until_each_is_used_up():
    names = [task for task, _ in order("round_robin")]
    assert names == ["sst", "para", "sts"] * 3 + ["sst", "para"] * 2 + ["para"] * 7


def test_random_is_seeded_and_mixes():
    names = [task for task, _ in order("random")]
    assert names == [task for task, _ in order("random")]
    assert names != [task for task, _ in order("random", seed=1)]
    assert names != sorted(names, key=list(STEPS).index)


@pytest.mark.parametrize("sampler", ["proportional", "sqrt", "annealed"])
def test_the_sampling_orders_keep_the_steps_and_number_them(sampler):
    found = order(sampler, annealing=0.5)
    assert len(found) == sum(STEPS.values())
    assert found == order(sampler, annealing=0.5)
    assert found != order(sampler, seed=1, annealing=0.5)
    for name in STEPS:
        used = [k for task, k in found if task == name]
        assert used == list(range(len(used)))


def test_alphas_by_hand():
    """Five epochs: alpha 1, .8, .6, .4, .2; one epoch has annealing 0 and so alpha 1."""
    assert [ALPHAS["annealed"](e / 4) for e in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert ALPHAS["annealed"](0) == ALPHAS["proportional"](0.7) == 1.0
    assert ALPHAS["sqrt"](0.7) == 0.5


@pytest.mark.parametrize(
    "sampler, annealing, shares",
    [
        ("proportional", 0.3, (0.9, 0.1)),
        ("sqrt", 0.3, (0.75, 0.25)),
        ("annealed", 0.0, (0.9, 0.1)),
        # 9^.2 = 1.5518
        ("annealed", 1.0, (1.5518 / 2.5518, 1 / 2.5518)),
    ],
)
def test_tasks_are_drawn_in_proportion_to_a_power_of_their_size(sampler, annealing, shares):
    """Nine to one: 9^1 : 1 is .9, 9^.5 : 1 is .75; 20,000 draws have a standard error below .0036."""
    found = [task for task, _ in order(sampler, steps={"a": 18_000, "b": 2_000}, annealing=annealing)]
    assert found.count("a") / len(found) == pytest.approx(shares[0], abs=0.015)


def test_all_tasks_order_has_every_task_in_every_step():
    steps = all_tasks_order({"sst": 2, "para": 5})
    assert steps == [
        [("sst", 0), ("para", 0)],
        [("sst", 1), ("para", 1)],
        [("sst", 2), ("para", 2)],
        [("sst", 3), ("para", 3)],
        [("sst", 4), ("para", 4)],
    ]
