"""TensorBoard events: the points read back are those that were written, once each, also in a resumed run."""

import math
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trainer.report.events import Events

ROOT = Path(__file__).resolve().parents[3]


def read_points(directory):
    """{name: {step: value}} as TensorBoard reads it: the files by name; where a session begins at a step, all points
    from that step on are forgotten. Raises where a step has two points."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    points = {}
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        place = 0
        while place < len(data):  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            if event.session_log.status == SessionLog.START:
                points = {name: {s: v for s, v in curve.items() if s < event.step} for name, curve in points.items()}
            for value in event.summary.value:
                curve = points.setdefault(value.tag, {})
                assert event.step not in curve, (value.tag, event.step)
                curve[event.step] = value.simple_value
    return points


def score(value):
    return SimpleNamespace(
        expected_accept_length=value, loss=[2.5, 3.5], top1=[0.5, 0.25], top5=[0.75, math.nan],
        stats={"perplexity": 4.0, "experts": [0.5, 0.5]},
    )  # fmt: skip


def test_the_points_read_back_are_those_given(tmp_path):
    record = {
        "step": 1, "stage": "heads", "rate": 0.5, "grad_norm": np.float32(1.5), "loss": [2.0, 3.0], "top1": [0.5, 0.25],
        "top5": [0.75, 0.5], "aux": {"feature": 0.125}, "tokens": 100, "tokens_per_s": 64.0, "skipped": 0,
        "memory_bytes": 2**30,
    }  # fmt: skip
    with Events(tmp_path / "events") as events:
        events.step(1, record)
        events.step(2, {"step": 2, "loss": [math.nan, 1.0]})
        events.score(2, score(2.25))
    assert read_points(tmp_path / "events") == {
        "train/learning_rate": {1: 0.5},
        "train/grad_norm": {1: 1.5},
        "train/loss/depth1": {1: 2.0},
        "train/loss/depth2": {1: 3.0, 2: 1.0},
        "train/top1/depth1": {1: 0.5},
        "train/top1/depth2": {1: 0.25},
        "train/top5/depth1": {1: 0.75},
        "train/top5/depth2": {1: 0.5},
        "train/aux/feature": {1: 0.125},
        "train/tokens": {1: 100.0},
        "train/tokens_per_s": {1: 64.0},
        "train/skipped_updates": {1: 0.0},
        "train/memory_bytes": {1: 2.0**30},
        "held_out/expected_accept_length": {2: 2.25},
        "held_out/loss/depth1": {2: 2.5},
        "held_out/loss/depth2": {2: 3.5},
        "held_out/top1/depth1": {2: 0.5},
        "held_out/top1/depth2": {2: 0.25},
        "held_out/top5/depth1": {2: 0.75},
        "held_out/stats/perplexity": {2: 4.0},
    }


@pytest.mark.parametrize(("first_step", "expected"), [(3, {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}), (0, {1: 10.0, 2: 20.0})])
def test_a_resumed_run_replaces_the_points_after_its_first_step_and_a_new_one_all(tmp_path, first_step, expected):
    with Events(tmp_path) as events:
        for step in range(1, 6):
            events.step(step, {"rate": float(step)})
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / first.name.replace("tfevents.", "tfevents.0"))  # as of an earlier time
    with Events(tmp_path, first_step=first_step) as events:
        for step in list(expected)[first_step:]:
            events.step(step, {"rate": 10.0 * step})
    assert read_points(tmp_path) == {"train/learning_rate": expected}


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"--tensorboard needs tensorboardX .*pip install tensorboardX"):
        Events(tmp_path)


def test_neither_torch_nor_jittor_is_loaded(tmp_path):
    program = (
        "import sys; from trainer.report.events import Events\n"
        "assert 'tensorboardX' not in sys.modules\n"
        f"Events({str(tmp_path)!r}).__exit__()\n"
        "print([name for name in ('torch', 'jittor') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
