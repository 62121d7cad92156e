"""A training's figures as TensorBoard events (``tensorboard --logdir runs``), written by tensorboardX.

tensorboardX is needed only with --tensorboard, and not loaded without.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FLUSH_S = 30  # seconds of points that a killed process may lose
SCALARS = {  # key of a step's record -> name of its curve
    "rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens",
    "tokens_per_s": "train/tokens_per_s",
    "skipped": "train/skipped_updates",
    "memory_bytes": "train/memory_bytes",
}
BY_DEPTH = ("loss", "top1", "top5")


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Within, importing ``module`` fails, unless it is already loaded."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]


def _summary_writer():
    """tensorboardX's SummaryWriter. Raises ValueError where the package is missing.

    It imports an installed torch, only to name a type; that would take a second, and load a second OpenMP.
    """
    try:
        with _hidden("torch"):
            from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--tensorboard needs tensorboardX ({error}): pip install tensorboardX==2.6.5, or leave --tensorboard out"
        ) from error
    return SummaryWriter


class Events:
    """The curves of one run in ``directory``, as a context manager.

    first_step: the step that the run is resumed from, 0 for a new one. Later points, which an earlier session left in
    the same directory, disappear: TensorBoard drops them when it reads the purge mark at the start of this session.
    Raises ValueError where tensorboardX is missing and OSError where the directory cannot be written.
    """

    def __init__(self, directory: str | Path, first_step: int = 0):
        # The step is in the name, because sessions that begin within one second would share a file.
        self.writer = _summary_writer()(
            str(directory), purge_step=first_step + 1, flush_secs=FLUSH_S, filename_suffix=f".{first_step}"
        )

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *error) -> None:
        self.writer.close()

    def step(self, step: int, record: dict) -> None:
        """Write the figures of an optimizer step; any key of the training loop's ``record`` may be missing."""
        for key, name in SCALARS.items():
            self._add(name, record.get(key), step)
        for key in BY_DEPTH:
            self._add_depths(f"train/{key}", record.get(key, ()), step)
        for name, value in record.get("aux", {}).items():
            self._add(f"train/aux/{name}", value, step)

    def score(self, step: int, score) -> None:
        """Write a score on the held-out text (``trainer.scoring.Score``), and flush."""
        self._add("held_out/expected_accept_length", score.expected_accept_length, step)
        for key in BY_DEPTH:
            self._add_depths(f"held_out/{key}", getattr(score, key), step)
        for name, value in score.stats.items():
            self._add(f"held_out/stats/{name}", value, step)
        self.writer.flush()

    def _add_depths(self, name: str, values: Sequence[float], step: int) -> None:
        for depth, value in enumerate(values, start=1):
            self._add(f"{name}/depth{depth}", value, step)

    def _add(self, name: str, value, step: int) -> None:
        """Write one point, if the value is a finite number."""
        if isinstance(value, numbers.Real) and math.isfinite(value):
            self.writer.add_scalar(name, float(value), step)
