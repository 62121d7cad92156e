"""What training and calibration promised, beside what was measured.

A train record (``train.json`` of a run, ``trainer.report.record``) names the hash of the weights it saved, a result
that of the weights it measured: equal hashes belong together, wherever the files are. Without a train record, the
checkpoint's own score counts, or the prediction of a calibration (``bench.record.calibration``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
import pandas as pd

from bench.record.schema import Record
from bench.tables.numbers import format_number
from runtime.files.documents import read_json
from trainer.report.record import TrainRecord

TOLERANCE = 0.05  # relative difference between measured and expected accept length that gets no mark


def read_train_records(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, TrainRecord]]]:
    """(the other paths, (path, record) of each train record among them), in order.

    Raises ValueError for a train record that does not fit its schema, and if there is nothing else.
    """
    records = [(path, TrainRecord.read(path)) for path in dict.fromkeys(paths) if _is_train_record(path)]
    found = {path for path, _ in records}
    others = [path for path in paths if path not in found]
    if not others:
        raise ValueError(f"only train records among {len(paths)} file(s); a comparison needs results of bench/run.py")
    return others, records


def _is_train_record(path: str) -> bool:
    """False also for a file that cannot be read: reading it as a result says why."""
    with contextlib.suppress(OSError, ValueError):
        content = read_json(path)
        return isinstance(content, dict) and content.get("kind") == TrainRecord.KIND
    return False


def join(frame: pd.DataFrame, records: Sequence[tuple[str, TrainRecord]]) -> tuple[pd.DataFrame, list[str]]:
    """(the promises, by the result's path; sentences on what is doubtful). Results without a promise have no row.

    steps, train_s: of the complete training; expected: the promised accept length with a tree of ``nodes`` nodes;
    ratio: the measured one over it; source: who promised it; path: of the train record.
    """
    columns = ["steps", "train_s", "expected", "nodes", "source", "path"]
    trained = pd.DataFrame(
        [
            (record.best.weights_sha256, record.steps, record.train_s, record.best.expected_accept_length,
             record.best.tree_nodes, "training", path)
            for path, record in records
        ],
        columns=["weights", *columns],
    ).drop_duplicates("weights")  # fmt: skip
    by_record = frame[["checkpoint_sha256"]].merge(
        trained, how="left", left_on="checkpoint_sha256", right_on="weights"
    ).set_axis(frame.index)  # fmt: skip
    own = frame[["train_steps", "train_s", "checkpoint_accept_length", "checkpoint_nodes"]]
    fits = (frame["nodes"] == frame["checkpoint_nodes"]).fillna(False) & (frame["checkpoint_accept_length"] > 0)
    predicted = frame[["train_steps", "train_s", "predicted_accept_length", "nodes"]]
    sources = [  # the first one that knows counts
        by_record.loc[by_record["source"].notna(), columns],
        own.assign(source="checkpoint", path=None).set_axis(columns, axis=1)[fits],
        predicted.assign(source="calibration", path=None).set_axis(columns, axis=1)[
            frame["predicted_accept_length"].notna()
        ],
    ]
    promises = pd.concat([source.astype(object) for source in sources])
    promises = promises[~promises.index.duplicated()].sort_index()
    promises = promises.astype({"steps": "Int64", "nodes": "Int64", "train_s": float, "expected": float})
    ratio = frame["accept_length"] / promises["expected"].replace(0, np.nan)
    promises.insert(4, "ratio", ratio.loc[promises.index])
    promises = promises.set_axis(frame.loc[promises.index, "path"])

    misses = promises[is_off(promises["ratio"])].join(
        frame.set_index("path")[["label", "accept_length", "nodes"]].rename(columns={"nodes": "decoded"})
    )
    sentences = [_miss(path, row) for path, row in zip(misses.index, misses.itertuples(), strict=True)]
    measured = set(frame["checkpoint_sha256"].dropna())
    sentences += [_unmatched(path, r, frame) for path, r in records if r.best.weights_sha256 not in measured]
    return promises, sentences


def is_off(ratio: pd.Series) -> pd.Series:
    """Whether measurement and promise differ by more than the tolerance."""
    return (ratio - 1).abs() > TOLERANCE


def _miss(path: str, row) -> str:
    trees = "" if row.decoded == row.nodes else f", the one with {row.nodes} nodes and the other with {row.decoded}"
    return (
        f"{row.source} expected {format_number(row.expected)} tokens per pass of {row.label}, "
        f"{format_number(row.accept_length)} were measured ({100 * (row.ratio - 1):+.0f}%){trees}: {path}"
    )


def _unmatched(path: str, record: TrainRecord, frame: pd.DataFrame) -> str:
    """The sentence on a train record whose weights no result measured."""
    run = _run_of(record.best.checkpoint)
    same = frame.loc[frame["checkpoint_path"].map(_run_of, na_action="ignore") == run, "path"]
    if len(same):
        return f"{path}: {', '.join(same)} measured other weights of {run}; one of the two was trained again"
    return f"{path}: no result here measured its weights"


def _run_of(checkpoint: str) -> str:
    """The run's directory of a checkpoint, which results may name without ``checkpoint/``."""
    path = PurePath(checkpoint)
    return str(path.parent if path.name == "checkpoint" else path)


def describe_prediction(record: Record) -> list[str]:
    """Lines that compare a record's prediction with the measurement; none without a prediction."""
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
        lines.append("the calibration is of another machine: only its accept length is a prediction for this one")
    return [f"prediction {record.head}: {line}" for line in lines]
