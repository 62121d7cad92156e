"""Several ranks train as one: the same weights, every sequence once, and all end when one of them dies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.start.bootstrap import threads_per_rank
from tests.trainer.runs import training_data
from trainer.data.tokens import batches
from trainer.step import split

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "trainer" / "ranks_program.py"
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")


def mpirun(num_ranks, out, *arguments, timeout=240, **options):
    out.mkdir(exist_ok=True)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    words = ["mpirun", *root, "--oversubscribe", "-np", str(num_ranks), sys.executable, str(PROGRAM)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = json.dumps({"save_every": 0, **options})
    return subprocess.run(
        [*words, str(out), options, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def read(out, num_ranks):
    reports = [json.loads((out / f"rank{r}.json").read_text()) for r in range(num_ranks)]
    assert [t["world"] for t in reports] == [num_ranks] * num_ranks
    return reports, [dict(np.load(out / f"rank{r}.npz")) for r in range(num_ranks)]


def train(num_ranks, out, **options):
    done = mpirun(num_ranks, out, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return read(out, num_ranks)


def gap(one, other):
    """Largest difference of a parameter over its largest entry."""
    return max(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max() for name in one)


# Dealing out


def test_the_worked_example_of_split():
    lengths = np.array([0, 0, 0, 0, 0, 4, 0, 9, 6])
    assert split([5, 7, 8], lengths, 2) == [[7], [5, 8]]
    assert split([5, 7, 8], lengths, 1) == [[5, 7, 8]]
    assert split([5, 7], lengths, 3) == [[7], [5], []]


def test_every_sequence_is_dealt_out_once_and_evenly():
    data, _ = training_data()
    for parts in (2, 3, 5):
        for step in batches(data, 160):
            dealt = split(step, data.lengths, parts)
            assert sorted(i for part in dealt for i in part) == sorted(step)
            loads = [int(data.lengths[part].sum()) for part in dealt]
            assert max(loads) - min(loads) <= data.lengths[step].max()


def test_the_cores_are_shared():
    assert threads_per_rank(num_cores=2, allowed=2, num_ranks=3) == 1
    assert threads_per_rank(num_cores=16, allowed=16, num_ranks=4) == 4
    assert threads_per_rank(num_cores=16, allowed=2, num_ranks=4) == 2  # bound by mpirun


# Several processes

HEADS = {
    "gated_rnn": {"head": "gated_rnn", "head_options": {"num_depths": 2, "inner_size": 24}},
    "mlp": {"head": "mlp", "head_options": {"num_depths": 2}, "ema": 0.5},
}


@pytest.mark.mpi
@needs_mpi
@pytest.mark.parametrize("head", HEADS)
def test_two_ranks_give_the_weights_of_one(tmp_path, head):
    """Float32 gradients summed in another order, 12 updates of AdamW: 5e-4 of a parameter's largest entry allowed."""
    reports, weights = {}, {}
    for name, ranks, more in (
        ("one", 1, {}),
        ("two", 2, {}),
        ("two in two passes", 2, {"accumulate": 2}),
        ("other", 2, {"seed": 1}),
    ):
        reports[name], weights[name] = train(ranks, tmp_path / name.replace(" ", "-"), **HEADS[head], **more)
    for name in ("two", "two in two passes"):
        first, second = weights[name]
        assert all(np.array_equal(first[key], second[key]) for key in first)  # both ranks hold the same bits
        assert gap(weights["one"][0], first) < 5e-4
        np.testing.assert_allclose(reports[name][0]["loss"], reports["one"][0]["loss"], atol=2e-3)
        np.testing.assert_allclose(reports[name][0]["top1"], reports["one"][0]["top1"], atol=0.03)
        np.testing.assert_allclose(reports[name][0]["top5"], reports["one"][0]["top5"], atol=0.03)
        assert reports[name][0]["score"] == reports[name][1]["score"]
        assert sorted(reports[name][0]["seen"] + reports[name][1]["seen"]) == sorted(reports["one"][0]["seen"])
    assert gap(weights["one"][0], weights["other"][0]) > 1e-2  # the control


@pytest.mark.mpi
@needs_mpi
def test_three_ranks_lose_and_repeat_nothing_where_the_count_does_not_divide(tmp_path):
    data, _ = training_data()
    steps = len(batches(data, 100))
    assert len(data) % 3 and steps % 3
    reports, weights = train(3, tmp_path / "three", **HEADS["gated_rnn"], tokens_per_step=100, max_steps=steps)
    assert sorted(i for each in reports for i in each["seen"]) == list(range(len(data)))
    assert all(each["seen"] for each in reports)
    one, single = train(1, tmp_path / "one", **HEADS["gated_rnn"], tokens_per_step=100, max_steps=steps)
    assert gap(single[0], weights[0]) < 5e-4 and sorted(one[0]["seen"]) == list(range(len(data)))


@pytest.mark.mpi
@needs_mpi
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("fail", "rank 1: error: rank 1 has had enough"),
        ("bug", "RuntimeError: an error that nobody expected"),
        ("die", "exited on signal 9"),
    ],
)
def test_a_dead_rank_ends_the_run_with_a_message(tmp_path, trouble, message):
    done = mpirun(2, tmp_path / "run", trouble, timeout=120, **HEADS["gated_rnn"])
    assert done.returncode != 0 and message in done.stderr + done.stdout
    assert not (tmp_path / "run" / "rank0.json").exists()
