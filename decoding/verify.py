"""Decides which drafted tokens are accepted, by pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from decoding.sampling import draw

EPSILON, ALPHA = 0.09, 0.3  # of typical acceptance, as in Medusa's code
Distribution = Callable[[int], np.ndarray]  # node -> (vocab,) float64; called for visited nodes alone


def verify_greedy(parents: np.ndarray, node_tokens: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, int]:
    """Walk down from the root along the backbone's own choices.

    parents: (nodes,) int32, parents[0] = -1, each before its children. node_tokens: (nodes,) int32, the drafted tokens.
    chosen: (nodes,) int32, the backbone's argmax after each node. A node is accepted when its parent is and its token
    is what the backbone chose after its parent; of siblings with the same token, the one with the lowest index.

    Returns path, the accepted nodes from the root down, root included, (accepted + 1,) int32 ascending; and the
    bonus token, chosen[path[-1]].

    Worked example, the tree of ``decoding.tree.Tree`` with parents [-1, 0, 0, 2], tokens [7, 4, 5, 9] and chosen
    [5, 3, 9, 8]: after the root (7) the backbone wants 5, which is node 2; after node 2 it wants 9, node 3; after
    that 8. So path is [0, 2, 3], the bonus 8, and the pass emits 5 9 8. With chosen [6, ...] no child fits: path [0],
    bonus 6.
    """
    assert parents.shape == node_tokens.shape == chosen.shape, (parents.shape, node_tokens.shape, chosen.shape)
    # Plain lists: for small trees a loop is faster than array calls. Parents come before their children, and once a
    # child is the tail, its later siblings have another parent than the tail.
    choices, tail, path = chosen.tolist(), 0, [0]
    for node, (parent, token) in enumerate(zip(parents.tolist(), node_tokens.tolist(), strict=True)):
        if parent == tail and token == choices[tail]:
            tail = node
            path.append(node)
    return np.array(path, np.int32), choices[tail]


def verify_lossless(
    parents: np.ndarray, node_tokens: np.ndarray, target: Distribution, rng: np.random.Generator, draft=None
) -> tuple[np.ndarray, int]:
    """Speculative sampling over a tree: the emitted tokens are distributed as if drawn from the backbone one by one.

    parents, node_tokens: as in ``verify_greedy``. target(node): the backbone's distribution after ``node``.

    draft None: the guesses are a function of the text before them. At each node from the root down a token is drawn
    from the target; the child that holds it (the first of equals) is accepted; where there is none, it is the bonus.

    draft(node): the distribution that the children of ``node`` were drawn from, without replacement, in node order. A
    child x is accepted with probability min(1, p(x) / q(x)), where p is the target and q the draft; else p becomes
    max(p - q, 0) and q loses x, both renormalized, and the next sibling is tried; after the last one the bonus is drawn
    from p. One child: Leviathan et al., arXiv 2211.17192; several, drawn independently: SpecInfer, arXiv 2305.09781;
    drawn without replacement, as here: recursive rejection sampling, Jeon et al., arXiv 2402.14160. When nothing is
    left of q, the remaining children are treated as guesses without a draft.

    Returns path, the accepted nodes from the root down, (accepted + 1,) int32 ascending, and the bonus token.

    Worked example: tokens {0, 1}, p = [.2 .8], q = [.6 .4] and a chain of one child. Token 0 is drafted with .6 and
    accepted with .2 / .6; else max(p - q, 0) = [0 .4] leaves token 1. Token 1 is always accepted. So 0 is emitted with
    .6 * .2 / .6 = .2, and 1 with .4 + .6 * .4 / .6 = .8: p.
    """
    assert parents.shape == node_tokens.shape, (parents.shape, node_tokens.shape)
    node, path = 0, [0]
    while True:
        left = target(node)
        children = np.flatnonzero(parents == node)
        accepted = None
        if draft is not None and len(children):
            accepted, left, tried = _try_siblings(node_tokens[children].tolist(), left, draft(node), rng)
            children = children[tried:] if accepted is None else children[accepted : accepted + 1]
        if accepted is None:
            token = draw(left, rng)
            children = children[node_tokens[children] == token]
            if not len(children):
                return np.array(path, np.int32), token
        node = int(children[0])
        path.append(node)


def _try_siblings(
    tokens: list[int], p: np.ndarray, q: np.ndarray, rng: np.random.Generator
) -> tuple[int | None, np.ndarray, int]:
    """Recursive rejection. tokens: of the siblings, in the order they were drawn from q, (vocab,); p: (vocab,).

    Returns (the accepted sibling or None, p after the rejections, how many siblings were tried).
    """
    for sibling, token in enumerate(tokens):
        if q[token] == 0:  # nothing is left of q
            return None, p, sibling
        if rng.random() * q[token] < p[token]:
            return sibling, p, sibling + 1
        p, q = _residual(p, q), _without(q, token)
    return None, p, len(tokens)


def _residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """max(p - q, 0), renormalized. It is zero only where p and q differ by rounding; the rejection was then rounding
    too, and p stays."""
    left = np.maximum(p - q, 0.0)
    total = left.sum()
    return left / total if total > 0 else p


def _without(q: np.ndarray, token: int) -> np.ndarray:
    """q after ``token`` was drawn, renormalized; zeros when nothing is left."""
    left = q.copy()
    left[token] = 0.0
    total = left.sum()
    return left / total if total > 0 else left


def verify_typical(
    parents: np.ndarray,
    node_tokens: np.ndarray,
    target: Distribution,
    epsilon: float,
    alpha: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, int, np.ndarray]:
    """Typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1): likely guesses are accepted, which changes the
    distribution of the text.

    parents, node_tokens, target: as in ``verify_lossless``; the guesses may come from anywhere. With p the target after
    its parent and H(p) its entropy in nats, a node x is accepted when its parent is and
    p(x) > min(epsilon, alpha * exp(-H(p))). The path is the longest accepted one; of equals the one with the highest
    product of p(x), then the one whose last node has the lowest index. The bonus is drawn from the target at its end
    (Medusa's code takes the most probable token there).

    Returns path and bonus, as ``verify_lossless`` does, and (accepted + 1,) float64: for each emitted token the total
    variation distance between how it was chosen, given the guesses, and a draw from p. An accepted x is certain, so its
    distance is 1 - p(x); the bonus is drawn from p, distance 0.

    Worked example: epsilon .3, alpha .3, and after the root p = [.5 .25 .25], so exp(-H) = exp(-1.04) = .354 and the
    threshold is min(.3, .106) = .106: a child with any of the three tokens is accepted. Two leaves after the root with
    tokens 2 and 0 make paths of equal length; token 0 is more probable, so it is accepted, at a distance of .5.
    """
    assert parents.shape == node_tokens.shape, (parents.shape, node_tokens.shape)
    after: dict[int, tuple[np.ndarray, float]] = {}  # accepted node -> the distribution after it, and the threshold
    best, likely = 0, {0: (0, 1.0)}  # accepted node -> its depth, and the product along its path
    for node in range(1, len(parents)):
        parent = int(parents[node])
        if parent not in likely:
            continue
        if parent not in after:
            p = target(parent)
            after[parent] = p, min(epsilon, alpha * float(np.exp(-entropy(p))))
        p, threshold = after[parent]
        chance = float(p[node_tokens[node]])
        if chance > threshold:
            depth, product = likely[parent]
            likely[node] = depth + 1, product * chance
            if likely[node] > likely[best]:
                best = node
    path = [best]
    while path[0] != 0:
        path.insert(0, int(parents[path[0]]))
    distances = [1.0 - float(after[parents[node]][0][node_tokens[node]]) for node in path[1:]]
    bonus = draw(after[best][0] if best in after else target(best), rng)
    return np.array(path, np.int32), bonus, np.array([*distances, 0.0])


def check_thresholds(epsilon: float, alpha: float) -> None:
    """Raises ValueError for an epsilon outside [0, 1] and an alpha that is negative or not finite."""
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be a finite number from 0, got {alpha}")


def entropy(probabilities: np.ndarray) -> float:
    """Entropy in nats of (vocab,) probabilities."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())
