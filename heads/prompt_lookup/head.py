"""Prompt lookup decoding (Saxena 2023; LLMA, arXiv 2304.04487): the draft is copied from earlier in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from heads.base import Head, HeadOutput, option
from runtime import jt


@dataclass
class Config:
    """Options of the prompt lookup head."""

    num_depths: int = option(8, "tokens drafted after the root; looking further costs no parameters")
    max_ngram: int = option(3, "longest run of tokens that is looked for earlier in the text")


class Followers:
    """A text that grows, and for each n-gram of it what followed: {n-gram: {token: where it last followed}}.

    Worked example, n-grams up to 2: after a b a c the n-grams are (a): {b: 1, c: 3}, (b): {a: 2}, (a, b): {a: 2} and
    (b, a): {c: 3}.
    """

    def __init__(self, max_ngram: int):
        self.max_ngram = max_ngram
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], dict[int, int]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on with the text; the cost is that of the new tokens."""
        for token in tokens:
            position = len(self.tokens)
            for n in range(1, min(self.max_ngram, position) + 1):
                self.after.setdefault(tuple(self.tokens[position - n :]), {})[token] = position
            self.tokens.append(token)

    def scores(self, path: Sequence[int] = ()) -> dict[int, float]:
        """What may follow the text and the path behind it: n + p / length for each token that followed their last n
        tokens earlier, at p the last time, n being as long as it gets.

        path: a few drafted tokens that the text does not hold. Worked example, n-grams up to 2: of a b a c | a b the
        last two tokens a b were followed by a at 2, the last one alone as well: {a: 2 + 2 / 6}.
        """
        length, first = len(self.tokens) + len(path), len(self.tokens)
        tail = [*self.tokens[-self.max_ngram :], *path]  # the text before it is in the index
        offset, found = length - len(tail), {}
        for n in range(1, min(self.max_ngram, length) + 1):
            wanted = tail[len(tail) - n :]
            places = dict(self.after.get(tuple(wanted), {}))
            for p in range(max(first, offset + n), length):  # followers that are on the path
                if tail[p - offset - n : p - offset] == wanted:
                    places[tail[p - offset]] = p
            if not places:
                break  # a longer run contains this one
            found.update((token, n + p / length) for token, p in places.items())
        return found


class State(NamedTuple):
    """text: what is read, without the root; root: the token that begin was told last; paths: (nodes,) lists of tokens,
    the node's own last, empty before the first step."""

    text: Followers
    root: int
    paths: list[list[int]]


class PromptLookupHead(Head):
    """logits[v] = n + p / |c|: in the context c, v followed the n tokens that c ends with, the last time at p.

    c: the text so far, the root and the drafted tokens down to the node; not its very first token, which ``begin`` is
    never told. n: as long as it gets, at most ``max_ngram``. So the longest match comes first and among equals the
    latest. A token that never followed gets -v / vocab: behind the others, and no two tokens tie, because a tie would
    count as a hit where ranks are counted.
    """

    Config = Config
    trained = False

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        if config.max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1, got {config.max_ngram}")
        self.never = -np.arange(self.vocab_size, dtype=np.float32) / self.vocab_size

    def rows(self, num: int) -> np.ndarray:
        """Logits of ``num`` nodes that have found nothing, (num, vocab) float32."""
        return np.tile(self.never, (num, 1))

    def execute(self, features, token_ids, positions) -> HeadOutput:
        token_ids, positions = np.asarray(token_ids), np.asarray(positions)
        seq = features.hidden.shape[1]
        logits = [self.rows(len(positions)) for _ in range(self.num_depths)]
        start = 0  # of a sequence, as a flat position
        for length in self.sequence_lengths(features).tolist():
            row, first = divmod(start, seq)
            text, scores = Followers(self.config.max_ngram), []
            for token in token_ids[row, first + 1 : first + length + self.num_depths].tolist():
                text.extend([token])
                scores.append(text.scores())
            for i in np.flatnonzero((positions >= start) & (positions < start + length)):
                for depth, row_logits in enumerate(logits):
                    found = scores[positions[i] - start + depth]
                    row_logits[i, list(found)] = list(found.values())
            start += length
        return HeadOutput([jt.array(each) for each in logits])

    def begin(self, features, token_ids, state=None):
        *read, root = token_ids.numpy()[0].tolist()
        if state is None:
            text = Followers(self.config.max_ngram)
        else:
            text, read = state.text, [state.root, *read]
        text.extend(read)
        return State(text, root, [[]])

    def step(self, state, token_ids, parents):
        tokens, parents = token_ids.numpy().tolist(), parents.numpy().tolist()
        paths = [[*state.paths[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        logits = self.rows(len(paths))
        for row, path in zip(logits, paths, strict=True):
            found = state.text.scores(path)
            row[list(found)] = list(found.values())
        return jt.array(logits), state._replace(paths=paths)
