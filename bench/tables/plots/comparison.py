"""The plots of a comparison: how much each head accepts, and what its passes cost.

The comparison. Left: accept length by category with bootstrap intervals. Right: milliseconds per decoding pass, stacked
by phase, beside the autoregressive pass. A head pays off if the left grows faster than the right.

The frontier: accept length against draft time, one point per head. Verification costs the same for every head of one
tree budget, so a head below and to the right of another one is never the better choice on that machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns

from bench.record.metrics import comparable_rows, evaluate, paired_bootstrap, pareto_frontier
from bench.record.schema import AUTOREGRESSIVE, Record
from bench.tables.plots.figure import check_plot_path, drawn_figure
from bench.tables.results import Result, parity_failed
from runtime.records import Interval

PHASES = ("draft", "verify", "accept", "cache", "host")
PHASE_COLORS = dict(zip(PHASES, ("#DD8452", "#4C72B0", "#55A868", "#8172B3", "#B0B7C0"), strict=True))
BACKBONE_COLOR = "#3B4252"
BACKBONE_PASS = "backbone pass"
ALL = "all prompts"


def draw(results: Sequence[Result], plot: str | Path | None, frontier: str | Path | None) -> None:
    """Draw the comparison and the frontier, where a path is given, once it is clear that both can be drawn.

    Raises ValueError for an ending that is no plot's and a frontier without a head, OSError if a file cannot be
    written.
    """
    for target in filter(None, (plot, frontier)):
        check_plot_path(target)
    heads = [result for result in results if result.record.head != AUTOREGRESSIVE]
    placed = [result for result in heads if None not in _place(result.record)]
    if frontier and not placed:
        names = ", ".join(result.path for result in results)
        raise ValueError(f"no head with a draft time and an accept length among {names}; measure one with bench/run.py")
    if plot:
        categories = list(dict.fromkeys(row.category for result in results for row in result.record.per_prompt))
        width = max(5.0, 0.9 + 0.11 * (len(heads) + 2) * (len(categories) + 1))
        size = width + 6.2, max(4.4, 2.2 + 0.5 * len(results))
        with drawn_figure(plot, 2, size, width_ratios=(width, 6.2)) as (left, right):
            _draw_accept_length(left, heads, categories)
            _draw_pass_time(right, results, heads)
    if frontier:
        with drawn_figure(frontier, 1, (7.6, 5.0)) as (axes,):
            _draw_frontier(axes, placed)


def _place(record: Record) -> tuple[float | None, float | None]:
    """(milliseconds of drafting per pass, tokens per pass)."""
    return _phases_ms(record).get("draft"), record.metrics.accept_length


def _colors(heads: Sequence[Result]) -> list:
    return sns.color_palette("colorblind" if len(heads) <= 10 else "husl", max(len(heads), 1))


def _draw_frontier(axes, heads: Sequence[Result]) -> None:
    """Points with 95% intervals in both directions, and steps along the heads that no other head beats."""
    costs, values = zip(*(_place(result.record) for result in heads), strict=True)
    for result, cost, value, color in zip(heads, costs, values, _colors(heads), strict=True):
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
    """An interval in matplotlib's form: lengths below and above."""
    low, high = interval or (value, value)
    return [[max(value - low, 0)], [max(high - value, 0)]]


def _label_points(axes, labels: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> None:
    """Each name beside its point, at the first of eight places that covers neither a point nor another name."""
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
    colors = _colors(heads)
    step = 0.7 / max(len(heads), 1)
    for index, result in enumerate(heads):
        rows = comparable_rows(result.record.per_prompt)
        places, values, bars = [], [], []
        for place, group in enumerate(groups):
            chosen = [row for row in rows if group == ALL or row.category == group]
            value = evaluate(chosen, "accept_length")
            if value is None:
                continue
            places.append(place + (index - (len(heads) - 1) / 2) * step)
            values.append(value)
            bars.append(_bars(value, paired_bootstrap(chosen, "accept_length")))
        axes.errorbar(
            places, values, yerr=np.hstack(bars) if bars else None, fmt="o", markersize=6, capsize=2.5, elinewidth=1.6,
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
    room = 0.1 * -(-len(heads) // columns)  # for the rows of the legend, so that it covers no point
    axes.set_ylim(low, low + (high - low) / (1 - min(room, 0.5)))
    tilt = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(groups) > 4 else {}
    axes.set_xticks(range(len(groups)), groups, **tilt)
    axes.xaxis.grid(False)
    axes.set_ylabel("tokens per pass")
    axes.set_title("Accept length by category (95% interval)", loc="left", weight="bold", pad=12)
    if heads:
        axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=columns, columnspacing=1.2, handletextpad=0.3)


def _draw_pass_time(axes, results: Sequence[Result], heads: Sequence[Result]) -> None:
    """Horizontal stacks in milliseconds; a black mark is the baseline's pass in the same run."""
    stacks = [_phases_ms(result.record) for result in heads]
    marks = [_baseline_ms(result.record) for result in heads]
    labels = [result.label for result in heads]
    if alone := _autoregressive_ms(results):
        stacks, marks, labels = [{BACKBONE_PASS: alone}, *stacks], [None, *marks], [AUTOREGRESSIVE, *labels]
    stacks = pd.DataFrame(stacks, index=labels, columns=[BACKBONE_PASS, *PHASES], dtype=float).fillna(0.0)
    stacks = stacks.loc[:, [bool(alone), *[bool(heads)] * len(PHASES)]]
    if not stacks.empty:
        colors = {BACKBONE_PASS: BACKBONE_COLOR, **PHASE_COLORS}
        stacks.plot.barh(stacked=True, ax=axes, width=0.62, legend=False, color=colors)
    label: str | None = "baseline's pass"
    for place, mark in enumerate(marks):
        if mark is not None:
            axes.plot([mark, mark], [place - 0.4, place + 0.4], color="black", linewidth=2, label=label)
            label = None
    totals = stacks.sum(axis=1).tolist()
    longest = max([*totals, *(mark or 0 for mark in marks)], default=0) or 1.0
    for place, (total, mark) in enumerate(zip(totals, marks, strict=True)):
        axes.text(max(total, mark or 0) + 0.015 * longest, place, f"{total:.3g}", va="center", size=9)
    axes.set_xlim(0, longest * 1.14)
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
    passes = sum(row.passes for row in record.per_prompt)
    seconds = {phase: getattr(record.timing, f"{phase}_s") for phase in PHASES}
    return {phase: 1e3 * value / passes for phase, value in seconds.items() if value is not None and passes}


def _baseline_ms(record: Record) -> float | None:
    """Median milliseconds of the baseline's pass, if recorded."""
    return 1e3 * record.baseline.pass_s if record.baseline and record.baseline.pass_s is not None else None


def _autoregressive_ms(results: Sequence[Result]) -> float | None:
    """The autoregressive pass: of its own record if there is one, else of the first head with a baseline."""
    for result in results:
        passes = sum(row.passes for row in result.record.per_prompt)
        if result.record.head == AUTOREGRESSIVE and passes:
            return 1e3 * sum(row.time_s for row in result.record.per_prompt) / passes
    return next((ms for ms in map(_baseline_ms, (result.record for result in results)) if ms is not None), None)
