"""Which drafted tokens stay. Pure functions of arrays."""

from __future__ import annotations

import numpy as np


def verify_greedy(parents: np.ndarray, node_tokens: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, int]:
    """Walk down from the root along the backbone's own choices.

    parents: (nodes,) int32, parents[0] = -1, each before its children. node_tokens: (nodes,) int32, the drafted tokens.
    chosen: (nodes,) int32, the backbone's argmax after each node. A node is accepted when its parent is and its token
    is what the backbone chose after its parent; of siblings with the same token, the one with the lowest index.

    Returns path, the accepted nodes from the root down, root included, (accepted + 1,) int32 ascending; and the
    bonus token, chosen[path[-1]], which the pass gives besides.

    Worked example, the tree of ``decoding.tree.Tree`` with parents [-1, 0, 0, 2], tokens [7, 4, 5, 9] and chosen
    [5, 3, 9, 8]: after the root (7) the backbone wants 5, which is node 2; after node 2 it wants 9, node 3; after
    that 8. So path is [0, 2, 3], the bonus 8, and the pass emits 5 9 8. With chosen [6, ...] no child fits: path [0],
    bonus 6.
    """
    assert parents.shape == node_tokens.shape == chosen.shape, (parents.shape, node_tokens.shape, chosen.shape)
    tail, path = 0, [0]
    # Parents come before their children, so one look at the fitting nodes in order is enough; once a child has become
    # the tail, its later siblings have another parent than the tail.
    fits = node_tokens[1:] == chosen[parents[1:]]
    for node in (np.flatnonzero(fits) + 1).tolist():
        if parents[node] == tail:
            tail = node
            path.append(node)
    return np.array(path, np.int32), int(chosen[tail])
