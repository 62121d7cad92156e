"""The record of a training, ``train.json`` in the run's directory: what was trained, on what, how long and how well.

``best.weights_sha256`` is the hash that a result of ``bench/run.py`` gives of the weights it measured, so that
``bench/compare.py`` can join the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from runtime.files.documents import plain
from runtime.records import Amount, Count, FileRecord, Model, Rate

FILE = "train.json"


class Best(Model):
    """The saved checkpoint. expected_accept_length: tokens per pass with a tree of ``tree_nodes`` nodes, root included;
    top1, top5: shares per depth; loss: nats per depth; null at a depth without a label. checkpoint: its directory;
    weights_sha256: ``heads.checkpoint.weights_sha256`` of it."""

    step: Count
    expected_accept_length: Amount
    top1: list[Rate | None]
    top5: list[Rate | None]
    loss: list[float | None]
    tree_nodes: Count
    checkpoint: str
    weights_sha256: str


class ScorePoint(Model):
    """One score on the held-out text. loss: nats per depth."""

    step: Count
    expected_accept_length: Amount
    loss: list[float | None]


class Session(Model):
    """One start or resumption. first_step: steps done before it; last_step: those done when it ended; provenance: of
    its process, see ``runtime.provenance``."""

    first_step: Count
    last_step: Count
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _is_ordered(self):
        if self.last_step < self.first_step:
            raise ValueError(f"last_step {self.last_step} is before first_step {self.first_step}")
        return self


class TrainRecord(FileRecord):
    """A training. config: the resolved options, the head's under ``head_options``; provenance: of the process that
    ended it. data: the counts of the text that was read (``DataReport``) and how it was split. parameters: of the head.
    steps, tokens, train_s: summed over all sessions; skipped_updates: updates skipped because they were not
    finite. interrupted: Ctrl-C or a sweep's pruner ended it before its last step."""

    KIND: ClassVar[str] = "train"

    schema_version: Literal[1]
    kind: Literal["train"]
    head: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    data: dict[str, Any]
    parameters: Count
    steps: Count
    tokens: Count
    train_s: Amount
    tokens_per_s: Amount | None
    skipped_updates: Count
    best: Best
    history: list[ScorePoint]
    interrupted: bool
    sessions: Annotated[list[Session], Field(min_length=1)]

    @model_validator(mode="after")
    def _best_is_a_step_of_the_run(self):
        if self.best.step > self.steps:
            raise ValueError(f"best.step {self.best.step} is after the last of {self.steps} steps")
        return self


def make_record(
    config,
    result,
    *,
    data: Mapping[str, Any],
    provenance: Mapping[str, Any],
    parameters: int,
    checkpoint: str | Path,
    weights_sha256: str,
) -> TrainRecord:
    """The record of a finished run, from its TrainConfig, its ``trainer.fit.FitResult`` and fields of TrainRecord and
    Best. Numbers that are not finite become null. Raises ValueError naming what does not fit."""
    best = {name: getattr(result.best, name) for name in ("expected_accept_length", "top1", "top5", "loss")}
    best |= {"step": result.best_step, "tree_nodes": config.tree_nodes}
    record = {
        "schema_version": TrainRecord.VERSION,
        "kind": TrainRecord.KIND,
        "head": config.head,
        "config": dataclasses.asdict(config),
        "provenance": provenance,
        "data": data,
        "parameters": parameters,
        "steps": result.steps,
        "tokens": result.tokens,
        "train_s": result.train_s,
        "tokens_per_s": result.tokens / result.train_s if result.train_s > 0 else None,
        "skipped_updates": result.skipped,
        "best": {**best, "checkpoint": checkpoint, "weights_sha256": weights_sha256},
        "history": result.history,
        "interrupted": result.interrupted,
        "sessions": result.sessions,
    }
    return TrainRecord.parse(plain(record), "the record of the training")
