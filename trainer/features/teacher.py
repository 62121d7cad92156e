"""Where a head learns the backbone's distribution from: the backbone itself, or files written with the corpus.

A teacher is called with the features of a batch, its tokens and where its sequences begin. Row r of its answer is the
distribution of token r + 1, given the tokens of its sequence up to and including token r, over the k most probable
tokens: their probabilities are renormalized to 1.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from heads.base import Features
from runtime import jt
from runtime.types import Var
from trainer.features.top_k import Shard, likeliest, open_shards, token_hash

# (features, token_ids (tokens,) int32, offsets (sequences + 1,) int64), sequences end to end ->
# ids (tokens, k) int32, probabilities (tokens, k) float32, largest first. A row without any has ids -1 and all 0.
Teacher = Callable[[Features, np.ndarray, np.ndarray], tuple[Var, Var]]


def open_teacher(backbone, k: int, path: str | None = None) -> Teacher:
    """The teacher over the k most probable tokens: the files at ``path``, or the backbone itself for None.

    Raises ValueError for a k that the vocabulary or the files do not have, and for files of another backbone.
    """
    if path is None:
        return BackboneTeacher(backbone, k)
    teacher = StoredTeacher(path, k)
    wrote = teacher.shards[0].about["backbone"]
    if wrote != backbone.fingerprint:
        raise ValueError(
            f"--teacher {path} was written by backbone {wrote}, not by this one, {backbone.fingerprint} "
            f"({backbone.path or 'embedded'}); pass the --backbone that wrote it, or leave --teacher out"
        )
    return teacher


class BackboneTeacher:
    """Computes the distributions from the hidden states of the batch, through the language-model head."""

    def __init__(self, backbone, k: int):
        """Raises ValueError when the vocabulary has fewer than k tokens."""
        if not 1 <= k <= backbone.config.vocab_size:
            raise ValueError(
                f"--kl-top is {k}, expected 1 to the {backbone.config.vocab_size} tokens of the vocabulary"
            )
        self.backbone, self.k = backbone, k

    def __call__(self, features: Features, token_ids: np.ndarray, offsets: np.ndarray):
        """See ``Teacher``. Probabilities are as exact as the features, which a cache stores in float16."""
        hidden = features.hidden.reshape(-1, features.hidden.shape[-1])
        assert hidden.shape[0] == len(token_ids) == offsets[-1], (hidden.shape, len(token_ids), offsets[-1])
        ids, log_probabilities = likeliest(self.backbone, hidden, self.k)
        with jt.no_grad():
            probabilities = log_probabilities.exp()
            return ids, probabilities / probabilities.sum(1, keepdims=True)


class StoredTeacher:
    """Reads the distributions from the files that ``python -m corpus --top-k-probabilities`` wrote.

    A sequence is found by its tokens, complete or truncated to the trainer's longest length: the distributions of a
    beginning do not depend on what follows.
    """

    def __init__(self, path: str | Path, k: int):
        """Raises ValueError for a path without such files and for a k that is larger than theirs."""
        self.path, self.k, self.shards = path, k, open_shards(Path(path))
        stored = self.shards[0].about["k"]
        if not 1 <= k <= stored:
            raise ValueError(
                f"--kl-top is {k}, --teacher {path} holds the {stored} most probable tokens; expected 1 to {stored}"
            )
        # All sequences that a trainer truncates have one length: the places of complete ones and of that length.
        self._places_of = functools.lru_cache(2)(self._places)

    def _places(self, length: int | None) -> dict[str, tuple[Shard, int]]:
        """File and first row of every conversation, by the hash of its tokens; with a length, of the longer ones, by
        the hash of their first ``length`` tokens."""
        places = {}
        for shard in self.shards:
            tokens, offsets = shard.token_ids[:], shard.offsets
            for first, last in itertools.pairwise(offsets.tolist()):
                if length is None:
                    places.setdefault(token_hash(tokens[first:last]), (shard, first))
                elif last - first > length:
                    places.setdefault(token_hash(tokens[first : first + length]), (shard, first))
        return places

    def locate(self, token_ids: np.ndarray, offsets: np.ndarray) -> list[tuple[Shard, int]]:
        """File and first row of each sequence. Raises ValueError naming the first one that the files do not hold."""
        assert offsets[0] == 0 and offsets[-1] == len(token_ids), (offsets[[0, -1]], len(token_ids))
        places = []
        for number, (first, last) in enumerate(itertools.pairwise(offsets.tolist())):
            tokens, length = token_ids[first:last], last - first
            digest = token_hash(tokens)
            place = self._places_of(None).get(digest) or self._places_of(length).get(digest)
            if place is None or not np.array_equal(place[0].token_ids[place[1] : place[1] + length], tokens):
                raise ValueError(
                    f"--teacher {self.path} does not hold conversation {number} ({length} tokens, the last of them "
                    f"{', '.join(map(str, tokens[-4:].tolist()))}); it was written for other text or another tokenizer"
                )
            places.append(place)
        return places

    def __call__(self, features: Features, token_ids: np.ndarray, offsets: np.ndarray):
        """See ``Teacher``; the features are not looked at. Raises ValueError as ``locate`` does."""
        ids = np.empty((len(token_ids), self.k), np.int32)
        probabilities = np.empty((len(token_ids), self.k), np.float32)
        places = self.locate(token_ids, offsets)
        for (shard, row), (first, last) in zip(places, itertools.pairwise(offsets.tolist()), strict=True):
            rows = slice(row, row + last - first)
            ids[first:last] = shard.ids[rows][:, : self.k]
            probabilities[first:last] = shard.probabilities[rows][:, : self.k]
        totals = probabilities.sum(1, keepdims=True)
        ids[totals[:, 0] == 0] = -1
        return jt.array(ids), jt.array(probabilities / np.where(totals > 0, totals, 1))
