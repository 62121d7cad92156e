"""Heads that draft some tokens alone: the most frequent of the training replies (EAGLE-3, arXiv 2503.01840)."""

from __future__ import annotations

import numpy as np

from runtime import jt


class DraftVocabulary:
    """Beside ``Head``, for a head whose config has ``draft_vocab_size``, 0 for every token. The tokens it drafts are
    ``drafted``, (size,) int32, saved with the weights and the first ones until ``choose_tokens``."""

    buffers = ("drafted",)

    def begin_with_first_tokens(self) -> None:
        """Called by the constructor."""
        if self.config.draft_vocab_size:
            self.drafted = jt.array(np.arange(self.config.draft_vocab_size, dtype=np.int32)).stop_grad()
        self._read_drafted = None, None  # the Var that was read, by its id, and the array

    def choose_tokens(self, token_counts: np.ndarray) -> bool:
        """Take the most frequent ones, in ascending order. token_counts: (vocab,). False where all are drafted."""
        if not self.config.draft_vocab_size:
            return False
        frequent = np.argsort(-token_counts, kind="stable")[: self.config.draft_vocab_size]
        self.drafted.update(np.sort(frequent).astype(np.int32))
        return True

    @property
    def draft_vocab(self) -> np.ndarray | None:
        """As ``Head`` defines it. Read from the device once: a Var that is updated gets another id."""
        if not self.config.draft_vocab_size:
            return None
        if self._read_drafted[0] != self.drafted.id:
            self._read_drafted = self.drafted.id, self.drafted.numpy()
        return self._read_drafted[1]
