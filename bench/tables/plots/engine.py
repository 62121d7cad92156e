"""The plot of an engine measurement: milliseconds per pass against its rows, above the least the machine allows."""

from __future__ import annotations

from pathlib import Path

from bench.record.engine import EngineRecord, Shape
from bench.tables.plots.figure import drawn_figure


def draw_engine(record: EngineRecord, path: str | Path) -> None:
    """One panel per shape, one line per context with quartiles, its roofline dashed. Raises as ``drawn_figure``."""
    with drawn_figure(path, len(record.shapes), (5.2 * len(record.shapes), 4.6)) as panels:
        for axes, shape in zip(panels, record.shapes, strict=True):
            _draw_shape(axes, shape)


def _draw_shape(axes, shape: Shape) -> None:
    import seaborn as sns
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    contexts = sorted({each.context for each in shape.passes})
    colors = sns.color_palette("crest", len(contexts))
    for context, color in zip(contexts, colors, strict=True):
        passes = sorted((each for each in shape.passes if each.context == context), key=lambda each: each.rows)
        rows, middle = [each.rows for each in passes], [each.ms for each in passes]
        below, above = [each.ms - each.ms_low for each in passes], [each.ms_high - each.ms for each in passes]
        axes.errorbar(
            rows, middle, yerr=[below, above], marker="o", markersize=5, capsize=2.5, color=color,
            label=f"after {context} rows",
        )  # fmt: skip
        axes.plot(rows, [each.roofline_ms for each in passes], linestyle="--", linewidth=1.2, color=color)
    axes.plot([], [], linestyle="--", linewidth=1.2, color="0.35", label="roofline")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({each.rows for each in shape.passes})
    axes.set_xticks(ticks, [str(rows) for rows in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.minorticks_off()
    axes.set_xlabel("rows of a pass")
    axes.set_ylabel("milliseconds")
    where = " (fits in the cache)" if shape.fits_in_cache else ""
    axes.set_title(f"{shape.name}, {shape.dtype}{where}", loc="left", weight="bold", pad=12)
    axes.legend(frameon=False, fontsize=9)
