"""Every schedule ends at its final rate, in long runs and in runs of one step."""

import itertools
from itertools import pairwise

import pytest

from trainer.config import SCHEDULES, TrainConfig
from trainer.optim.schedule import rate


def settings(kind, peak=2e-3, warmup=0.1, final=0.05, decay_share=0.2):
    shape = {"learning_rate": peak, "warmup": warmup, "final_rate": final, "decay_share": decay_share}
    return TrainConfig(schedule=kind, **shape)


def rates(kind, num_steps=100, *shape, **more):
    config = settings(kind, *shape, **more)
    return [rate(config, step, num_steps) for step in range(num_steps)]


# The worked example of the docstring.
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
        ("wsd", [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("constant", [0.5] + [1] * 9),
    ],
)
def test_ten_updates_by_hand(kind, expected):
    assert rates(kind, 10, 1.0, 0.2, 0.0, 0.4) == pytest.approx(expected)


def test_a_cosine_is_halfway_down_in_the_middle_and_flat_at_its_ends():
    got = rates("cosine")
    middle = rate(settings("cosine"), 9 + 90 / 2, 100)
    assert middle == pytest.approx(2e-3 * (1 + 0.05) / 2)
    assert got[9] - got[10] < (got[54] - got[55]) / 20 and got[-2] - got[-1] < (got[54] - got[55]) / 20


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_rate_rises_along_a_line_to_its_peak_and_never_rises_again(kind):
    got = rates(kind)
    assert got[:10] == pytest.approx([2e-4 * step for step in range(1, 11)])
    assert all(a >= b for a, b in pairwise(got[9:]))
    assert got[-1] == pytest.approx(2e-3 if kind == "constant" else 0.05 * 2e-3)
    if kind in ("cosine", "linear"):
        assert all(a > b for a, b in pairwise(got[9:]))


def test_wsd_stays_at_its_peak_until_its_share_begins():
    got = rates("wsd")
    assert got[9:80] == [2e-3] * 71 and got[80] < 2e-3
    falls = [a - b for a, b in pairwise(got[79:])]
    assert falls == pytest.approx([falls[0]] * 20)
    assert rates("wsd", decay_share=1.0) == rates("linear") != rates("constant") == rates("wsd", decay_share=0.0)
    assert rates("wsd", 10, decay_share=0.01)[8:] == pytest.approx([2e-3, 0.05 * 2e-3])  # less than one step


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_rates_of_a_short_run_stay_between_nothing_and_their_peak(kind):
    for num_steps, warmup, decay_share in itertools.product([1, 2, 3, 20], [0.0, 0.05, 0.9], [0.0, 0.2, 1.0]):
        got = rates(kind, num_steps, 1.0, warmup, 0.1, decay_share)
        assert all(0 < each <= 1 for each in got) and max(got) == 1
        falls = kind in ("cosine", "linear") or (kind == "wsd" and decay_share)
        if falls and num_steps > max(1, round(warmup * num_steps)):
            assert got[-1] == pytest.approx(0.1)
