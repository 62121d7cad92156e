"""Sequences made for tests."""

from itertools import pairwise

import numpy as np

from trainer.data.tokens import TokenizedData


def numbered(lengths, first=0, weights=None):
    """Conversations of these lengths, every token different, all the assistant's."""
    starts = np.cumsum([first, *lengths])
    return TokenizedData.of(((np.arange(a, b), np.ones(b - a, bool)) for a, b in pairwise(starts)), weights)


def conversations_of(data):
    return [tuple(data.conversation(index)[0].tolist()) for index in range(len(data))]
