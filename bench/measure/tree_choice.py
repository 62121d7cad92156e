"""Which tree a head is measured with, and what its calibration predicts: --tree, --nodes, calibrations, checkpoints.

    --tree auto       the tree that bench/calibrate.py found fastest for this head on this machine
    --tree dynamic    shaped anew in every pass, by the head's confidence; --nodes says how large
    --tree chain:3    three tokens, each after the other; chain:0 drafts nothing
    --tree FILE       a JSON list of rank paths, or a calibration, whose tree is taken
    --nodes 16        the best shape of this many nodes: from the head's calibration, else from its checkpoint

A record holds a prediction if the calibration has timed the tree that is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import runtime
from bench.record.calibration import Calibration, Subject, calibration_path, of_other_head, of_other_machine
from bench.record.schema import Prediction
from bench.tables.terminal import note
from decoding.options import AUTO, DYNAMIC, read_tree
from decoding.tree import DynamicTree, Tree, default_tree
from runtime.files.documents import read_json

WIDTH = 8  # nodes a dynamic tree expands at each depth, and their candidates


@dataclass(frozen=True)
class Choice:
    """A head's tree, and what its calibration predicts of it; None if that has not timed this tree."""

    tree: Tree | DynamicTree
    prediction: Prediction | None = None


def read_tree_file(path: str) -> Tree:
    """The tree of a file: a list of rank paths, or a calibration. Raises ValueError naming the file, OSError."""
    content = read_json(path)
    is_calibration = isinstance(content, dict) and content.get("kind") == Calibration.KIND
    return Calibration.read(path).tree if is_calibration else read_tree(path)


def subject_of(directory: Path | None, config: dict, backbone) -> Subject:
    """The subject of a calibration of this head. directory: of the checkpoint, None without one."""
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
    min_confidence: float = 0.0,
) -> Choice:
    """The tree to measure a head with, and its prediction.

    asked: of ``decoding.options.parse_tree``; None: ``nodes`` decides. Notes what is doubtful. Raises ValueError for
    too many nodes, for AUTO without a calibration, for a broken one and for stored paths that make no tree.
    """
    if asked == DYNAMIC:
        depth, width = min(head.num_depths, nodes - 1), min(WIDTH, head.num_draftable)
        return Choice(DynamicTree(nodes, depth, width, min_confidence))
    name, path = config["head"], calibration_path(directory, config["head"], runs)
    calibration = Calibration.read(path) if path.exists() else None
    if calibration is None:
        if asked == AUTO:
            which = f"--checkpoint {directory}" if directory else f"--head {name}"
            raise ValueError(f"{name} is not calibrated: no {path}; run python bench/calibrate.py {which}")
        return Choice(asked or stored_tree(config, head.num_depths, nodes))
    backbone = head.borrowed
    other_head = of_other_head(calibration, subject_of(directory, config, backbone))
    other_machine = of_other_machine(calibration, backbone.storage, runtime.provenance())
    if asked == AUTO:
        for reason in filter(None, (other_head, other_machine)):
            note(f"warning: {name} was calibrated {reason}; run bench/calibrate.py again")
        tree = calibration.tree
    elif asked is None and other_head is None:
        tree = budget_tree(calibration.acceptance.paths, nodes, head.num_depths, name)
        note(f"{name}: its tree is shaped by its calibration, {path}")
    else:
        tree = asked or stored_tree(config, head.num_depths, nodes)
    return Choice(tree, None if other_head else predict(calibration, tree, str(path), same_machine=not other_machine))


def shape_fields(tree: Tree | DynamicTree) -> dict:
    """Its part of ``config.decoding`` in a record."""
    sizes = {"num_nodes": tree.num_nodes, "tree_depth": tree.depth}
    if isinstance(tree, DynamicTree):
        return {**sizes, "tree": None, "tree_width": tree.width, "min_confidence": tree.min_confidence}
    return {**sizes, "tree": tree.paths}


def stored_tree(config: dict, num_depths: int, nodes: int) -> Tree:
    """The best tree of ``nodes`` nodes by the checkpoint's held-out ranks; the default one if it stores none.

    Notes if the checkpoint stores fewer paths. Raises ValueError for stored paths that make no tree.
    """
    try:
        return budget_tree(config.get("metrics", {}).get("tree"), nodes, num_depths, config["head"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"the checkpoint of {config['head']} holds no usable tree: {error}") from error


def budget_tree(paths: list[list[int]] | None, nodes: int, num_depths: int, name: str) -> Tree:
    """The tree of the first ``nodes`` - 1 paths; the default one if there are none."""
    if nodes == 1 or not paths:
        return default_tree(nodes, num_depths)
    if len(paths) < nodes - 1:
        note(f"warning: {name} stores {len(paths)} tree paths: {len(paths) + 1} nodes instead of {nodes}")
    return Tree.from_paths(paths[: nodes - 1])


def predict(calibration: Calibration, tree: Tree, path: str, same_machine: bool) -> Prediction | None:
    """The calibration's figures of this tree; None if it was not timed."""
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
