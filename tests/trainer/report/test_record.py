"""The record of a training: whole, checked, and written at once or not at all."""

import dataclasses
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trainer.config import TrainConfig
from trainer.data.tokens import DataReport
from trainer.report.record import (
    FILE,
    Session,
    make_record,
    parse_train_record,
    read_train_record,
    write_train_record,
)


def score(value):
    return SimpleNamespace(
        expected_accept_length=value, top1=[0.5, 0.25], top5=[0.75, math.nan], loss=[2.0, 3.0], tree=[[0]], stats={}
    )


def point(step, value, loss=(2.0, 3.0)):
    return {"step": step, "expected_accept_length": value, "loss": list(loss)}


HISTORY = [point(10, 2.5), point(20, 2.25, (math.inf, 1.0))]


def record(**changes):
    given = {
        "data": {**dataclasses.asdict(DataReport(files=["a.jsonl"], read=9, kept=8)), "held_out": 1},
        "provenance": {"git_sha": "abc", "seed": 0},
        "parameters": 123,
        "steps": 20,
        "tokens": 4000,
        "train_s": 8.0,
        "skipped_updates": 1,
        "best": score(np.float64(2.5)),
        "best_step": 10,
        "checkpoint": Path("runs/a/checkpoint"),
        "weights_sha256": "beef",
        "history": HISTORY,
        "interrupted": False,
        "sessions": [
            Session(first_step=0, last_step=12, provenance={"utc": "then"}),
            {"first_step": 12, "last_step": 20, "provenance": {"utc": "now"}},
        ],
    }
    config = TrainConfig(head="mlp", tree_nodes=16, head_options={"num_depths": 2})
    return make_record(config, **{**given, **changes})


def test_what_is_written_is_what_is_read(tmp_path):
    path = write_train_record(record(), tmp_path)
    assert path == tmp_path / FILE and os.listdir(tmp_path) == [FILE]
    assert read_train_record(path) == record()
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


def test_a_resumed_run_hands_on_the_sessions_of_an_earlier_record(tmp_path):
    earlier = read_train_record(write_train_record(record(), tmp_path))
    later = record(
        steps=30,
        history=[*HISTORY, point(30, 2.75)],
        sessions=[*earlier.sessions, {"first_step": 20, "last_step": 30, "provenance": {}}],
    )
    assert [found.step for found in later.history] == [10, 20, 30]
    assert [session.last_step for session in later.sessions] == [12, 20, 30]


def test_a_run_of_no_time_has_no_speed():
    assert record(train_s=0.0).tokens_per_s is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_step": 21}, r"best\.step 21 lies behind the last of 20 steps"),
        ({"best_step": 21.5}, r"best\.step: Input should be a valid integer"),
        ({"sessions": []}, "sessions: List should have at least 1 item"),
        ({"sessions": [{"first_step": 3, "last_step": 2, "provenance": {}}]}, "last_step 2 lies before first_step 3"),
        ({"tokens": -1}, "tokens: Input should be greater than or equal to 0"),
        ({"best": score(math.nan)}, r"best\.expected_accept_length"),
        ({"data": {"files": {1, 2}}}, "a set cannot be written as JSON"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        record(**changes)


def test_a_failed_write_leaves_the_old_record_and_nothing_beside_it(tmp_path, monkeypatch):
    path = write_train_record(record(), tmp_path)
    before = path.read_bytes()

    def full(number):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_train_record(record(steps=30), tmp_path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"train\.json:1: malformed JSON"),
        ("[]", "is a JSON object, got a list"),
        ('{"kind": "generation"}', "its kind is 'generation', not 'train'"),
        ('{"kind": "train"}', "schema_version is 'missing'"),
        ('{"kind": "train", "schema_version": 1}', r"head: Field required.*and \d+ more"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, text, message):
    path = tmp_path / FILE
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_train_record(path)


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="speed: Extra inputs are not permitted"):
        parse_train_record({**record().model_dump(mode="json"), "speed": 1})
