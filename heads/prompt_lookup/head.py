"""Prompt lookup decoding (Saxena 2023; LLMA, arXiv 2304.04487): the draft is copied from earlier in the text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from heads.base import Head, HeadOutput, at_least, option
from runtime import jt


@dataclass
class Config:
    """Options of the prompt lookup head."""

    num_depths: int = option(8, "tokens drafted after the root; depths cost no parameters")
    max_ngram: int = option(3, "longest run of tokens that is searched for earlier in the text")


# The log-odds of a match of n tokens are EVIDENCE * n - DOUBT + p / |c|. Fitted by eye to counts in the embedded
# corpus's replies, where the best match of n = 1, 2 and 3 or more tokens gave the next token in 26%, 48% and 81% of
# 9,175, 3,921 and 19,486 cases.
EVIDENCE, DOUBT = 1.2, 3.3


class Followers:
    """A growing text, and the tokens that followed its last ones earlier. It is searched, not indexed: to search a
    thousand tokens takes a few microseconds, to index a new prompt a millisecond."""

    def __init__(self, max_ngram: int):
        self.max_ngram, self.length = max_ngram, 0
        self.buffer = np.empty(64, np.int32)

    @property
    def tokens(self) -> np.ndarray:
        """The text, (length,) int32."""
        return self.buffer[: self.length]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        end = self.length + len(tokens)
        if end > len(self.buffer):
            self.buffer = np.concatenate([self.tokens, np.empty(end, np.int32)])
        self.buffer[self.length : end] = tokens
        self.length = end

    def scores(self, path: Sequence[int] = ()) -> dict[int, float]:
        """Scores of tokens that may follow the text and the path: EVIDENCE * n + p / length for each token that
        followed the last n tokens earlier, at p the last time, for the largest such n.

        path: drafted tokens after the text. Worked example, n-grams up to 2: of a b a c | a b the last two
        tokens a b were followed by a at 2, the last one alone as well: {a: 2 EVIDENCE + 2 / 6}.
        """
        text = np.append(self.tokens, np.array(path, np.int32)) if len(path) else self.tokens
        length, found = len(text), {}
        if length == 0:
            return found
        places = np.flatnonzero(text[:-1] == text[-1]) + 1
        for n in range(1, self.max_ngram + 1):
            if n > 1:
                places = places[places >= n]
                places = places[text[places - n] == text[length - n]]
            if len(places) == 0:
                break  # a longer run contains this one
            for place, token in zip(places.tolist(), text[places].tolist(), strict=True):
                found[token] = EVIDENCE * n + place / length  # the last place wins
        return found


class State(NamedTuple):
    """text: without the root; root: the last token that ``begin`` got; paths: (nodes,) lists of drafted tokens down to
    each node, empty before the first step."""

    text: Followers
    root: int
    paths: list[list[int]]


class PromptLookupHead(Head):
    """logits[v] = EVIDENCE n + p / |c| - DOUBT + log(vocab): in the context c, v followed the n tokens that c ends
    with, the last time at p.

    c: the text so far, the root and the drafted tokens down to the node, without the very first token, which ``begin``
    never gets. n: the largest possible, at most ``max_ngram``. So the longest match comes first and among equals the
    latest. A token that never followed gets -v / vocab: after the others, and without ties, because a tie would count
    as a hit where ranks are counted.
    """

    Config = Config
    trained = False

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        at_least(config, max_ngram=1)
        self.shift = np.log(self.vocab_size) - DOUBT
        # The sum over all tokens, as if none of them had followed anything.
        self.never_weight = float(np.exp(-np.arange(self.vocab_size) / self.vocab_size).sum())
        self.never = -np.arange(self.vocab_size, dtype=np.float32) / self.vocab_size

    def rows(self, num: int) -> np.ndarray:
        """Logits of ``num`` nodes without any match, (num, vocab) float32."""
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
                    row_logits[i, list(found)] = np.array([*found.values()]) + self.shift
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
            row[list(found)] = np.array([*found.values()]) + self.shift
        return jt.array(logits), state._replace(paths=paths)

    def best(self, state, token_ids, parents, num):
        paths = [
            [*state.paths[parent], token] for parent, token in zip(parents.tolist(), token_ids.tolist(), strict=True)
        ]
        values, tokens = np.empty((len(paths), num), np.float32), np.empty((len(paths), num), np.int32)
        for row, path in enumerate(paths):
            found = {token: score + self.shift for token, score in state.text.scores(path).items()}
            weight = self.never_weight + sum(
                math.exp(score) - math.exp(-v / self.vocab_size) for v, score in found.items()
            )
            guesses = sorted(found.items(), key=lambda guess: -guess[1])[:num]
            others = (v for v in range(self.vocab_size) if v not in found)
            guesses += [(v, -v / self.vocab_size) for v in itertools.islice(others, num - len(guesses))]
            tokens[row], scores = zip(*guesses, strict=True)
            values[row] = np.array(scores) - math.log(weight)
        return values, tokens, state._replace(paths=paths)
