"""Which tree a head is measured with, and what is predicted of it: --tree, --nodes, calibrations and checkpoints.

    --tree auto       the tree that bench/calibrate.py found fastest for this head on this machine
    --tree dynamic    shaped anew in every pass, by the head's confidence; --nodes says how large
    --tree chain:3    three tokens one behind the other; chain:0 drafts nothing
    --tree FILE       a JSON list of rank paths, or a calibration, whose tree is taken
    --nodes 16        the best shape of so many nodes: by the head's calibration, else by its checkpoint

A prediction goes into the record where the calibration has timed the tree that is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.measure.calibration import (
    KIND,
    Calibration,
    Subject,
    calibration_path,
    of_other_head,
    of_other_machine,
    parse_calibration,
    read_calibration,
)
from bench.record.schema import Prediction, Record
from bench.tables.summary import format_number
from decoding.tree import DynamicTree, Tree, default_tree

AUTO, CHAIN, DYNAMIC = "auto", "chain:", "dynamic"
WIDTH = 8  # nodes a dynamic tree expands at each depth, and their candidates

Note = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """A head's tree, and what its calibration predicts of it; None where that does not know this tree."""

    tree: Tree | DynamicTree
    prediction: Prediction | None = None


def parse_tree(text: str) -> Tree | str:
    """What --tree says: a tree, AUTO or DYNAMIC. ValueError names what is wrong, OSError an unreadable file."""
    if text in (AUTO, DYNAMIC):
        return text
    if text.startswith(CHAIN):
        count = text.removeprefix(CHAIN)
        if not (count.isascii() and count.isdigit()):
            raise ValueError(f"--tree chain:K takes a number of draft tokens from 0, got {text!r}")
        return Tree.chain(int(count))
    if not Path(text).exists():
        raise ValueError(
            f"--tree takes {AUTO}, {DYNAMIC}, {CHAIN}K or a JSON file of rank paths; there is no file {text!r}"
        )
    return read_tree(text)


def read_tree(path: str) -> Tree:
    """The tree of a file: a list of rank paths, or a calibration. Raises ValueError naming the file, OSError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON and text that is not UTF-8
        raise ValueError(f"{path}: {error}") from error
    if isinstance(content, dict) and content.get("kind") == KIND:
        return parse_calibration(content, path).tree
    try:
        if not isinstance(content, list) or not all(isinstance(each, list) for each in content):
            raise ValueError("expected a list of rank paths, such as [[0], [1], [0, 0]]")
        return Tree.from_paths(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_room(num_nodes: int, cache_length: int) -> None:
    """Raises ValueError when a tree of ``num_nodes`` nodes fills the cache."""
    if num_nodes >= cache_length:
        raise ValueError(f"a tree of {num_nodes} nodes leaves no room for text in a cache of {cache_length} rows")


def subject_of(directory: Path | None, config: dict, backbone) -> Subject:
    """What a calibration of this head would name as its subject. directory: of the checkpoint, None without one."""
    from heads.checkpoint import weights_sha256

    return Subject(
        head=config["head"],
        head_config=config["head_config"],
        weights_sha256=weights_sha256(directory) if directory else None,
        backbone_fingerprint=backbone.fingerprint,
        dtype=backbone.storage,
    )


def choose_tree(
    asked: Tree | str | None,
    nodes: int,
    directory: Path | None,
    config: dict,
    head,
    runs: str,
    note: Note,
    min_confidence: float = 0.0,
) -> Choice:
    """The tree to measure a head with, and its prediction.

    asked: what ``parse_tree`` gave; None: ``nodes`` decides. Notes say what is doubtful. Raises ValueError for AUTO
    without a calibration, for a broken one, and for a checkpoint whose stored paths make no tree.
    """
    import runtime

    if asked == DYNAMIC:
        return Choice(dynamic_tree(nodes, head, min_confidence))
    name, path = config["head"], calibration_path(directory, config["head"], runs)
    calibration = read_calibration(path) if path.exists() else None
    if calibration is None:
        if asked == AUTO:
            which = f"--checkpoint {directory}" if directory else f"--head {name}"
            raise ValueError(f"{name} is not calibrated: no {path}; run python bench/calibrate.py {which}")
        return Choice(asked or stored_tree(config, head.num_depths, nodes, note))
    backbone = head.borrowed
    other_head = of_other_head(calibration, subject_of(directory, config, backbone))
    other_machine = of_other_machine(calibration, backbone.storage, runtime.provenance())
    if asked == AUTO:
        for reason in filter(None, (other_head, other_machine)):
            note(f"warning: {name} was calibrated {reason}; run bench/calibrate.py again")
        tree = calibration.tree
    elif asked is None and other_head is None:
        tree = budget_tree(calibration.acceptance.paths, nodes, head.num_depths, name, note)
        note(f"{name}: the shape of its tree is its calibration's, {path}")
    else:
        tree = asked or stored_tree(config, head.num_depths, nodes, note)
    return Choice(tree, None if other_head else predict(calibration, tree, str(path), same_machine=not other_machine))


def dynamic_tree(nodes: int, head, min_confidence: float) -> DynamicTree:
    """As deep as the head and the nodes go, and ``WIDTH`` wide, or as wide as its vocabulary. ValueError for too many
    nodes."""
    return DynamicTree(nodes, min(head.num_depths, nodes - 1), min(WIDTH, head.num_draftable), min_confidence)


def shape_fields(tree: Tree | DynamicTree) -> dict:
    """What ``config.decoding`` of a record says of it."""
    sizes = {"num_nodes": tree.num_nodes, "tree_depth": tree.depth}
    if isinstance(tree, DynamicTree):
        return {**sizes, "tree": None, "tree_width": tree.width, "min_confidence": tree.min_confidence}
    return {**sizes, "tree": tree.paths}


def stored_tree(config: dict, num_depths: int, nodes: int, note: Note) -> Tree:
    """The tree of ``nodes`` nodes that the checkpoint's held-out ranks call for; the default one where it has none.

    Notes when the checkpoint knows fewer paths. Raises ValueError for stored paths that make no tree.
    """
    try:
        return budget_tree(config.get("metrics", {}).get("tree"), nodes, num_depths, config["head"], note)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the checkpoint of {config['head']} holds no usable tree: {error}") from error


def budget_tree(paths: list[list[int]] | None, nodes: int, num_depths: int, name: str, note: Note) -> Tree:
    """The tree of the first ``nodes`` - 1 paths; the default one where there are none."""
    if nodes == 1 or not paths:
        return default_tree(nodes, num_depths)
    if len(paths) < nodes - 1:
        note(f"warning: {name} stores {len(paths)} tree paths: {len(paths) + 1} nodes instead of {nodes}")
    return Tree.from_paths(paths[: nodes - 1])


def predict(calibration: Calibration, tree: Tree, path: str, same_machine: bool) -> Prediction | None:
    """What the calibration says of this tree; None where it has not timed it."""
    found = calibration.candidate(tree)
    if found is None:
        return None
    return Prediction(
        accept_length=found.accept_length,
        accept_length_ci=found.accept_length_ci,
        tokens_per_s=found.measured_tokens_per_s,
        autoregressive_tokens_per_s=calibration.autoregressive_tokens_per_s,
        calibration=path,
        prompts_sha256=calibration.texts.sha256,
        same_machine=same_machine,
    )


def describe_prediction(record: Record) -> list[str]:
    """Lines that set a record's prediction beside what was measured; none where it has no prediction."""
    expected, found, lines = record.prediction, record.metrics, []
    if expected is None:
        return []
    alone = record.baseline.tokens_per_s if record.baseline else None
    speedup = expected.tokens_per_s / expected.autoregressive_tokens_per_s
    figures = [
        ("accept length", expected.accept_length, expected.accept_length_ci, found.accept_length),
        ("tokens/s", expected.tokens_per_s, None, found.tokens_per_s),
        ("autoregressive tokens/s", expected.autoregressive_tokens_per_s, None, alone),
        ("speedup", speedup, None, found.speedup),
    ]
    for name, predicted, interval, measured in figures:
        if measured is not None and predicted > 0:
            ratio = f"measured / predicted {measured / predicted:.2f}"
            lines.append(f"{name} {format_number(predicted, interval)} predicted, {format_number(measured)}: {ratio}")
    if expected.prompts_sha256 == record.data.sha256:
        lines.append("the prediction was made on these very prompts: that it holds shows little")
    if not expected.same_machine:
        lines.append("the calibration is another machine's: only its accept length is a prediction for this one")
    return [f"prediction {record.head}: {line}" for line in lines]


def describe_tree(tree: Tree) -> str:
    """``16 nodes, depth 4``, ``chain of 3`` or ``no draft``."""
    if tree.depth == 0:
        return "no draft"
    if tree == Tree.chain(tree.depth):
        return f"chain of {tree.depth}"
    return f"{tree.num_nodes} nodes, depth {tree.depth}"
