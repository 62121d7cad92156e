"""What training promised, beside what a measurement found: joins train records with results.

A train record (``train.json`` of a run, ``trainer.report.record``) names the hash of the weights it kept, a result that
of the weights it measured; equal hashes belong together, wherever the files lie. A result of a calibrated tree brings a
promise of its own, see ``bench.measure.calibration``, which counts where there is no train record.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from bench.record.schema import Record
from bench.tables.summary import Result, format_number
from trainer.report.record import TrainRecord

TOLERANCE = 0.05  # by which the measured accept length may miss the expected one and go unmarked


@dataclass(frozen=True)
class Training:
    """What is known of the training of a result's head. steps, train_s: of the whole run; expected: the accept length
    that is promised, in tokens per pass, with a tree of ``nodes`` nodes, root included; ratio: the measured one over
    it, None where none was measured. source: who promised it. path: the train record, None without one."""

    steps: int | None
    train_s: float | None
    expected: float
    nodes: int
    ratio: float | None
    source: str
    path: str | None

    @property
    def is_off(self) -> bool:
        """Whether promise and measurement differ by more than the tolerance."""
        return self.ratio is not None and abs(self.ratio - 1) > TOLERANCE


def read_train_records(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, TrainRecord]]]:
    """(the other paths, (path, record) of each train record among them), in order.

    Raises ValueError for a train record that does not fit its schema, and when there is nothing else.
    """
    records = [(path, TrainRecord.read(path)) for path in dict.fromkeys(paths) if _kind(path) == TrainRecord.KIND]
    found = {path for path, _ in records}
    others = [path for path in paths if path not in found]
    if not others:
        raise ValueError(f"only train records among {len(paths)} file(s); a comparison needs results of bench/run.py")
    return others, records


def _kind(path: str) -> object:
    """What a JSON file says it is; None for one that says nothing or cannot be read: whoever reads it will say so."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    return content.get("kind") if isinstance(content, dict) else None


def join(
    results: Sequence[Result], records: Sequence[tuple[str, TrainRecord]]
) -> tuple[dict[str, Training], list[str]]:
    """The training of each result by the result's path, where it is known, and sentences on what is doubtful."""
    by_weights = {record.best.weights_sha256: (path, record) for path, record in reversed(records)}
    found: dict[str, Training] = {}
    used: set[str] = set()
    for result in results:
        checkpoint = result.record.checkpoint
        if checkpoint and checkpoint.sha256 in by_weights:
            path, record = by_weights[checkpoint.sha256]
            used.add(checkpoint.sha256)
            found[result.path] = _promised_by_training(result.record, path, record)
        elif checkpoint and checkpoint.expected_accept_length and _same_budget(result.record):
            found[result.path] = _promised_by_checkpoint(result.record)
        elif result.record.prediction:
            found[result.path] = _promised_by_calibration(result.record)
    sentences = [_miss(result, found[result.path]) for result in results if _is_off(found.get(result.path))]
    for path, record in records:
        if record.best.weights_sha256 not in used:
            sentences.append(_unmatched(path, record, results))
    return found, sentences


def _promised_by_training(measured: Record, path: str, record: TrainRecord) -> Training:
    best = record.best
    ratio = _ratio(measured.metrics.accept_length, best.expected_accept_length)
    return Training(record.steps, record.train_s, best.expected_accept_length, best.tree_nodes, ratio, "training", path)


def _same_budget(measured: Record) -> bool:
    """Whether a tree of the size that the checkpoint was scored with was decoded with."""
    return measured.config.decoding.num_nodes == measured.checkpoint.tree_nodes


def _promised_by_checkpoint(measured: Record) -> Training:
    own = measured.checkpoint
    ratio = _ratio(measured.metrics.accept_length, own.expected_accept_length)
    expected, nodes = own.expected_accept_length, own.tree_nodes or 0
    return Training(own.train_steps, own.train_s, expected, nodes, ratio, "checkpoint", None)


def _promised_by_calibration(measured: Record) -> Training:
    expected, checkpoint = measured.prediction.accept_length, measured.checkpoint
    return Training(
        checkpoint.train_steps if checkpoint else None,
        checkpoint.train_s if checkpoint else None,
        expected,
        measured.config.decoding.num_nodes,
        _ratio(measured.metrics.accept_length, expected),
        "calibration",
        None,
    )


def _ratio(measured: float | None, expected: float) -> float | None:
    return None if measured is None or not expected else measured / expected


def _is_off(training: Training | None) -> bool:
    return training is not None and training.is_off


def _miss(result: Result, training: Training) -> str:
    """The sentence on a promise that was not kept; a tree of another size may be all there is to it."""
    nodes = result.record.config.decoding.num_nodes
    trees = "" if nodes == training.nodes else f", the one with {training.nodes} nodes and the other with {nodes}"
    return (
        f"{training.source} expected {format_number(training.expected)} tokens a pass of {result.label}, "
        f"{format_number(result.record.metrics.accept_length)} were measured ({100 * (training.ratio - 1):+.0f}%)"
        f"{trees}: {result.path}"
    )


def _unmatched(path: str, record: TrainRecord, results: Sequence[Result]) -> str:
    """The sentence on a train record whose weights no result measured."""
    place = _place(record.best.checkpoint)
    same = [r.path for r in results if r.record.checkpoint and _place(r.record.checkpoint.path) == place]
    if same:
        return f"{path}: {', '.join(same)} measured other weights of {place}; it was trained again since one of them"
    return f"{path}: no result here measured its weights"


def _place(checkpoint: str) -> str:
    """The run's directory of a checkpoint, which results may name without ``checkpoint/``."""
    path = PurePath(checkpoint)
    return str(path.parent if path.name == "checkpoint" else path)
