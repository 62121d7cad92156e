"""A calibration on a terminal: one row per candidate tree."""

from __future__ import annotations

import pandas as pd

from bench.record.calibration import Calibration
from bench.tables.numbers import format_number
from bench.tables.terminal import show_table
from decoding.tree import Tree

CHOSEN = " (chosen)"


def show_calibration(calibration: Calibration) -> None:
    """Print the candidates, the chosen one marked, and the baseline."""
    alone, rows = calibration.autoregressive_tokens_per_s, []
    for index, each in enumerate(calibration.candidates):
        interval = each.accept_length_ci or (each.accept_length, each.accept_length)
        rows.append(
            {
                "tree": describe_tree(Tree.from_paths(each.tree)) + CHOSEN * (index == calibration.chosen),
                "accept length [95%]": format_number(each.accept_length, interval),
                "ms/pass": f"{1e3 * each.predicted_s_per_pass:.3g} / {1e3 * each.measured_s_per_pass:.3g}",
                "tokens/s": f"{each.predicted_tokens_per_s:.0f} / {each.measured_tokens_per_s:.0f}",
                "speedup": f"{each.measured_tokens_per_s / alone:.2f}",
            }
        )
    cells = pd.DataFrame(rows)
    cells.loc[len(cells)] = ["autoregressive", "1.00", f"{1e3 / alone:.3g}", f"{alone:.0f}", "1.00"]
    title = f"{calibration.subject.head} on this machine, by its latency curve / by its loop"
    show_table(title, cells, ["tree"], lambda column, cell: "bold" if cell.endswith(CHOSEN) else "")


def describe_tree(tree: Tree) -> str:
    """``16 nodes, depth 4``, ``chain of 3`` or ``no draft``."""
    if tree.depth == 0:
        return "no draft"
    if tree == Tree.chain(tree.depth):
        return f"chain of {tree.depth}"
    return f"{tree.num_nodes} nodes, depth {tree.depth}"
