"""The record of a training: its content, its checks, and what a reader refuses."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trainer.config import TrainConfig
from trainer.data.conversations import DataReport
from trainer.report.record import FILE, Session, TrainRecord, make_record


def score(value):
    return SimpleNamespace(
        expected_accept_length=value, top1=[0.5, 0.25], top5=[0.75, math.nan], loss=[2.0, 3.0], tree=[[0]], stats={}
    )


def point(step, value, loss=(2.0, 3.0)):
    return {"step": step, "expected_accept_length": value, "loss": list(loss)}


HISTORY = [point(10, 2.5), point(20, 2.25, (math.inf, 1.0))]
SESSIONS = [
    Session(first_step=0, last_step=12, provenance={"utc": "then"}),
    {"first_step": 12, "last_step": 20, "provenance": {"utc": "now"}},
]


def record(data=None, **changes):
    result = {
        "best": score(np.float64(2.5)),
        "best_step": 10,
        "steps": 20,
        "tokens": 4000,
        "train_s": 8.0,
        "skipped": 1,
        "history": HISTORY,
        "interrupted": False,
        "sessions": SESSIONS,
    }
    return make_record(
        TrainConfig(head="mlp", tree_nodes=16, head_options={"num_depths": 2}),
        SimpleNamespace(**{**result, **changes}),
        data=data or {**dataclasses.asdict(DataReport(files=["a.jsonl"], read=9, kept=8)), "held_out": 1},
        provenance={"git_sha": "abc", "seed": 0},
        parameters=123,
        checkpoint=Path("runs/a/checkpoint"),
        weights_sha256="beef",
    )


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / FILE
    record().write(path)
    assert TrainRecord.read(path) == record()
    written = json.loads(path.read_text())
    assert (written["kind"], written["schema_version"], written["head"]) == ("train", 1, "mlp")
    assert written["config"]["head_options"] == {"num_depths": 2} and written["data"]["kept"] == 8
    assert (written["tokens_per_s"], written["skipped_updates"], written["interrupted"]) == (500.0, 1, False)
    assert written["best"] == {
        "step": 10, "expected_accept_length": 2.5, "top1": [0.5, 0.25], "top5": [0.75, None], "loss": [2.0, 3.0],
        "tree_nodes": 16, "checkpoint": "runs/a/checkpoint", "weights_sha256": "beef",
    }  # fmt: skip
    assert written["history"] == [
        {"step": 10, "expected_accept_length": 2.5, "loss": [2.0, 3.0]},
        {"step": 20, "expected_accept_length": 2.25, "loss": [None, 1.0]},
    ]
    assert [(s["first_step"], s["last_step"], s["provenance"]["utc"]) for s in written["sessions"]] == [
        (0, 12, "then"),
        (12, 20, "now"),
    ]
    assert record(train_s=0.0).tokens_per_s is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_step": 21}, r"best\.step 21 is after the last of 20 steps"),
        ({"best_step": 21.5}, r"best\.step: Input should be a valid integer"),
        ({"sessions": []}, "sessions: List should have at least 1 item"),
        ({"sessions": [{"first_step": 3, "last_step": 2, "provenance": {}}]}, "last_step 2 is before first_step 3"),
        ({"tokens": -1}, "tokens: Input should be greater than or equal to 0"),
        ({"best": score(math.nan)}, r"best\.expected_accept_length"),
    ],
)
def test_invalid_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        record(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "generation"}', "its kind is 'generation', not 'train'"),
        ('{"kind": "train"}', "schema_version is 'missing'"),
        ('{"kind": "train", "schema_version": 1}', r"head: Field required.*and \d+ more"),
    ],
)
def test_a_file_that_is_not_a_record_is_refused(tmp_path, text, message):
    path = tmp_path / FILE
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainRecord.read(path)
    with pytest.raises(ValueError, match="speed: Extra inputs are not permitted"):
        TrainRecord.parse({**record().model_dump(mode="json"), "speed": 1})
