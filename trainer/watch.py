"""What a person sees while a head trains: a card before, a progress line during."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import runtime

CONSOLE = Console(stderr=True, highlight=False)


def card(config, backbone, head, report, num_steps: int, out) -> None:
    """Five lines before long work: device, backbone, head, data, destination."""
    c = backbone.config
    lines = (
        f"device    {runtime.device} ({runtime.device_reason})",
        f"backbone  {config.backbone or 'embedded tiny-vicuna'} {backbone.fingerprint}, {c.num_layers} layers, "
        f"{c.hidden_size} wide, {config.dtype}",
        f"head      {config.head}, {head.num_depths} depths, {head.num_parameters / 1e6:.2f} M parameters, float32",
        f"data      {report.summary()}",
        f"run       {num_steps} steps of {config.tokens_per_step} tokens, features {config.features}, into {out}",
    )
    for line in lines:
        CONSOLE.print(line, markup=False, soft_wrap=True)


class Watch:
    """The progress display. Off a terminal it prints a line now and then instead of redrawing one."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=CONSOLE,
            disable=not sys.stderr.isatty(),
        )
        self.training = None

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *error):
        self.progress.stop()

    def cache(self, data):
        """The two callbacks of ``open_cache`` for one part of the data."""
        total = int(data.offsets[-1])
        task = self.progress.add_task("features", total=total, note="tokens")

        def start(path, size: int) -> None:
            CONSOLE.print(f"features  {size / 1e6:.0f} MB go to {path}, once", markup=False, soft_wrap=True)

        return start, lambda count: self.progress.advance(task, count)

    def step(self, step: int, num_steps: int, record: dict) -> None:
        """Show one training step."""
        losses = " ".join(f"{x:.2f}" for x in record.get("loss", []))
        if self.training is None:
            self.training = self.progress.add_task("training", total=num_steps, note="")
        self.progress.update(self.training, completed=step, note=f"loss {losses}")
        if self.progress.disable and (step % max(1, num_steps // 10) == 0):
            CONSOLE.print(f"step {step}/{num_steps} loss {losses}", markup=False)
