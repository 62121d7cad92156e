"""The score that picks a checkpoint: how many tokens a pass would emit on held-out text, and the tree that gives it.

``heads.ranks`` says what ranks are and counts their paths.
"""

from __future__ import annotations

import numpy as np

from heads.ranks import MAX_RANK as MAX_RANK
from heads.ranks import count_paths, fitted_paths


def expected_accept_length(ranks: np.ndarray, num_nodes: int) -> float:
    """Tokens per pass with the best tree of num_nodes nodes (root included): 1 + the share of positions each of its
    paths accepts. ranks: (depth, positions).

    Positions without a label at the first depth are left out. One whose text ends within the tree counts as far as the
    text goes, as it does in decoding: asking for a label at every depth would leave only the insides of long replies,
    which are easier, the more so the deeper the head.
    """
    labelled = ranks[:, ranks[0] >= 0]
    if labelled.shape[1] == 0:
        raise ValueError("the held-out text is too short: no position has a token to draft")
    counts = count_paths(labelled)
    return 1 + sum(counts[path] for path in fitted_paths(counts, num_nodes)) / labelled.shape[1]


def accuracy(ranks: np.ndarray, top: int) -> list[float]:
    """Share of labelled positions whose true token is among the ``top`` first, per depth. ranks: (depth, positions)."""
    return [float((row[row >= 0] < top).mean()) for row in ranks]
