"""A training's figures as TensorBoard events, written by tensorboardX.

    tensorboard --logdir runs

tensorboardX is needed with --tensorboard alone, and is not loaded without it.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FLUSH_S = 30  # seconds of points that an ended process may take along
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
    """Within, importing ``module`` fails, unless it is loaded already."""
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

    It imports torch where there is one, only to name a type; that would take a second and a second OpenMP.
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
    """The curves of one run in ``directory``, to be closed at its end; a context manager does so.

    first_step: the step that the run goes on from, 0 for a fresh one. Points behind it that an earlier session left in
    the same directory are taken back: TensorBoard forgets them when it reads the purge mark that this session begins
    with. Raises ValueError where tensorboardX is missing and OSError where the directory cannot be written.
    """

    def __init__(self, directory: str | Path, first_step: int = 0):
        # The step in the name: sessions that begin within one second would share a file.
        self.writer = _summary_writer()(
            str(directory), purge_step=first_step + 1, flush_secs=FLUSH_S, filename_suffix=f".{first_step}"
        )

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Write what is left and end."""
        self.writer.close()

    def step(self, step: int, record: dict) -> None:
        """The figures of an optimizer step; ``record`` as the training loop gives it, any key may be missing."""
        for key, name in SCALARS.items():
            self._add(name, record.get(key), step)
        for key in BY_DEPTH:
            self._add_depths(f"train/{key}", record.get(key, ()), step)
        for name, value in record.get("aux", {}).items():
            self._add(f"train/aux/{name}", value, step)

    def score(self, step: int, score) -> None:
        """A score on the held-out text (``trainer.fit.Score``), and what was written so far to the disk."""
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
        """One point; none where the value is no finite number."""
        if isinstance(value, numbers.Real) and math.isfinite(value):
            self.writer.add_scalar(name, float(value), step)
