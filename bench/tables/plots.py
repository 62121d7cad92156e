"""The pictures of a comparison: how much each head accepts, and what each of its passes costs.

The comparison. Left: accept length by category with bootstrap intervals. Right: seconds per decoding pass, stacked by
phase, beside the autoregressive pass. A head pays off where the left grows faster than the right.

The frontier: accept length against draft time, a point per head. Verifying costs the same for every head of one tree
budget, so a head below and to the right of another has no case on that machine.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot, which seaborn imports: a file is drawn, no window is opened

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from bench.record.metrics import accept_length, comparable_rows, paired_bootstrap, pareto_frontier
from bench.record.schema import Interval, Record, write_atomically
from bench.tables.summary import AUTOREGRESSIVE, Result, draft_ms, num_passes, parity_failed

FORMATS = (".png", ".pdf", ".svg")
PHASES = ("draft", "verify", "accept", "cache", "host")
PHASE_COLORS = dict(zip(PHASES, ("#DD8452", "#4C72B0", "#55A868", "#8172B3", "#B0B7C0"), strict=True))
BACKBONE_COLOR = "#3B4252"
ALL = "all prompts"


def check_plot_path(path: str | Path) -> None:
    """Raises ValueError when the ending is not one of FORMATS."""
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a plot ends in {', '.join(FORMATS)}")


def draw_comparison(results: Sequence[Result], path: str | Path) -> None:
    """Draw both panels into ``path``, whole or not at all; the format follows its ending.

    Raises ValueError for another ending than FORMATS and OSError when the file cannot be written.
    """
    check_plot_path(path)
    heads = _heads(results)
    categories = list(dict.fromkeys(row.category for result in results for row in result.record.per_prompt))
    width = max(5.0, 0.9 + 0.11 * (len(heads) + 2) * (len(categories) + 1))
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(width + 6.2, max(4.4, 2.2 + 0.5 * len(results))), width_ratios=(width, 6.2)
        )
        try:
            _draw_accept_length(left, heads, categories)
            _draw_pass_time(right, results, heads)
            sns.despine(figure)
            figure.tight_layout(w_pad=3)
            content = _render(figure, path)
        finally:
            plt.close(figure)
    write_atomically(path, content)


def check_frontier(results: Sequence[Result]) -> list[Result]:
    """The heads that have a place in the picture. Raises ValueError when none has a draft time and an accept length."""
    placed = [result for result in _heads(results) if None not in _place(result.record)]
    if not placed:
        names = ", ".join(result.path for result in results)
        raise ValueError(f"no head with a draft time and an accept length among {names}; measure one with bench/run.py")
    return placed


def draw_frontier(results: Sequence[Result], path: str | Path) -> None:
    """Draw accept length against draft time into ``path``, whole or not at all; heads without either are left out.

    Raises ValueError as ``check_plot_path`` and ``check_frontier`` do, OSError when the file cannot be written.
    """
    check_plot_path(path)
    heads = check_frontier(results)
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        figure, axes = plt.subplots(figsize=(7.6, 5.0))
        try:
            _draw_frontier(axes, heads)
            sns.despine(figure)
            figure.tight_layout()
            content = _render(figure, path)
        finally:
            plt.close(figure)
    write_atomically(path, content)


def _render(figure, path: str | Path) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lower()[1:], dpi=160, bbox_inches="tight")
    return buffer.getvalue()


def _heads(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.record.head != AUTOREGRESSIVE]


def _place(record: Record) -> tuple[float | None, float | None]:
    """(milliseconds of drafting per pass, tokens per pass)."""
    return draft_ms(record), record.metrics.accept_length


def _draw_frontier(axes, heads: Sequence[Result]) -> None:
    """Points with 95% intervals both ways, and steps along the heads that no other one beats."""
    costs, values = zip(*(_place(result.record) for result in heads), strict=True)
    colors = sns.color_palette("colorblind" if len(heads) <= 10 else "husl", len(heads))
    for result, cost, value, color in zip(heads, costs, values, colors, strict=True):
        across = paired_bootstrap(result.record.per_prompt, "draft_ms")
        axes.errorbar(
            [cost], [value], xerr=_bars(cost, across), yerr=_bars(value, result.record.metrics.accept_length_ci),
            fmt="o", markersize=7, capsize=2.5, elinewidth=1.4, color=color, zorder=3,
        )  # fmt: skip
    frontier = pareto_frontier(costs, values)
    right = max(axes.get_xlim()[1], 1.2 * max(costs))
    xs, ys = [costs[index] for index in frontier], [values[index] for index in frontier]
    axes.plot(
        [*xs, right], [*ys, ys[-1]], drawstyle="steps-post", color=BACKBONE_COLOR, linewidth=1.6, zorder=2,
        label="Pareto frontier",
    )  # fmt: skip
    axes.axhline(1, color="0.35", linewidth=1.2, linestyle="--", zorder=1, label=AUTOREGRESSIVE)
    axes.set_xlim(min(0, axes.get_xlim()[0]), right)
    axes.set_ylim(min(0.9, axes.get_ylim()[0]), axes.get_ylim()[1] + 0.1)
    labels = [result.label + (" (parity failed)" if parity_failed(result.record) else "") for result in heads]
    _label_points(axes, labels, costs, values)
    axes.set_xlabel("milliseconds of drafting per decoding pass")
    axes.set_ylabel("tokens per pass")
    axes.set_title("Accept length against draft time (95% intervals)", loc="left", weight="bold", pad=12)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _bars(value: float, interval: Interval | None) -> list[list[float]]:
    """An interval as matplotlib wants it: lengths below and above."""
    low, high = interval or (value, value)
    return [[max(value - low, 0)], [max(high - value, 0)]]


def _label_points(axes, labels: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> None:
    """Each name beside its point, in the first of eight places that hides neither a point nor another name."""
    axes.figure.canvas.draw()
    points, taken, frame = axes.transData.transform(np.column_stack([xs, ys])), [], axes.get_window_extent()
    places = [(x, y) for y in (6, -14, 20, -28) for x in (7, -7)]  # points from the mark; a line of text takes 14
    for label, x, y in zip(labels, xs, ys, strict=True):
        for shift in places:
            side = "left" if shift[0] > 0 else "right"
            text = axes.annotate(label, (x, y), shift, textcoords="offset points", ha=side, size=9, zorder=4)
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            if inside and not any(box.overlaps(other) for other in taken) and not box.count_contains(points):
                break
            if shift != places[-1]:
                text.remove()
        taken.append(box)


def _draw_accept_length(axes, heads: Sequence[Result], categories: Sequence[str]) -> None:
    """Points with 95% intervals, dodged by head; the first group is all prompts together."""
    groups = [ALL, *categories] if len(categories) != 1 else list(categories)
    colors = sns.color_palette("colorblind" if len(heads) <= 10 else "husl", max(len(heads), 1))
    step = 0.7 / max(len(heads), 1)
    for index, result in enumerate(heads):
        rows = comparable_rows(result.record.per_prompt)
        places, values, below, above = [], [], [], []
        for place, group in enumerate(groups):
            chosen = [row for row in rows if group == ALL or row.category == group]
            value = accept_length(chosen)
            if value is None:
                continue
            low, high = paired_bootstrap(chosen, "accept_length") or (value, value)
            places.append(place + (index - (len(heads) - 1) / 2) * step)
            values.append(value)
            below.append(max(value - low, 0))
            above.append(max(high - value, 0))
        axes.errorbar(
            places, values, yerr=[below, above], fmt="o", markersize=6, capsize=2.5, elinewidth=1.6,
            color=colors[index], label=result.label,
        )  # fmt: skip
    for place in range(0, len(groups), 2):
        axes.axvspan(place - 0.5, place + 0.5, color="0.955", zorder=0, linewidth=0)
    axes.axhline(1, color="0.35", linewidth=1.2, linestyle="--", zorder=1)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.annotate(
        "autoregressive", (len(groups) - 0.5, 1), (-4, 4), textcoords="offset points", ha="right", size=8, color="0.35"
    )
    entry = 0.6 + 0.08 * max((len(result.label) for result in heads), default=0)  # inches in the legend, measured
    columns = max(1, min(len(heads), int(axes.get_position().width * axes.figure.get_figwidth() / entry)))
    low, high = min(0.9, axes.get_ylim()[0]), max(axes.get_ylim()[1], 1.2)
    room = 0.1 * -(-len(heads) // columns)  # for the rows of the legend, so that it hides no point
    axes.set_ylim(low, low + (high - low) / (1 - min(room, 0.5)))
    tilt = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(groups) > 4 else {}
    axes.set_xticks(range(len(groups)), groups, **tilt)
    axes.xaxis.grid(False)
    axes.set_ylabel("tokens per pass")
    axes.set_title("Accept length by category (95% interval)", loc="left", weight="bold", pad=12)
    if heads:
        axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=columns, columnspacing=1.2, handletextpad=0.3)


def _draw_pass_time(axes, results: Sequence[Result], heads: Sequence[Result]) -> None:
    """Horizontal stacks in milliseconds; a black mark is the autoregressive pass of the same run."""
    bars = [(result.label, _phases_ms(result.record), _baseline_ms(result.record)) for result in heads]
    baseline = _autoregressive_ms(results)
    labels = ([AUTOREGRESSIVE] if baseline else []) + [label for label, _, _ in bars]
    first = 1 if baseline else 0
    if baseline:
        axes.barh(0, baseline, height=0.62, color=BACKBONE_COLOR, label="backbone pass")
    lefts = np.zeros(len(bars))
    for phase in PHASES:
        widths = np.asarray([phases.get(phase, 0.0) for _, phases, _ in bars])
        if len(bars):
            places = np.arange(first, first + len(bars))
            axes.barh(places, widths, left=lefts, height=0.62, color=PHASE_COLORS[phase], label=phase)
        lefts = lefts + widths
    marked = False
    for place, (_, _, twin) in enumerate(bars, start=first):
        if twin is not None:
            label = None if marked else "autoregressive twin"
            axes.plot([twin, twin], [place - 0.4, place + 0.4], color="black", linewidth=2, label=label)
            marked = True
    totals = ([baseline] if baseline else []) + list(lefts)
    longest = max([*totals, *(twin or 0 for _, _, twin in bars)], default=0) or 1.0
    for place, total in enumerate(totals):
        twin = bars[place - first][2] if place >= first else None
        axes.text(max(total, twin or 0) + 0.015 * longest, place, f"{total:.3g}", va="center", size=9)
    axes.set_xlim(0, longest * 1.14)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.yaxis.grid(False)
    axes.set_xlabel("milliseconds per decoding pass")
    axes.set_title("What a pass costs", loc="left", weight="bold", pad=12)
    axes.legend(
        frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=4, handlelength=1.2,
        columnspacing=1.2,
    )  # fmt: skip


def _phases_ms(record: Record) -> dict[str, float]:
    """Phase -> milliseconds per pass; a phase whose time is unknown is missing."""
    passes = num_passes(record)
    seconds = {phase: getattr(record.timing, f"{phase}_s") for phase in PHASES}
    return {phase: 1e3 * value / passes for phase, value in seconds.items() if value is not None and passes}


def _baseline_ms(record: Record) -> float | None:
    """Milliseconds of the twin's pass: its median where recorded."""
    return 1e3 * record.baseline.pass_s if record.baseline and record.baseline.pass_s is not None else None


def _autoregressive_ms(results: Sequence[Result]) -> float | None:
    """The autoregressive pass: of its own record when there is one, else of the first head that has a twin."""
    for result in results:
        if result.record.head == AUTOREGRESSIVE and num_passes(result.record):
            return 1e3 * sum(row.time_s for row in result.record.per_prompt) / num_passes(result.record)
    return next((ms for ms in map(_baseline_ms, (result.record for result in results)) if ms is not None), None)
