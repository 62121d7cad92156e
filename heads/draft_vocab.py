"""A draft vocabulary: the most frequent tokens of the training replies (EAGLE-3, arXiv 2503.01840)."""

from __future__ import annotations

import numpy as np

from runtime import jt


class DraftVocabulary:
    """A mixin for heads whose config has ``draft_vocab_size``, 0 for every token. ``drafted``: (size,) int32, the
    tokens it drafts, saved with the weights; the first ones until ``choose_tokens``."""

    buffers = ("drafted",)

    def begin_with_first_tokens(self) -> None:
        """Called by the constructor."""
        if self.config.draft_vocab_size:
            self.drafted = jt.array(np.arange(self.config.draft_vocab_size, dtype=np.int32)).stop_grad()
        self._read_drafted = None, None  # the Var that was read, by its id, and the array

    def choose_tokens(self, token_counts: np.ndarray) -> bool:
        """Take the most frequent tokens, in ascending order. token_counts: (vocab,). False where all are drafted."""
        if not self.config.draft_vocab_size:
            return False
        frequent = np.argsort(-token_counts, kind="stable")[: self.config.draft_vocab_size]
        self.drafted.update(np.sort(frequent).astype(np.int32))
        return True

    @property
    def draft_vocab(self) -> np.ndarray | None:
        """As in ``Head``. Read from the device once: a Var that is updated gets another id."""
        if not self.config.draft_vocab_size:
            return None
        if self._read_drafted[0] != self.drafted.id:
            self._read_drafted = self.drafted.id, self.drafted.numpy()
        return self._read_drafted[1]
