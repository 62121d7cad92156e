"""Conversations become tokens with a mask; batches, weights and labels are pure functions of them."""

import shutil
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backbone.tokenizer import EMBEDDED, load_tokenizer
from tests.trainer.data.made import GOOD, MESSAGES, conversations_of, numbered, talk, write_lines
from trainer.data.conversations import Conversation, DataReport
from trainer.data.tokens import (
    IGNORE,
    TokenizedData,
    batches,
    encode_conversations,
    labelled_positions,
    load_data,
    repeats,
    targets,
)


def test_tokens_and_mask_are_those_of_the_tokenizer(tokenizer):
    longer = ({"role": "system", "content": "S"}, *MESSAGES, *MESSAGES)
    data = encode_conversations([Conversation(MESSAGES), Conversation(longer)], tokenizer, 512)
    assert (data.token_ids.dtype, data.mask.dtype, data.offsets.dtype) == (np.int32, np.bool_, np.int64)
    for index, messages in enumerate((MESSAGES, longer)):
        ids, mask = tokenizer.encode_with_mask(messages)
        assert data.conversation(index)[0].tolist() == ids and data.conversation(index)[1].tolist() == mask
    assert len(data) == 2 and data.lengths.sum() == data.offsets[-1] == len(data.token_ids)


def test_long_conversations_are_truncated_and_those_left_without_an_answer_dropped(tokenizer):
    ids, mask = tokenizer.encode_with_mask(MESSAGES)
    first = mask.index(True)
    report = DataReport(files=["d.jsonl"], read=1)
    data = encode_conversations([Conversation(MESSAGES)], tokenizer, first + 1, report)
    assert data.token_ids.tolist() == ids[: first + 1] and data.mask.sum() == 1
    assert (report.truncated, report.too_long, report.tokens, report.loss_tokens) == (1, 0, first + 1, 1)
    assert report.summary().endswith(f"1 truncated; {first + 1} tokens, 1 of them in the loss")
    encode_conversations([Conversation(MESSAGES)], tokenizer, len(ids), report)
    assert (report.truncated, report.too_long) == (0, 0)

    system = {"role": "system", "content": ""}
    shorter = Conversation((system, *MESSAGES))
    data = encode_conversations([Conversation(MESSAGES), shorter], tokenizer, first, report)
    assert len(data) == 1 and (report.kept, report.too_long) == (1, 1)
    with pytest.raises(ValueError, match=r"none of 1 conversations from d\.jsonl has a token in the loss .* first 3"):
        encode_conversations([Conversation(MESSAGES)], tokenizer, 3, report)


STRICT = """{% if messages[0].role == 'system' %}{{ raise_exception('no system texts here') }}{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def test_a_conversation_that_the_template_refuses_is_left_out_counted_and_named(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "strict", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "strict" / "chat_template.jinja").write_text(STRICT)
    tokenizer, refused = load_tokenizer(tmp_path / "strict"), talk("s:Be brief.", "h:Hi", "g:Hello")
    path, options = tmp_path / "d.jsonl", {"max_length": 64, "block_size": 64}
    data, report = load_data([write_lines(path, GOOD, refused, GOOD, GOOD)], tokenizer, **options)
    assert (len(data), report.read, report.refused, report.kept) == (3, 4, 1, 3)
    expected = tokenizer.encode_with_mask(MESSAGES)
    assert [tuple(map(list, data.conversation(index))) for index in range(3)] == [expected] * 3
    assert (
        "dropped 1 refused; left out: the chat template refuses this conversation: no system texts here (1, first"
        in (report.summary())
    )
    assert list(report.as_dict()["left_out"].values()) == [{"records": 1, "first": "d.jsonl line 2"}]
    with pytest.raises(
        ValueError, match=r"no conversation of .*d\.jsonl can be used: .*no system texts.*; see --template"
    ):
        load_data([write_lines(path, refused, refused)], tokenizer, **options)


def test_select_takes_conversations_in_order():
    data = numbered([2, 1, 3])
    assert conversations_of(data.select([2, 0])) == [(3, 4, 5), (0, 1)]
    assert conversations_of(data.select([])) == [] and data.select([]).offsets.tolist() == [0]
    assert data.weights.tolist() == [1.0] * 3 and data.weights.dtype == np.float64
    assert numbered([2, 1, 3], weights=[1, 2, 0.5]).select([2, 0]).weights.tolist() == [0.5, 1.0]


def test_batches_fill_greedily_in_the_order_drawn():
    data = numbered([3, 4, 2, 9])
    for seed in range(20):
        drawn = batches(data, 8, seed=seed)
        order = [index for batch in drawn for index in batch]
        assert sorted(order) == [0, 1, 2, 3]
        for batch, following in pairwise(drawn):
            total = data.lengths[batch].sum()
            assert total <= 8 or len(batch) == 1
            assert total + data.lengths[following[0]] > 8  # it would not have fitted
        if order == [0, 1, 2, 3]:
            assert drawn == [[0, 1], [2], [3]]


def test_batches_are_those_that_earlier_states_were_written_with():
    data = numbered([5, 3, 8, 2, 7, 4, 6, 1], weights=np.ones(8))
    drawn = batches(data, 10, seed=1, epoch=2)
    assert drawn == [[6], [0, 7, 5], [1, 4], [3, 2]]
    assert batches(data, 10, seed=2, epoch=2) != drawn != batches(data, 10, seed=1, epoch=1)


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from([0.1, 0.3, 1 / 3, 0.5, 1.0, 2.0, 2.7, 3.25]), min_size=1, max_size=12), st.integers(0, 99)
)
@example([1.0, 0.5, 0.5, 0.5, 0.5, 2.5, 2.5], 0)
def test_epochs_add_up_to_the_weights(weights, seed):
    weights, epochs = np.array(weights), 40
    counts = np.stack([repeats(weights, seed, epoch) for epoch in range(epochs)])
    # Neither over the first epochs nor in any one is a sequence one repetition away from its weight.
    expected = np.arange(1, epochs + 1)[:, None] * weights
    assert (np.abs(np.cumsum(counts, axis=0) - expected) < 1).all()
    assert (np.abs(counts - weights) < 1).all()
    for weight in np.unique(weights):  # nor are the sequences of one weight together
        alike = weights == weight
        assert (np.abs(counts[:, alike].sum(axis=1) - weight * alike.sum()) < 1 + 1e-9).all()


def test_the_seed_decides_which_sequences_of_a_weight_an_epoch_takes():
    drawn = np.stack([repeats(np.full(8, 0.5), seed, 0) for seed in range(20)])
    assert len(np.unique(drawn, axis=0)) > 10 and (drawn.sum(axis=1) == 4).all()
    assert repeats(np.zeros(0), 0, 0).shape == (0,)


def test_a_sequence_of_weight_two_is_in_the_batches_twice():
    data = numbered([3, 9, 2], weights=[2.0, 3.0, 1.0])
    for seed in range(20):
        drawn = batches(data, 8, seed=seed, epoch=1)
        assert sorted(chain(*drawn)) == [0, 0, 1, 1, 1, 2]
        assert all(data.lengths[batch].sum() <= 8 or len(batch) == 1 for batch in drawn)
        assert [data.select(batch).offsets[-1] for batch in drawn] == [data.lengths[batch].sum() for batch in drawn]
    assert batches(numbered([3], weights=[0.25]), 8, epoch=0) == []  # an epoch may take nothing


def test_targets_of_five_tokens_by_hand():
    ids = np.array([10, 11, 12, 13, 14], dtype=np.int32)
    mask = np.array([False, False, True, True, True])
    data = TokenizedData(ids, mask, np.array([0, 5]))
    labels = targets(data, num_depths=2)
    assert labels.dtype == np.int32
    assert labels.tolist() == [[12, 13, 14, IGNORE, IGNORE], [13, 14, IGNORE, IGNORE, IGNORE]]
    positions, found = labelled_positions(data, num_depths=2)
    assert positions.tolist() == [1, 2] and found.tolist() == [[13, 14], [14, IGNORE]]  # the root of 0 is the user's


def targets_one_by_one(mask, ids, offsets, num_depths):
    labels = np.full((num_depths, len(ids)), IGNORE)
    for start, end in pairwise(offsets):
        for depth in range(num_depths):
            for t in range(start, end):
                if t + 2 + depth < end and mask[t + 2 + depth]:
                    labels[depth, t] = ids[t + 2 + depth]
    return labels


def test_targets_stay_inside_their_conversation_and_equal_the_plain_loop():
    order = np.random.default_rng(0)
    for lengths in ([1], [2], [3, 1, 2], [5, 0, 7, 4], [1, 1, 1, 1]):
        data = numbered(lengths, first=100)
        mask = order.random(len(data.token_ids)) < 0.7
        for num_depths in (1, 3, 9):
            found = targets(TokenizedData(data.token_ids, mask, data.offsets), num_depths)
            expected = targets_one_by_one(mask, data.token_ids, data.offsets, num_depths)
            np.testing.assert_array_equal(found, expected)
    # The control: as one conversation, the same tokens have labels that cross the borders.
    data = numbered([5, 7])
    joined = targets(TokenizedData(data.token_ids, data.mask, np.array([0, 12])), 2)
    assert not np.array_equal(joined, targets(data, 2))
