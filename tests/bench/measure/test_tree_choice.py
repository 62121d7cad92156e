"""Which tree a head is measured with: every way to say it, every way to say it wrong, and what is predicted."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest

import runtime
from bench.measure.calibration import FILE, calibration_path, parse_calibration, read_calibration, write_calibration
from bench.measure.tree_choice import AUTO, check_room, choose_tree, describe_prediction, describe_tree, parse_tree
from bench.record.schema import Record
from decoding.generate import generate, generate_autoregressive
from decoding.tree import Tree, default_tree
from heads.base import Head
from tests.small import small_backbone

PATHS = [[0], [1], [0, 0], [2], [1, 0]]


@pytest.fixture
def content():
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
            "positions": 50, "reached": [50, 30], "accepted": [[20] * 10, [3] * 10], "paths": PATHS,
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


@pytest.fixture
def choose(tmp_path, content):
    """choose(asked, nodes=4, calibration=content, **config) -> (Choice, notes) of a head without a checkpoint."""

    def run(asked, nodes=4, calibration=content, dtype="float16", **config):
        config = {"head": "some_head", "head_config": {"num_depths": 2}, "backbone": {}, **config}
        head = SimpleNamespace(num_depths=2, borrowed=SimpleNamespace(fingerprint="f00d", storage=dtype))
        path = calibration_path(None, "some_head", tmp_path)
        path.unlink(missing_ok=True)
        if calibration is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(calibration))
        notes = []
        return choose_tree(asked, nodes, None, config, head, str(tmp_path), notes.append), notes

    return run


# What --tree says ----------------------------------------------------------------------------------------------------


def test_a_tree_is_named_by_kind_or_by_file(tmp_path, content):
    assert parse_tree("auto") == AUTO
    assert parse_tree("chain:0") == Tree.autoregressive() and parse_tree("chain:3") == Tree.chain(3)
    (tmp_path / "paths.json").write_text("[[0], [1], [1, 0]]")
    assert parse_tree(str(tmp_path / "paths.json")) == Tree.from_paths([[0], [1], [1, 0]])
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    assert parse_tree(str(tmp_path / "calibration.json")) == Tree.from_paths([[0], [1]])


@pytest.mark.parametrize("text", ["chain:-1", "chain:x", "chain:", "chain:1.5", "chain:+2", "chain:²"])
def test_a_chain_takes_a_number(text):
    with pytest.raises(ValueError, match=r"--tree chain:K takes a number of draft tokens from 0, got 'chain:"):
        parse_tree(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[0, 0]]", r"path \[0, 0\] has no parent; add \[0\]"),
        ("[[0], [1, 0, 2], [1]]", r"path \[1, 0, 2\] has no parent; add \[1, 0\]"),
        ("[[0], [1], [0]]", r"path \[0\] is there twice"),
        ("[[0], [-1]]", "must hold ranks"),
        ("[[0], [0.5]]", "must hold ranks"),
        ("[[0], [true]]", "must hold ranks"),
        ("[[0], []]", "empty path"),
        ("[0, 1]", "expected a list of rank paths"),
        ('{"tree": []}', "expected a list of rank paths"),
        ("[[0]", "Expecting"),
    ],
)
def test_a_file_that_holds_no_tree_is_named_with_its_mistake(tmp_path, text, said):
    path = tmp_path / "tree.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"tree\.json: .*{said}"):
        parse_tree(str(path))


def test_a_missing_file_is_answered_with_what_there_is():
    with pytest.raises(ValueError, match=r"--tree takes auto, dynamic, chain:K or .* there is no file 'atuo'"):
        parse_tree("atuo")


def test_a_tree_needs_room_in_the_cache():
    check_room(15, 16)
    with pytest.raises(ValueError, match="a tree of 16 nodes leaves no room for text in a cache of 16 rows"):
        check_room(16, 16)


def test_trees_are_described_in_a_few_words():
    assert describe_tree(Tree.autoregressive()) == "no draft"
    assert describe_tree(Tree.chain(2)) == "chain of 2"
    assert describe_tree(Tree.from_paths(PATHS)) == "6 nodes, depth 2"


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
    ("place", "value", "said", "predicts"),
    [
        (("provenance", "device"), "cuda", "on device cuda, this is cpu", True),
        (("provenance", "device_name"), "another", "on another, this is", True),
        (("provenance", "threads"), 999, "with threads: 999", True),
        (("subject", "dtype"), "float32", "in float32, this run is in float16", True),
        (("subject", "weights_sha256"), "beef", "for other weights or options", False),
        (("subject", "head_config"), {"num_depths": 1}, "for other weights or options", False),
        (("subject", "backbone_fingerprint"), "beef", "on backbone beef, this is f00d", False),
    ],
)
def test_auto_warns_of_a_calibration_made_elsewhere(choose, content, place, value, said, predicts):
    content[place[0]][place[1]] = value
    choice, notes = choose(AUTO, calibration=content)
    assert choice.tree == Tree.from_paths([[0], [1]]) and len(notes) == 1
    assert notes[0].startswith("warning: some_head was calibrated") and said in notes[0]
    assert (choice.prediction is not None) == predicts and not (predicts and choice.prediction.same_machine)


def test_a_budget_takes_the_calibrations_paths_else_the_checkpoints(choose, content):
    stored = {"metrics": {"tree": [[0], [0, 0], [0, 1], [1]]}}
    choice, notes = choose(None, nodes=4, **stored)
    assert choice.tree == Tree.from_paths(PATHS[:3]) and "its calibration's" in notes[0]
    assert choice.prediction is None  # nobody has timed it
    assert choose(None, nodes=3)[0].prediction.accept_length == 1.5  # this one was
    content["subject"]["weights_sha256"] = "beef"
    assert choose(None, nodes=4, calibration=content, **stored)[0].tree == Tree.from_paths(
        stored["metrics"]["tree"][:3]
    )
    assert choose(None, nodes=4, calibration=None, **stored)[0].tree == Tree.from_paths(stored["metrics"]["tree"][:3])
    assert choose(None, nodes=4, calibration=None)[0].tree == default_tree(4, 2)


def test_a_budget_of_one_node_is_the_lone_root_and_too_few_paths_are_said(choose):
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


# The file ------------------------------------------------------------------------------------------------------------


def test_a_calibration_is_read_as_it_was_written(tmp_path, content):
    found = Calibration.parse(content, "here")
    write_calibration(found, tmp_path / "a" / FILE)
    assert Calibration.read(tmp_path / "a" / FILE) == found
    assert found.tree == Tree.from_paths([[0], [1]]) and found.best.accept_length == 1.5
    assert found.candidate(Tree.chain(1)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(kind="generation"), "not a calibration of schema version 1"),
        (lambda c: c.update(schema_version=2), "not a calibration of schema version 1"),
        (lambda c: c.update(chosen=7), "chosen is 7, there are 2 candidates"),
        (lambda c: c.update(more=1), "more"),
        (lambda c: c["candidates"][1].update(tree=[[0, 0]]), "has no parent"),
        (lambda c: c["acceptance"].update(paths=[[1, 0]]), "has no parent"),
        (lambda c: c["latency"].pop("rows"), "latency.rows"),
    ],
)
def test_a_broken_calibration_is_refused_by_name(tmp_path, content, change, said):
    broken = copy.deepcopy(content)
    change(broken)
    path = tmp_path / FILE
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=rf"{FILE}: .*{said}"):
        Calibration.read(path)


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match=FILE):
        Calibration.read(tmp_path / FILE)


# Predicted and measured ----------------------------------------------------------------------------------------------


def test_predictions_are_set_beside_what_was_measured(make_record):
    prediction = {
        "accept_length": 2.0, "accept_length_ci": [1.8, 2.2], "tokens_per_s": 4.0, "autoregressive_tokens_per_s": 2.0,
        "calibration": "here", "prompts_sha256": "c0de", "same_machine": True,
    }  # fmt: skip
    record = Record.parse(make_record(prediction=prediction))
    lines = describe_prediction(record)
    assert len(lines) == 4 and all(line.startswith("prediction gated_rnn: ") for line in lines)
    measured = record.metrics.accept_length
    assert (
        f"accept length 2.00 [1.80, 2.20] predicted, {measured:.2f}: measured / predicted {measured / 2:.2f}"
        in lines[0]
    )
    assert f"measured / predicted {record.baseline.tokens_per_s / 2:.2f}" in lines[2]
    assert f"measured / predicted {record.metrics.speedup / 2:.2f}" in lines[3]
    elsewhere = {**prediction, "same_machine": False, "prompts_sha256": "cafe"}
    told = describe_prediction(Record.parse(make_record(prediction=elsewhere)))
    assert "these very prompts" in told[4] and "another machine's" in told[5]
    assert describe_prediction(Record.parse(make_record())) == []


# A tree of one node --------------------------------------------------------------------------------------------------


class IdleHead(Head):
    """Must not be asked for anything; wants a layer that costs something."""

    Config, layers = SimpleNamespace, (1,)

    def begin(self, features, token_ids, state=None):
        raise AssertionError("a head was begun that has nothing to draft")

    step = begin


def test_a_tree_of_one_node_does_nothing_that_its_twin_does_not(monkeypatch):
    backbone = small_backbone()
    head, calls, right = IdleHead(SimpleNamespace(num_depths=2), backbone), [], backbone.forward
    head.eval()

    def forward(token_ids, **options):
        calls.append((np.shape(token_ids), options["layers"]))
        return right(token_ids, **options)

    monkeypatch.setattr(backbone, "forward", forward)
    prompt = [5, 9, 7]
    alone = generate_autoregressive(backbone, prompt, max_new_tokens=9)
    expected, calls = calls, []
    given = generate(backbone, head, prompt, Tree.autoregressive(), max_new_tokens=9)
    assert given.token_ids == alone.token_ids and given.num_passes == 8 and given.timers.draft_s == 0
    assert calls == expected and all(layers == () for _, layers in calls)
    with pytest.raises(AssertionError, match="nothing to draft"):  # a tree of two does ask
        generate(backbone, head, prompt, Tree.chain(1), max_new_tokens=9)
