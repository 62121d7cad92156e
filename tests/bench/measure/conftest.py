"""Prompts, the runs of an untrained head, and a complete run of it, shared by the tests of a measurement."""

import pytest

import backbone.model
from backbone.tokenizer import load_tokenizer
from bench.record.schema import Record
from heads.checkpoint import save_checkpoint
from heads.registry import build
from tests.bench.helpers import write_prompts
from tests.bench.measure.runs import TURNS, run


@pytest.fixture(scope="module", autouse=True)
def _one_backbone(one_backbone):
    """All modules here load the same backbone again and again."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the prompts of this file and the runs of an untrained head."""
    folder = tmp_path_factory.mktemp("bench")
    write_prompts(folder / "prompts.jsonl", TURNS)
    frozen = backbone.model.load_backbone(None, "float16")
    head = build("gated_rnn", {"num_depths": 3, "inner_size": 16}, frozen)
    config = {
        "head": "gated_rnn",
        "head_config": {"num_depths": 3, "inner_size": 16},
        "backbone": {"fingerprint": frozen.fingerprint, "path": None},
        "tokenizer": {"fingerprint": load_tokenizer().fingerprint},
        "metrics": {"tree": [[0], [1], [0, 0], [2], [0, 1]], "stats": {"perplexity_before": 3.0}},
        "run": {"steps": 7, "tokens": 700, "train_s": 1.5},
        "trainer": {"seed": 5},
    }
    save_checkpoint(folder / "runs" / "gated_rnn" / "first" / "checkpoint", head, config, {})
    return folder


@pytest.fixture(scope="module")
def complete_run(folder):
    """One run over all prompts: its folder of results and its output."""
    results = folder / "results"
    status, out, err = run(folder, "--head", "gated_rnn", "--nodes", 5, "--out-dir", results)
    assert status == 0, err
    return results, out, err


@pytest.fixture(scope="module")
def record(complete_run):
    return Record.read(complete_run[0] / "gated_rnn.json")
