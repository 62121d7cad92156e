"""How every plot is set up and written: style, allowed endings, one atomic file."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

FORMATS = (".png", ".pdf", ".svg")


def check_plot_path(path: str | Path) -> None:
    """Raises ValueError unless the ending is one of FORMATS."""
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a plot ends in {', '.join(FORMATS)}")


@contextlib.contextmanager
def drawn_figure(path: str | Path, num_panels: int, size: tuple[float, float], **settings):
    """A row of axes to draw on, written to ``path`` when the body ends; the format follows its ending.

    size: (width, height) in inches. settings: of ``plt.subplots``. Raises ValueError as ``check_plot_path`` does and
    OSError if the file cannot be written.
    """
    check_plot_path(path)
    import matplotlib  # with seaborn it takes seconds to import

    matplotlib.use("Agg")  # before pyplot: a file is drawn, no window is opened
    import matplotlib.pyplot as plt
    import seaborn as sns

    from runtime.atomic import write_file

    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=0.9):
        figure, axes = plt.subplots(1, num_panels, figsize=size, squeeze=False, **settings)
        try:
            yield axes[0]
            sns.despine(figure)
            figure.tight_layout(w_pad=3)
            buffer = io.BytesIO()
            figure.savefig(buffer, format=Path(path).suffix.lower()[1:], dpi=160, bbox_inches="tight")
        finally:
            plt.close(figure)
    write_file(path, buffer.getvalue())
