"""Factories of valid rows and records, so that a test names only what it is about."""

import functools
import json

import pytest

import backbone.model
import runtime
from bench.record.metrics import aggregate
from bench.record.schema import PromptRow, Record
from tests.bench.helpers import CALIBRATED_PATHS, set_fields


def build_row(prompt_id="p0", **changes):
    """A row of depth 2: 10 tokens in 4 passes and 2 s against 10 passes and 4 s; accept length 2.5, speedup 2."""
    fields = {
        "prompt_id": prompt_id,
        "category": "writing",
        "turns": 1,
        "prompt_tokens": 7,
        "tokens": 10,
        "passes": 4,
        "accepted_by_depth": [4, 2],
        "reached_by_depth": [4, 4],
        "accept_length": 2.5,
        "time_s": 2.0,
        "baseline_tokens": 10,
        "baseline_passes": 10,
        "baseline_time_s": 4.0,
        "draft_s": 0.5,
        "verify_s": 1.0,
        "identical": True,
        "finish_reason": "stop",
    }
    return PromptRow(**{**fields, **changes})


def build_record(rows=None, **changes):
    """A valid result as plain data. A change is named by its path, with __ between the parts: data__sha256="..."."""
    rows = [build_row("p0"), build_row("p1", tokens=14, baseline_tokens=14, time_s=3.0)] if rows is None else rows
    metrics, categories = aggregate(rows, num_resamples=50)
    compared = [row for row in rows if row.identical is not None]
    seconds = sum(row.time_s for row in rows)
    record = {
        "schema_version": 1,
        "kind": "generation",
        "status": "complete",
        "head": "gated_rnn",
        "config": {
            "backbone": {
                "path": "assets/tiny-vicuna",
                "fingerprint": "f00d",
                "dtype": "float16",
                "hidden_size": 256,
                "num_layers": 4,
                "vocab_size": 4096,
                "engine": "jittor",
                "storage": "float16",
            },
            "decoding": {
                "greedy": True,
                "max_new_tokens": 64,
                "num_nodes": 64,
                "tree_depth": 2,
                "tree": [[0], [1], [0, 0]],
                "cache_length": 2048,
                "template": "vicuna",
            },
            "head": {"hidden_size": 256},
            "repeats": 1,
        },
        "provenance": {
            "git_sha": "abc",
            "git_dirty": False,
            "command": ["bench/run.py", "--greedy"],
            "utc": "2030-01-01T00:00:00+00:00",
            "device": "cpu",
            "device_name": "a processor",
            "threads": 2,
        },
        "checkpoint": {
            "path": "runs/gated_rnn/a/checkpoint",
            "sha256": "beef",
            "parameters": 123,
            "train_steps": 10,
            "train_tokens": 1000,
            "train_s": 1.5,
            "seed": 0,
        },
        "data": {"path": "prompts/question.jsonl", "sha256": "cafe", "num_prompts": len(rows), "dropped": {}},
        "baseline": {"tokens_per_s": 2.5, "pass_s": 0.4, "total_s": 8.0, "tokens": 24},
        "metrics": metrics,
        "timing": {
            "prefill_s": 1.0,
            "draft_s": 0.25 * seconds,
            "verify_s": 0.5 * seconds,
            "accept_s": 0.125 * seconds,
            "cache_s": 0.0625 * seconds,
            "host_s": 0.0625 * seconds,
            "total_s": 1.0 + seconds,
        },
        "parity": {
            "prompts": len(compared),
            "identical": sum(row.identical for row in compared),
            "first_difference": None,
        },
        "failures": [],
        "categories": categories,
        "per_prompt": rows,
        "head_stats": {"experts": [0.25, 0.75]},
    }
    return json.loads(json.dumps(set_fields(Record.parse(record).model_dump(mode="json"), changes)))


@pytest.fixture
def make_row():
    return build_row


@pytest.fixture
def make_record():
    return build_record


@pytest.fixture
def write_result(tmp_path):
    """Write a valid result into the test's folder; returns its path as text."""

    def write(name, rows=None, **changes):
        path = tmp_path / name
        path.write_text(Record.parse(build_record(rows, **changes)).to_json(), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="module")
def one_backbone():
    """The entries load the same backbone every time; within a module they do so once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone.model, "load_backbone", functools.cache(backbone.model.load_backbone))
        yield


@pytest.fixture
def faster(make_row):
    """The rows of a head that accepts twice as much as the factory's default and takes half the time."""
    return [
        make_row("p0", passes=2, time_s=1.0, reached_by_depth=[2, 2], accepted_by_depth=[2, 2]),
        make_row("p1", tokens=14, baseline_tokens=14, passes=2, time_s=1.5, reached_by_depth=[2, 2],
                 accepted_by_depth=[2, 2]),
    ]  # fmt: skip


@pytest.fixture
def calibration_content():
    """A calibration as plain data: three nodes are fastest."""
    candidates = [
        {
            "tree": tree, "num_nodes": len(tree) + 1, "depth": max(map(len, tree), default=0), "accept_length": length,
            "accept_length_ci": [length - 0.1, length + 0.1], "predicted_s_per_pass": 0.001,
            "measured_s_per_pass": 0.002, "predicted_tokens_per_s": 1e3 * length, "measured_tokens_per_s": 500 * length,
        }
        for tree, length in (([], 1.0), ([[0], [1]], 1.5))
    ]  # fmt: skip
    here = runtime.provenance()
    return {
        "schema_version": 1,
        "kind": "calibration",
        "provenance": {key: here[key] for key in ("device", "device_name", "threads")},
        "subject": {
            "head": "some_head", "head_config": {"num_depths": 2}, "weights_sha256": None,
            "backbone_fingerprint": "f00d", "dtype": "float16",
        },
        "texts": {
            "path": "held out", "sha256": "c0de", "prompts": 3, "texts": 4, "tokens": 50, "max_new_tokens": 12,
            "cache_length": 512, "template": None,
        },
        "acceptance": {
            "positions": 50, "reached": [50, 30], "accepted": [[20] * 10, [3] * 10], "paths": CALIBRATED_PATHS,
            "path_counts": [20, 10, 8, 4, 2],
        },
        "latency": {
            "context": 90, "rows": [1, 64], "verify_s": [0.1, 0.2], "begin_s": 0.0, "widths": [1],
            "draft_s": [[0.1, 0.2]], "rest_s": 0.0, "root_rest_s": 0.0,
        },
        "loop": {"texts": 2, "repeats": 3, "agreeing": 2},
        "autoregressive_tokens_per_s": 600.0,
        "candidates": candidates,
        "chosen": 1,
    }  # fmt: skip
