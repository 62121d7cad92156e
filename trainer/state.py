"""States of a run: all that an exact resumption needs, written atomically and checked when read.

A state is a directory ``states/step-00000250`` with ``head.safetensors`` (parameters and buffers before averaging),
``optimizer.safetensors``, ``average.safetensors`` if the weights are averaged, and ``state.json``, which holds the
counters, the best score so far, the identity of the run, and the hash of every other file.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from heads.checkpoint import check_files, config_digest, load_parameters, save_arrays, save_parameters, signed
from runtime.atomic import atomic_directory, sha256_of
from runtime.files.documents import plain, read_json, write_json
from trainer.config import differences

FORMAT = 1
STATES, META = "states", "state.json"
HEAD, OPTIMIZER, AVERAGE = "head.safetensors", "optimizer.safetensors", "average.safetensors"


@dataclass
class State:
    """A state on disk. meta: the content of state.json; ``progress`` in it: see ``trainer.fit.Run.counters``."""

    directory: Path
    meta: dict

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.meta["progress"]["step"])

    def restore_head(self, head) -> None:
        """Load the head's weights."""
        load_parameters(head, self.directory / HEAD)

    def arrays(self, file: str) -> dict[str, np.ndarray]:
        """What ``Optimizer.state`` or ``Average.state`` gave; file: ``OPTIMIZER`` or ``AVERAGE``."""
        return load_file(self.directory / file)


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
            meta = {"format": FORMAT, "progress": progress, "identity": identity, "files": hashes}
            write_json(partial / META, signed(meta), indent=1)
    except OSError as error:
        states = list_states(out)
        then = f"--resume, from step {_step_of(states[-1])}" if states else "start over: there is no earlier state"
        raise OSError(f"{directory} cannot be written: {error.strerror or error}; mend that, then {then}") from error
    for old in list_states(out)[:-keep]:
        shutil.rmtree(old)
    return directory


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def list_states(out: Path) -> list[Path]:
    """The directories of the states of a run, oldest first."""
    return sorted((p for p in (Path(out) / STATES).glob("step-*") if p.name[5:].isdigit()), key=_step_of)


def newest_state(out: Path) -> State | None:
    """The newest state of a run, None when it has none. Raises ValueError naming a damaged file and what to do."""
    found = list_states(out)
    if not found:
        return None
    directory, path = found[-1], found[-1] / META
    try:
        meta = read_json(path)
        if not isinstance(meta, dict) or meta.get("digest") != config_digest(meta):
            raise ValueError(f"{path} is damaged: its digest does not fit")
        if meta["format"] != FORMAT:
            raise ValueError(f"{path} has format {meta['format']}, this version reads {FORMAT}")
        check_files(directory, meta["files"])
    except (OSError, ValueError) as error:
        earlier = f"resume from step {_step_of(found[-2])}" if len(found) > 1 else "start over"
        raise ValueError(f"{error}; delete {directory} to {earlier}") from error
    return State(directory, meta)


def check_identity(state: State, identity: dict) -> None:
    """Raises ValueError naming everything in which the run of a state differs from this one."""
    then, now = state.meta["identity"], plain(identity)
    found = []
    for part in sorted(set(then) | set(now)):
        before, after = then.get(part), now.get(part)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after)
        elif before != after:
            found.append(f"{part} was {before!r}, is {after!r}")
    if found:
        raise ValueError(f"{state.directory} belongs to another run: {'; '.join(found[:6])}; use the same options")
