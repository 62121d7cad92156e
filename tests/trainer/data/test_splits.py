"""The held-out part: the same conversations every time, and none of them in training."""

import numpy as np
import pytest

from tests.trainer.data.made import conversations_of, numbered
from trainer.data.splits import split_held_out


def test_held_out_conversations_are_apart_and_the_same_every_time():
    data = numbered([3] * 50)
    training, held_out = split_held_out(data, 7, seed=1)
    assert len(held_out) == 7 and len(training) == 43
    assert sorted(conversations_of(training) + conversations_of(held_out)) == sorted(conversations_of(data))
    assert conversations_of(split_held_out(data, 7, seed=1)[1]) == conversations_of(held_out)
    assert conversations_of(split_held_out(data, 7, seed=2)[1]) != conversations_of(held_out)
    shuffled = data.select(np.random.default_rng(0).permutation(50))
    assert set(conversations_of(split_held_out(shuffled, 7, 1)[1])) == set(conversations_of(held_out))


def test_copies_of_a_conversation_stay_on_one_side():
    data = numbered([3] * 10).select(np.repeat(np.arange(10), 3))
    training, held_out = split_held_out(data, 4, seed=0)
    assert not set(conversations_of(training)) & set(conversations_of(held_out))
    assert len(held_out) == 6  # two conversations in three copies are the least that hold four
    with pytest.raises(ValueError, match="copies"):
        split_held_out(data.select([0, 1, 2]), 1, seed=0)


def test_held_out_conversations_are_scored_once_whatever_their_weight():
    data = numbered([3] * 20, weights=np.arange(20) / 4)
    training, held_out = split_held_out(data, 5, seed=0)
    assert held_out.weights.tolist() == [1.0] * 5
    assert training.weights.tolist() == [ids[0] / 12 for ids in conversations_of(training)]


@pytest.mark.parametrize("count", [0, 50])
def test_impossible_splits_are_refused(count):
    with pytest.raises(ValueError, match="expected 1 to 49"):
        split_held_out(numbered([3] * 50), count)


def test_a_single_sequence_is_too_few_and_said_so():
    with pytest.raises(ValueError, match=r"only 1 sequence to train on, and one is held out .* at least 2"):
        split_held_out(numbered([3]), 1)
