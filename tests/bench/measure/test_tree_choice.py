"""Which tree a head is measured with, and what a calibration predicts of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import bench.measure.tree_choice
from bench.measure.tree_choice import choose_tree, read_tree_file
from bench.record.calibration import FILE, calibration_path
from decoding.generate import generate, generate_autoregressive
from decoding.options import AUTO
from decoding.tree import Tree, default_tree
from heads.registry import build
from tests.bench.helpers import CALIBRATED_PATHS as PATHS
from tests.small import small_backbone


@pytest.fixture
def choose(tmp_path, monkeypatch, calibration_content):
    """choose(asked, nodes=4, calibration=..., **config) -> (Choice, notes) of a head without a checkpoint."""

    def run(asked, nodes=4, calibration=calibration_content, dtype="float16", **config):
        config = {"head": "some_head", "head_config": {"num_depths": 2}, "backbone": {}, **config}
        head = SimpleNamespace(num_depths=2, borrowed=SimpleNamespace(fingerprint="f00d", storage=dtype))
        path = calibration_path(None, "some_head", tmp_path)
        path.unlink(missing_ok=True)
        if calibration is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(calibration))
        notes = []
        monkeypatch.setattr(bench.measure.tree_choice, "note", notes.append)
        return choose_tree(asked, nodes, None, config, head, str(tmp_path)), notes

    return run


def test_a_tree_file_may_be_a_calibration(tmp_path, calibration_content):
    (tmp_path / "calibration.json").write_text(json.dumps(calibration_content))
    assert read_tree_file(tmp_path / "calibration.json") == Tree.from_paths([[0], [1]])
    for paths in ([[0], [1], [1, 0]], []):
        (tmp_path / "paths.json").write_text(json.dumps(paths))
        assert read_tree_file(tmp_path / "paths.json") == Tree.from_paths(paths)


# Whose tree ----------------------------------------------------------------------------------------------------------


def test_auto_takes_the_calibrated_tree_and_its_prediction(choose):
    choice, notes = choose(AUTO)
    assert choice.tree == Tree.from_paths([[0], [1]]) and notes == []
    found = choice.prediction
    assert (found.accept_length, found.tokens_per_s, found.autoregressive_tokens_per_s) == (1.5, 750.0, 600.0)
    assert found.same_machine and found.prompts_sha256 == "c0de" and found.calibration.endswith(FILE)


def test_auto_without_a_calibration_names_the_command(choose):
    with pytest.raises(ValueError, match=r"not calibrated: no .*; run python bench/calibrate\.py --head some_head"):
        choose(AUTO, calibration=None)


@pytest.mark.parametrize(
    ("place", "value", "reason", "predicts"),
    [
        (("provenance", "threads"), 999, "with threads: 999", True),
        (("subject", "dtype"), "float32", "in float32, this run is in float16", True),
        (("subject", "weights_sha256"), "beef", "for other weights or options", False),
        (("subject", "backbone_fingerprint"), "beef", "on backbone beef, this is f00d", False),
    ],
)
def test_auto_warns_of_a_calibration_made_elsewhere(choose, calibration_content, place, value, reason, predicts):
    calibration_content[place[0]][place[1]] = value
    choice, notes = choose(AUTO, calibration=calibration_content)
    assert choice.tree == Tree.from_paths([[0], [1]]) and len(notes) == 1
    assert notes[0].startswith("warning: some_head was calibrated") and reason in notes[0]
    assert (choice.prediction is not None) == predicts and not (predicts and choice.prediction.same_machine)


def test_a_budget_takes_the_calibrations_paths_else_the_checkpoints(choose, calibration_content):
    stored = {"metrics": {"tree": [[0], [0, 0], [0, 1], [1]]}}
    choice, notes = choose(None, nodes=4, **stored)
    assert choice.tree == Tree.from_paths(PATHS[:3]) and "shaped by its calibration" in notes[0]
    assert choice.prediction is None  # it was not timed
    assert choose(None, nodes=3)[0].prediction.accept_length == 1.5  # this one was
    calibration_content["subject"]["weights_sha256"] = "beef"
    assert choose(None, nodes=4, calibration=calibration_content, **stored)[0].tree == Tree.from_paths(
        stored["metrics"]["tree"][:3]
    )
    assert choose(None, nodes=4, calibration=None, **stored)[0].tree == Tree.from_paths(stored["metrics"]["tree"][:3])
    assert choose(None, nodes=4, calibration=None)[0].tree == default_tree(4, 2)


def test_a_budget_of_one_node_is_the_lone_root_and_too_few_paths_are_noted(choose):
    assert choose(None, nodes=1)[0].tree == Tree.autoregressive()
    choice, notes = choose(None, nodes=9)
    assert choice.tree.num_nodes == 6 and "6 nodes instead of 9" in notes[0]


def test_a_tree_that_was_asked_for_is_taken_and_predicted_where_it_was_timed(choose):
    assert choose(Tree.chain(2))[0] == choose(Tree.chain(2), calibration=None)[0]
    assert choose(Tree.from_paths([[0], [1]]))[0].prediction.tokens_per_s == 750.0
    assert choose(Tree.autoregressive())[0].prediction.tokens_per_s == 500.0


@pytest.mark.parametrize("stored", [[[0, 0]], ["a"], [3]])
def test_stored_paths_that_make_no_tree_are_refused(choose, stored):
    with pytest.raises(ValueError, match="the checkpoint of some_head holds no usable tree"):
        choose(None, nodes=2, calibration=None, metrics={"tree": stored})


# A tree of one node --------------------------------------------------------------------------------------------------


def test_a_tree_of_one_node_runs_what_autoregressive_decoding_runs(monkeypatch):
    backbone = small_backbone()
    head, calls, right = build("eagle3", {"num_depths": 2}, backbone), [], backbone.forward
    head.begin = lambda *arguments: pytest.fail("a head with nothing to draft was begun")

    def forward(token_ids, **options):
        calls.append((np.shape(token_ids), options["layers"]))
        return right(token_ids, **options)

    monkeypatch.setattr(backbone, "forward", forward)
    alone, expected = generate_autoregressive(backbone, [5, 9, 7], max_new_tokens=9), list(calls)
    calls.clear()
    given = generate(backbone, head, [5, 9, 7], Tree.autoregressive(), max_new_tokens=9)
    assert given.token_ids == alone.token_ids and given.num_passes == 8 and given.timers.draft_s == 0
    assert head.layers and calls == expected and all(layers == () for _, layers in calls)
    with pytest.raises(pytest.fail.Exception, match="nothing to draft"):  # with two nodes the head is begun
        generate(backbone, head, [5, 9, 7], Tree.chain(1), max_new_tokens=9)
