"""Which heads a run measures: trained ones, ones that need no training, and none of another backbone."""

import json
import shutil

import backbone.model
from bench.record.schema import Record
from heads.checkpoint import save_checkpoint
from heads.registry import build
from tests.bench.measure.runs import error_of, run


def test_with_one_file_and_no_trained_head_the_baseline_is_measured_alone(folder, tmp_path):
    out_file = tmp_path / "out.json"
    status, out, err = run(folder, "--runs", tmp_path / "none", "--num-prompts", 1, "--out", out_file)
    assert status == 0 and "python train.py --head NAME" in err
    assert json.loads(out.splitlines()[-1])["head"] == Record.read(out_file).head == "autoregressive"


def test_a_bare_run_measures_the_trained_heads_and_those_that_need_no_training(folder, tmp_path):
    status, out, err = run(folder, "--num-prompts", 1, "--out-dir", tmp_path)
    assert status == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gated_rnn.json", "prompt_lookup.json"]
    floor = Record.read(tmp_path / "prompt_lookup.json")
    assert Record.parse(json.loads(out.splitlines()[-1])) == floor
    assert floor.checkpoint is None and floor.config.head == {"num_depths": 8, "max_ngram": 3}
    assert floor.config.decoding.num_nodes == 16 and (floor.parity.prompts, floor.parity.identical) == (1, 1)
    assert Record.read(tmp_path / "gated_rnn.json").checkpoint is not None


def test_a_head_that_needs_no_training_is_measured_with_a_checkpoint_and_without(folder, tmp_path):
    one = ("--head", "prompt_lookup", "--num-prompts", 1, "--nodes", 3, "--out", tmp_path / "out.json")
    status, _, err = run(folder, "--runs", tmp_path / "runs", *one)
    assert status == 0, err
    assert Record.read(tmp_path / "out.json").checkpoint is None
    frozen = backbone.model.load_backbone(None, "float16")
    directory = tmp_path / "runs" / "prompt_lookup" / "a" / "checkpoint"
    config = {
        "head": "prompt_lookup",
        "head_config": {"num_depths": 3, "max_ngram": 2},
        "backbone": {"fingerprint": frozen.fingerprint, "path": None},
        "metrics": {"tree": [[0], [0, 0]]},
    }
    save_checkpoint(directory, build("prompt_lookup", config["head_config"], frozen), config, {})
    status, _, err = run(folder, "--runs", tmp_path / "runs", *one)
    assert status == 0, err
    record = Record.read(tmp_path / "out.json")
    assert record.checkpoint.parameters == 0 and record.config.head["max_ngram"] == 2
    assert record.config.decoding.tree == [[0], [0, 0]]
    config["backbone"]["fingerprint"] = "0123456789abcdef"
    (directory / "config.json").write_text(json.dumps(config))
    status, _, err = run(folder, "--runs", tmp_path / "runs", *one)
    assert status == 0 and "it is of another backbone; prompt_lookup is measured with its defaults" in err
    assert Record.read(tmp_path / "out.json").checkpoint is None


def test_a_checkpoint_of_another_backbone_is_refused_or_skipped(folder, tmp_path):
    directory = tmp_path / "runs" / "gated_rnn" / "a" / "checkpoint"
    shutil.copytree(folder / "runs" / "gated_rnn" / "first" / "checkpoint", directory)
    config = json.loads((directory / "config.json").read_text())
    del config["digest"]  # as a checkpoint of an earlier version has none
    config["backbone"]["fingerprint"] = "0123456789abcdef"
    (directory / "config.json").write_text(json.dumps(config))
    answer = error_of(folder, "--checkpoint", directory, "--out", tmp_path / "out.json")
    assert "was trained on backbone 0123456789abcdef" in answer
    status, out, err = run(folder, "--runs", tmp_path / "runs", "--num-prompts", 1, "--out", tmp_path / "out.json")
    assert status == 0 and "trained on another backbone" in err
    assert json.loads(out.splitlines()[-1])["head"] == "autoregressive"
