"""The score that picks a checkpoint: how many tokens a pass would emit on held-out text, and the tree that gives it.

``heads.ranks`` says what ranks are and counts their paths.
"""

from __future__ import annotations

import numpy as np

from heads.ranks import MAX_RANK as MAX_RANK
from heads.ranks import accepted_depths, count_paths, fitted_paths, walk

MIN_REPLIES = 16  # fewer of the backbone's own replies say too little: then all replies count


def own_replies(ranks: np.ndarray, lengths: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ranks, lengths) of the replies that the backbone would have written itself, token by token; of all replies where
    there are fewer than ``MIN_REPLIES`` of those.

    ranks: (depth, positions), the replies behind each other; lengths: (replies,), positions of each; own: (positions,)
    bool, whether the token that the first depth drafts is the backbone's best guess. Greedy decoding writes no other
    text: in a sampled reply, or one that somebody else wrote, a head meets tokens that it would never have to draft.
    """
    starts = np.cumsum(lengths) - lengths
    whole = np.logical_and.reduceat(own, starts) if len(lengths) else np.zeros(0, bool)
    if whole.sum() < MIN_REPLIES:
        return ranks, np.asarray(lengths)
    return ranks[:, np.repeat(whole, lengths)], np.asarray(lengths)[whole]


def expected_accept_length(ranks: np.ndarray, lengths: np.ndarray, num_nodes: int) -> float:
    """Tokens per pass with the fitted tree of num_nodes nodes (root included), the text decoded by it.

    ranks: (depth, positions), the replies behind each other; lengths: (replies,), positions of each. The passes are
    those that decoding the text would take: the mean over all positions would be higher, because a pass begins where
    the one before it failed, and hard places come together. Positions without a label at the first depth are left out;
    one whose text ends within the tree counts as far as the text goes, as it does in decoding.
    """
    labelled = ranks[0] >= 0
    owners = np.repeat(np.arange(len(lengths)), lengths)[labelled]
    ranks = ranks[:, labelled]
    if ranks.shape[1] == 0:
        raise ValueError("the held-out text is too short: no position has a token to draft")
    paths = fitted_paths(count_paths(ranks), num_nodes)
    passes = walk(accepted_depths(ranks, paths), np.bincount(owners))
    return ranks.shape[1] / sum(map(len, passes))


def accuracy(ranks: np.ndarray, top: int) -> list[float]:
    """Share of labelled positions whose true token is among the ``top`` first, per depth. ranks: (depth, positions)."""
    return [float((row[row >= 0] < top).mean()) for row in ranks]
