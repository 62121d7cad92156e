"""The record of a training, ``train.json`` in the run's directory: what was trained, on what, how far and how well.

Of the same make as a result of ``bench/run.py``: one JSON object, units in the keys, ``null`` for unknown, unknown keys
refused, provenance inside. ``best.weights_sha256`` is the hash that a result gives of the weights it measured, so that
``bench/compare.py`` finds the two together.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = 1
KIND = "train"
FILE = "train.json"

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Best(_Model):
    """The kept checkpoint. expected_accept_length: tokens per pass with a tree of ``tree_nodes`` nodes, root included;
    top1, top5: shares per depth; loss: nats per depth; null at a depth without a label. checkpoint: its directory;
    weights_sha256: ``heads.checkpoint.weights_sha256`` of it."""

    step: Count
    expected_accept_length: Amount
    top1: list[Share | None]
    top5: list[Share | None]
    loss: list[float | None]
    tree_nodes: Count
    checkpoint: str
    weights_sha256: str


class ScorePoint(_Model):
    """One score on the held-out text. loss: nats per depth."""

    step: Count
    expected_accept_length: Amount
    loss: list[float | None]


class Session(_Model):
    """One start or resume. first_step: steps done before it; last_step: those done when it ended; provenance: of its
    process, see ``runtime.provenance``."""

    first_step: Count
    last_step: Count
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _goes_forward(self):
        if self.last_step < self.first_step:
            raise ValueError(f"last_step {self.last_step} lies before first_step {self.first_step}")
        return self


class TrainRecord(_Model):
    """A training. config: the resolved options, the head's under ``head_options``; provenance: of the process that
    ended it. data: what became of the text that was read (``trainer.data.tokens.DataReport``) and how it was split.
    parameters: of the head. steps, tokens, train_s: of the whole run, sessions summed; skipped_updates: steps whose
    update was not finite and left out. interrupted: Ctrl-C or a sweep's pruner ended it before its last step."""

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
            raise ValueError(f"best.step {self.best.step} lies behind the last of {self.steps} steps")
        return self


def make_record(
    config,
    *,
    data: Mapping[str, Any],
    provenance: Mapping[str, Any],
    parameters: int,
    steps: int,
    tokens: int,
    train_s: float,
    skipped_updates: int,
    best,
    best_step: int,
    checkpoint: str | Path,
    weights_sha256: str,
    history: Sequence[Mapping[str, Any]],
    interrupted: bool,
    sessions: Sequence[Mapping[str, Any] | Session],
) -> TrainRecord:
    """The record of a run from what its end knows.

    config: TrainConfig. data: the DataReport and what else is known of the text. parameters: of the head. steps,
    tokens, train_s, skipped_updates: summed over the sessions. best, best_step: the Score of the kept checkpoint and
    its step. checkpoint, weights_sha256: where that lies, and the hash of its weights. history: {"step",
    "expected_accept_length", "loss"} of every score, oldest first. sessions: one Session, or its fields, per start or
    resume.

    Figures that are not finite become null. Raises ValueError naming what does not fit.
    """
    return parse_train_record(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "head": config.head,
            "config": dataclasses.asdict(config),
            "provenance": provenance,
            "data": data,
            "parameters": parameters,
            "steps": steps,
            "tokens": tokens,
            "train_s": train_s,
            "tokens_per_s": tokens / train_s if train_s > 0 else None,
            "skipped_updates": skipped_updates,
            "best": {
                "step": best_step,
                "expected_accept_length": best.expected_accept_length,
                "top1": best.top1,
                "top5": best.top5,
                "loss": best.loss,
                "tree_nodes": config.tree_nodes,
                "checkpoint": checkpoint,
                "weights_sha256": weights_sha256,
            },
            "history": history,
            "interrupted": interrupted,
            "sessions": sessions,
        },
        "the record of the training",
    )


def parse_train_record(data: Mapping[str, Any] | TrainRecord, where: str | Path = "train record") -> TrainRecord:
    """A checked record from plain data. Raises ValueError naming ``where`` and the fields that do not fit."""
    if isinstance(data, TrainRecord):
        return data
    try:
        return TrainRecord.model_validate_json(json.dumps(_plain(data), allow_nan=False))
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(error)}") from error
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def read_train_record(path: str | Path) -> TrainRecord:
    """Read ``train.json``. Raises ValueError naming the file and what is wrong with it, OSError when it cannot be
    read."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a train record is a JSON object, got a {type(data).__name__}")
    if data.get("kind") != KIND:
        raise ValueError(f"{path}: its kind is {data.get('kind', 'missing')!r}, not {KIND!r}")
    if data.get("schema_version") != SCHEMA_VERSION:
        found = data.get("schema_version", "missing")
        raise ValueError(f"{path}: schema_version is {found!r}; this version of the code reads {SCHEMA_VERSION}")
    return parse_train_record(data, path)


def write_train_record(record: TrainRecord, directory: str | Path) -> Path:
    """Write ``train.json`` into a run's directory, whole or not at all; returns its path. Raises OSError."""
    path = Path(directory) / FILE
    partial = path.with_name(f".{FILE}.{os.getpid()}.partial")
    content = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _plain(value: Any) -> Any:
    """``value`` of types that JSON knows; numbers that are not finite become None. Raises TypeError for the rest."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def _explain(error: ValidationError, most: int = 3) -> str:
    """The first problems of a validation error on one line, each with its field."""
    problems = [
        f"{'.'.join(map(str, problem['loc'])) or 'record'}: {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors()[:most]
    ]
    rest = error.error_count() - most
    return "; ".join(problems) + (f"; and {rest} more" if rest > 0 else "")
