"""The display of a training: a card before it; during it a live table on a terminal, otherwise a line at intervals.

All of it goes to stderr; stdout is for results.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.table import Table
from rich.text import Text

import runtime

CONSOLE = Console(stderr=True, highlight=False)
SMOOTHED = 20  # steps that a training figure is the mean of
REFRESH_S = 0.25  # seconds between redraws: one takes 3 ms, which is 1% of a core
STATE = {  # figures of a step's record, as they are shown
    "tokens_per_s": lambda value: f"{value:,.0f} tokens/s",
    "rate": lambda value: f"rate {value:.2e}",
    "memory_bytes": lambda value: f"{value / 1e9:.2f} GB",
    "skipped": lambda value: f"skipped {value}",
}


def card(config, backbone, head, report, num_steps: int, out) -> None:
    """Five lines before long work: device, backbone, head, data, destination."""
    c = backbone.config
    lines = (
        f"device    {runtime.device} ({runtime.device_reason})",
        f"backbone  {config.backbone or 'embedded tiny-vicuna'} {backbone.fingerprint}, {c.num_layers} layers, "
        f"{c.hidden_size} wide, {backbone.storage}",
        f"head      {config.head}, {head.num_depths} depths, {head.num_parameters / 1e6:.2f} M parameters, float32",
        f"data      {report.summary()}",
        f"run       {num_steps} steps of {config.tokens_per_step} tokens, features {config.features}, into {out}",
    )
    CONSOLE.print("\n".join(lines), markup=False, soft_wrap=True)


class Smoothed:
    """The mean of each depth's figure over the last steps, without those that are not finite if others are."""

    def __init__(self, length: int = SMOOTHED):
        self.rows: deque[list[float]] = deque(maxlen=length)

    def add(self, row: Sequence[float] | None) -> None:
        """Add one step's figures by depth, if it has any. A stage with another number of depths starts over."""
        if row is None:
            return
        if self.rows and len(self.rows[0]) != len(row):
            self.rows.clear()
        self.rows.append(list(row))

    def means(self) -> list[float]:
        """Worked example: [2, 4] and [4, nan] give [3, 4]."""
        found = []
        for values in zip(*self.rows, strict=True):
            finite = [value for value in values if math.isfinite(value)]
            found.append(sum(finite) / len(finite) if finite else math.nan)
        return found


class Watch:
    """The display of one training: live on a terminal that can move its cursor, otherwise in lines.

    num_steps: of the run; first_step: where it resumes, 0 for a new one. console: by default stderr. quiet: show
    nothing, on all ranks but one. Drawing happens inside the calls, at most four times a second and without a thread,
    so that nothing is written in the middle of another line.
    """

    def __init__(self, num_steps: int, first_step: int = 0, console: Console | None = None, quiet: bool = False):
        self.console = Console(quiet=True) if quiet else console or CONSOLE
        self.live_wanted = not quiet and self.console.file.isatty() and not self.console.is_dumb_terminal
        self.num_steps, self.first_step = num_steps, first_step
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
        )
        # The speed of the last two minutes: the first steps compile kernels.
        self.progress = Progress(
            *columns, console=self.console, auto_refresh=False, expand=True, speed_estimate_period=120
        )
        self.training: Task | None = None
        self.figures = {name: Smoothed() for name in ("loss", "top1", "top5")}
        self.record: dict = {}
        self.last_score = None
        self.best = ""  # the best score, in words
        self.live: Live | None = None
        self.drawn = -math.inf

    def __enter__(self):
        if self.live_wanted:
            # Stdout is redirected only where it is the same terminal.
            self.live = Live(
                get_renderable=self._view, console=self.console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()
            )
            self.live.start()
        return self

    def __exit__(self, *error):
        if self.live:
            self.live.refresh()
            self.live.stop()
            self.live = None

    def say(self, text: str) -> None:
        """Print one line, above the table where there is one."""
        self.console.print(" ".join(text.splitlines()), markup=False, highlight=False, soft_wrap=True)

    # Features ---------------------------------------------------------------------------------------------------------

    def cache(self, data, name: str = "features"):
        """The two callbacks of ``open_cache`` for one part of the data: start(path, bytes) and advance(tokens)."""
        task = self._add_task(name, int(data.offsets[-1]))

        def start(path, size: int) -> None:
            self.say(f"features  writing {size / 1e6:.0f} MB to {path}, once")
            self._draw()

        def advance(count: int) -> None:
            self._update(task, task.completed + count, "tokens")

        return start, advance

    # Training ---------------------------------------------------------------------------------------------------------

    def step(self, step: int, num_steps: int, record: dict) -> None:
        """Show one optimizer step. step: steps done. Any key of ``record`` may be missing."""
        self.num_steps = num_steps
        if self.training is None:
            for task in self.progress.tasks:
                self.progress.update(task.id, visible=False)
            self.training = self._add_task("training", num_steps, min(self.first_step, step - 1))
        self.record.update(record)
        for name, figure in self.figures.items():
            figure.add(record.get(name))
        if "stage" in record:
            self.progress.update(self.training.id, description=record["stage"])
        self._update(self.training, step, "")
        tenth = step >= num_steps or 10 * step // num_steps > 10 * (step - 1) // num_steps
        if not self.live and tenth:
            self.say(self._line(step))

    def score(self, step: int, score, best: bool) -> None:
        """Show a score on the held-out text (``trainer.scoring.Score``). best: it is the best so far."""
        self.last_score = score
        if best:
            self.best = f"{score.expected_accept_length:.3f} at step {step}"
        if self.live:
            self._draw()
            return
        words = f"step {step}/{self.num_steps} held out: expected accept length {score.expected_accept_length:.3f}"
        words += " (best)" if best else f" (best {self.best})" if self.best else ""
        self.say(f"{words} {_by_depth(score.loss, score.top1)} top-5 {_shares(score.top5)}%")

    def _line(self, step: int) -> str:
        loss, top1 = self.figures["loss"].means(), self.figures["top1"].means()
        parts = [f"step {step}/{self.num_steps}", _by_depth(loss, top1) if loss else "", *self._state()]
        return " ".join(filter(None, [*parts, _left(self.training) if step < self.num_steps else ""]))

    def _state(self) -> list[str]:
        """The figures of the last record, besides its losses."""
        return [text(self.record[name]) for name, text in STATE.items() if name in self.record]

    # Drawing ----------------------------------------------------------------------------------------------------------

    def _add_task(self, name: str, total: int, completed: int = 0) -> Task:
        number = self.progress.add_task(name, total=total, completed=completed, count="", left="")
        return self.progress.tasks[self.progress.task_ids.index(number)]

    def _update(self, task: Task, completed: int, unit: str) -> None:
        self.progress.update(task.id, completed=completed)
        task.fields.update(count=f"{completed:,}/{task.total:,} {unit}".rstrip(), left=_left(task))
        if self.live and (time.monotonic() - self.drawn >= REFRESH_S or completed >= task.total):
            self._draw()

    def _draw(self) -> None:
        if self.live:
            self.live.refresh()
            self.drawn = time.monotonic()

    def _view(self) -> Group:
        """The live display: bars, the table, two lines, none wider than the terminal."""
        score, lines = self.last_score, []
        figures = [figure.means() for figure in self.figures.values()]
        held_out = [score.loss, score.top1, score.top5] if score else [[], [], []]
        if score:
            best = f", best {self.best}" if self.best else ""
            lines.append(f"expected accept length {score.expected_accept_length:.3f}{best}")
        lines += ["  ".join(self._state())] if self._state() else []
        depths = max(map(len, figures + held_out))
        tables = [_table(depths, figures, held_out)] if depths else []
        return Group(self.progress, *tables, *(Text(line, no_wrap=True, overflow="crop") for line in lines))


def _table(depths: int, training: list[list[float]], held_out: list[Sequence[float]]) -> Table:
    """One row per depth: loss, top-1 and top-5 of training, then of the held-out text."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("depth", "loss", "top-1", "top-5", "held out: loss", "top-1", "top-5"):
        table.add_column(name, justify="right", no_wrap=True, overflow="crop")
    for depth in range(depths):
        cells = [str(depth + 1)]
        for loss, *shares in (training, held_out):
            cells.append(_figure(loss[depth], "{:.3f}") if depth < len(loss) else "-")
            cells += [_figure(100 * share[depth], "{:.1f}%") if depth < len(share) else "-" for share in shares]
        table.add_row(*cells)
    return table


def _left(task: Task) -> str:
    """``0:12:00 left``, empty while it is unknown."""
    seconds = task.time_remaining
    return "" if seconds is None or task.finished else f"{timedelta(seconds=int(seconds))} left"


def _by_depth(losses: Sequence[float], top1: Sequence[float]) -> str:
    return f"loss {' '.join(_figure(value, '{:.2f}') for value in losses)} top-1 {_shares(top1)}%"


def _shares(values: Sequence[float]) -> str:
    return " ".join(_figure(100 * value, "{:.0f}") for value in values)


def _figure(value: float, text: str) -> str:
    """The figure of a depth, "-" where no position had a label."""
    return text.format(value) if math.isfinite(value) else "-"
