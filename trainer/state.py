"""States of a run: all that an exact resumption needs, written atomically and checked when read.

A state is a directory ``states/step-00000250`` with ``head.safetensors`` (parameters and buffers before averaging),
``optimizer.safetensors``, ``average.safetensors`` if the weights are averaged, and ``state.json``, which holds the
counters, the best score so far, the identity of the run, and the hash of every other file.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from backbone.files.lazy import check_finite
from heads.checkpoint import (
    check_files,
    check_hashes,
    config_digest,
    load_arrays,
    load_parameters,
    save_arrays,
    save_parameters,
    signed,
)
from runtime.atomic import atomic_directory, sha256_of
from runtime.files.documents import identity as identity_text
from runtime.files.documents import plain, read_json, write_json
from runtime.files.shown import shown
from runtime.records import Amount, Count, Model, Rate, explain
from trainer.config import differences
from trainer.report.record import ScorePoint, Session

STATES, META = "states", "state.json"
HEAD, OPTIMIZER, AVERAGE = "head.safetensors", "optimizer.safetensors", "average.safetensors"


FOLDER = re.compile(r"step-([0-9]{8,18})")


class BestScore(Model):
    """A ``trainer.scoring.Score``; null stands for a depth without a label."""

    expected_accept_length: Amount
    top1: list[Rate | None]
    top5: list[Rate | None]
    loss: list[float | None]
    tree: list[list[Count]]
    stats: dict[str, Any]


class Progress(Model):
    """See ``trainer.fit.Run.counters``."""

    step: Count
    tokens: Count
    skipped: Count
    skipped_in_row: Count
    best_step: Count
    history: list[ScorePoint]
    sessions: list[Session]
    train_s: Amount
    best: BestScore | None


class Meta(Model):
    """The content of state.json. files: sha256 by name; digest: of all the rest."""

    format: Literal[1]
    progress: Progress
    identity: dict[str, Any]
    files: dict[str, str]
    digest: str


@dataclass
class State:
    """A state on disk. meta: the content of state.json, as ``Meta`` describes it."""

    directory: Path
    meta: dict

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.meta["progress"]["step"]

    def restore_head(self, head) -> None:
        """Load the head's weights."""
        load_parameters(head, self.directory / HEAD)

    def arrays(self, file: str) -> dict[str, np.ndarray]:
        """What ``Optimizer.state`` or ``Average.state`` gave; file: ``OPTIMIZER`` or ``AVERAGE``."""
        return load_arrays(self.directory / file)


def save_state(
    out: Path, head, optimizer: dict, average: dict | None, progress: dict, identity: dict, keep: int
) -> Path:
    """Write the state of a step under ``out / "states"`` and remove all but the ``keep`` newest ones.

    optimizer, average: arrays by name; progress: counters, JSON-ready; identity: what ``check_identity`` compares.
    Raises OSError naming the directory when the disk is full; the earlier states are then intact.
    """
    directory = Path(out) / STATES / f"step-{progress['step']:08d}"
    try:
        with atomic_directory(directory) as partial:
            save_parameters(head, partial / HEAD)
            save_arrays(optimizer, partial / OPTIMIZER)
            if average is not None:
                save_arrays(average, partial / AVERAGE)
            hashes = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
            meta = {"format": 1, "progress": progress, "identity": identity, "files": hashes}
            write_json(partial / META, signed(meta), indent=1)
    except OSError as error:
        states = list_states(out)
        then = f"--resume, from step {_step_of(states[-1])}" if states else "start over: there is no earlier state"
        raise OSError(f"{directory} cannot be written: {error.strerror or error}; mend that, then {then}") from error
    for old in list_states(out)[:-keep]:
        shutil.rmtree(old)
    return directory


def _step_of(directory: Path) -> int:
    return int(FOLDER.fullmatch(directory.name)[1])


def list_states(out: Path) -> list[Path]:
    """The directories of the states of a run, oldest first."""
    return sorted((path for path in (Path(out) / STATES).glob("step-*") if FOLDER.fullmatch(path.name)), key=_step_of)


def newest_state(out: Path) -> State | None:
    """The newest state of a run, None when it has none. Raises ValueError naming a damaged file, or an array that is
    not finite, and what to do."""
    found = list_states(out)
    if not found:
        return None
    directory, path = found[-1], found[-1] / META
    try:
        meta = read_json(path)
        if not isinstance(meta, dict) or meta.get("digest") != config_digest(meta):
            raise ValueError(f"{path} is damaged: its digest does not fit")
        meta = plain(meta)  # older ones hold NaN
        check_meta(meta, path)
        check_files(directory, meta["files"])
        for file in meta["files"]:
            for name, array in load_arrays(directory / file).items():
                check_finite(f"{directory / file}: {name}", array)
    except (OSError, ValueError) as error:
        earlier = f"resume from step {_step_of(found[-2])}" if len(found) > 1 else "start over"
        raise ValueError(f"{error}; delete {directory} to {earlier}") from error
    return State(directory, meta)


def check_meta(meta: dict, path: Path) -> None:
    """Raises ValueError naming what in a state.json is not that of a state of its step."""
    try:
        progress = Meta.model_validate_json(identity_text(meta)).progress
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from error
    if progress.step != _step_of(path.parent) or progress.best_step > progress.step:
        raise ValueError(f"{path} is of step {progress.step}, best {progress.best_step}; its folder names another")
    check_hashes(meta["files"], str(path))


def check_identity(state: State, identity: dict) -> None:
    """Raises ValueError naming everything in which the run of a state differs from this one."""
    then, now = state.meta["identity"], plain(identity)
    found = []
    for part in sorted(set(then) | set(now)):
        before, after = then.get(part), now.get(part)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after)
        elif before != after:
            found.append(f"{part} was {shown(before)}, is {shown(after)}")
    if found:
        raise ValueError(f"{state.directory} belongs to another run: {'; '.join(found[:6])}; use the same options")
