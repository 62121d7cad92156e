"""Files become conversations, conversations tokens with a mask, and every number lost on the way is counted."""

import gzip
import io
import json
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.tokenizer import load_tokenizer
from trainer.data.inspect import inspect, main
from trainer.data.tokens import (
    IGNORE,
    Conversation,
    DataReport,
    TokenizedData,
    batches,
    encode_conversations,
    load_conversations,
    repeats,
    split_held_out,
    targets,
    useful_positions,
)

DEV = Path(__file__).resolve().parents[4] / "shared" / "data" / "chat" / "dev.jsonl.gz"


def talk(*turns):
    """A ShareGPT record: "h:..." is the human's, "g:..." gpt's, "s:..." the system's."""
    names = {"h": "human", "g": "gpt", "s": "system"}
    return {"id": "x", "conversations": [{"from": names[turn[0]], "value": turn[2:]} for turn in turns]}


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


GOOD = talk("h:Hi", "g:Hello")
MESSAGES = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


# Reading


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", ["list", "pretty list", "lines", "lines with gaps"])
def test_every_container_gives_the_same_conversations(tmp_path, shape, packed):
    records = [{**GOOD, "category": "math"}, talk("s:Be brief.", "h:a", "g:b\u2028c", "h:d", "g:e")]
    text = {
        "list": json.dumps(records, ensure_ascii=False),
        "pretty list": "\n " + json.dumps(records, indent=2) + "\n",
        "lines": "\n".join(json.dumps(record, ensure_ascii=False) for record in records),
        "lines with gaps": "\ufeff" + "\r\n\r\n".join(json.dumps(record) for record in records) + "\r\n",
    }[shape]
    path = tmp_path / "data.json"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    conversations, report = load_conversations([path])
    assert conversations[0] == Conversation(MESSAGES, id="x", category="math")
    assert [turn["role"] for turn in conversations[1].messages] == ["system", *["user", "assistant"] * 2]
    assert conversations[1].messages[2]["content"] == "b\u2028c"
    assert (report.read, report.kept) == (2, 2)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ],
)
def test_every_record_shape_gives_the_same_messages(tmp_path, record):
    conversations, _ = load_conversations(write_lines(tmp_path / "d.jsonl", record))
    assert conversations[0].messages == MESSAGES


def test_what_cannot_be_learnt_from_is_counted_and_left_out(tmp_path):
    path = write_lines(
        tmp_path / "d.jsonl",
        GOOD,
        talk(),  # blank
        talk("h:Hi"),  # blank
        talk("h:Hi", "g:  "),  # blank
        talk("h:Hi", "h:there", "g:Hello"),  # two questions in a row
        talk("h:Hi", "g:Hello", "g:again"),  # two answers in a row
        talk("h:Hi", "g: ", "h:a", "g:b"),  # an empty answer among others
        talk("h: ", "g:b"),  # no question
        talk("g:Hello"),  # an answer to nothing
        talk("h:Hi", "s:Be brief.", "g:Hello"),  # a system message in the middle
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "half \ud83d"}]},
        talk("g:Welcome", "h:Hi", "g:Hello"),  # trimmed to Hi, Hello
        talk("h:Hi", "g:Hello", "h:and?"),  # trimmed to Hi, Hello
    )
    conversations, report = load_conversations([path])
    assert [conversation.messages for conversation in conversations] == [MESSAGES] * 3
    assert (report.read, report.kept, report.blank, report.malformed, report.trimmed) == (13, 3, 3, 7, 2)
    assert report.summary() == (
        "3 of 13 conversations from d.jsonl; dropped 3 blank, 7 malformed; 2 trimmed to whole question-answer turns"
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"conversations": []}\n{"conversations": [}\n', r"line 2: not valid JSON \(Expecting value, column 20\)"),
        ('[\n{"conversations": []},\n{"conversations": [}]', "line 3: not valid JSON"),
        ('[\n{"conversations": []}\n{"conversations": []}]', r"line 3: not valid JSON \(expected ',' or '\]'\)"),
        ('[{"conversations": []},\n', "line 2: not valid JSON"),
        ('[{"conversations": []}\n', "line 2: not valid JSON .*truncated"),
        ('[{"conversations": []}]\n[]', "line 2: not valid JSON .*after the list"),
        ("[\n{},\n[]]", "line 2: expected a list under conversations or messages"),
        ('[\n{"messages": []},\n[]]', "line 3: got a list"),
        ('[{\n"messages": []\n},\n{"messages":\n[]},\n\n[]]', "line 7: got a list"),
        ("3\n", "line 1: got a int"),
        ('\n{"text": "a", "id": 1}', "line 2: .* got the keys text, id"),
        ('{"messages": ["a"]}', "line 1: turn 0 is a str"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "line 1: turn 0 is from 'tool', expected one of human"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 1: turn 0 holds None"),
    ],
)
def test_broken_files_are_refused_with_file_and_line(tmp_path, text, complaint):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"d\.json " + complaint):
        load_conversations([path])


def test_unreadable_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere cannot be read: No such file"):
        load_conversations(tmp_path / "nowhere")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"[]" * 1000)[:-9])
    with pytest.raises(ValueError, match=r"cut\.gz cannot be read"):
        load_conversations(tmp_path / "cut.gz")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary is not UTF-8"):
        load_conversations(tmp_path / "binary")


@pytest.mark.parametrize("text", ["", "[]", "\n\n", '[{"messages": []}]'])
def test_no_usable_conversation_is_an_error_that_names_the_files(tmp_path, text):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(text), second.write_text(text)
    with pytest.raises(ValueError, match=r"no usable conversation in .*first\.json, .*second\.json"):
        load_conversations([first, second])
    with pytest.raises(ValueError, match="no usable conversation in no files"):
        load_conversations([])


# Tokens


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_tokens_and_mask_are_those_of_the_tokenizer(tokenizer):
    longer = ({"role": "system", "content": "S"}, *MESSAGES, *MESSAGES)
    data = encode_conversations([Conversation(MESSAGES), Conversation(longer)], tokenizer, 512)
    assert (data.token_ids.dtype, data.mask.dtype, data.offsets.dtype) == (np.int32, np.bool_, np.int64)
    for index, messages in enumerate((MESSAGES, longer)):
        ids, mask = tokenizer.encode_with_mask(messages)
        assert data.conversation(index)[0].tolist() == ids and data.conversation(index)[1].tolist() == mask
    assert len(data) == 2 and data.lengths.sum() == data.offsets[-1] == len(data.token_ids)


def test_long_conversations_are_cut_and_those_left_without_an_answer_dropped(tokenizer):
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
    with pytest.raises(ValueError, match="max_length is 0"):
        encode_conversations([Conversation(MESSAGES)], tokenizer, 0)


def numbered(lengths, first=0, weights=None):
    """Conversations of these lengths, every token different, all the assistant's."""
    starts = np.cumsum([first, *lengths])
    return TokenizedData.of(((np.arange(a, b), np.ones(b - a, bool)) for a, b in pairwise(starts)), weights)


def conversations_of(data):
    return [tuple(data.conversation(index)[0].tolist()) for index in range(len(data))]


def test_select_takes_conversations_in_order():
    data = numbered([2, 1, 3])
    assert conversations_of(data.select([2, 0])) == [(3, 4, 5), (0, 1)]
    assert conversations_of(data.select([])) == [] and data.select([]).offsets.tolist() == [0]
    assert data.weights.tolist() == [1.0] * 3 and data.weights.dtype == np.float64
    assert numbered([2, 1, 3], weights=[1, 2, 0.5]).select([2, 0]).weights.tolist() == [0.5, 1.0]


def test_held_out_conversations_are_apart_and_the_same_every_time():
    data = numbered([3] * 50)
    for amount, count in ((0.1, 10 // 2), (7, 7), (0.001, 1)):
        training, held_out = split_held_out(data, amount, seed=1)
        assert len(held_out) == count and len(training) == 50 - count
        assert sorted(conversations_of(training) + conversations_of(held_out)) == sorted(conversations_of(data))
        again = split_held_out(data, amount, seed=1)[1]
        assert conversations_of(again) == conversations_of(held_out)
    other = split_held_out(data, 7, seed=2)[1]
    assert conversations_of(other) != conversations_of(split_held_out(data, 7, seed=1)[1])


def test_the_split_follows_the_conversation_not_its_place():
    data = numbered([3] * 50)
    shuffled = data.select(np.random.default_rng(0).permutation(50))
    assert set(conversations_of(split_held_out(data, 9, 1)[1])) == set(
        conversations_of(split_held_out(shuffled, 9, 1)[1])
    )


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


@pytest.mark.parametrize("amount", [0, 50, 51, -1, 0.0, 1.0, 1.5, 0.999])
def test_impossible_splits_are_refused(amount):
    with pytest.raises(ValueError, match="expected"):
        split_held_out(numbered([3] * 50), amount, seed=0)


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


def test_batches_depend_on_seed_and_epoch_only():
    data = numbered([1, 2, 3, 4, 5] * 20)
    first = batches(data, 16, seed=3, epoch=1)
    assert first == batches(data, 16, seed=3, epoch=1)
    assert first != batches(data, 16, seed=3, epoch=2) and first != batches(data, 16, seed=4, epoch=1)
    assert sorted(chain(*first)) == list(range(100))
    capped = batches(data, 16, max_rows=2, seed=3, epoch=1)
    assert max(map(len, capped)) == 2 and sorted(chain(*capped)) == list(range(100))
    with pytest.raises(ValueError, match="tokens_per_batch is 0"):
        batches(data, 0)


def test_batches_of_weight_1_are_what_they_were_before_there_were_weights():
    data = numbered([5, 3, 8, 2, 7, 4, 6, 1], weights=np.ones(8))
    assert batches(data, 10, seed=1, epoch=2) == [[6], [0, 7, 5], [1, 4], [3, 2]]
    assert batches(data, 16, max_rows=2) == [[2, 4], [3, 6], [5, 0], [1, 7]]


def test_weights_decide_how_often_a_sequence_comes_by_hand():
    weights = np.array([1.0, 0.5, 0.5, 0.5, 0.5, 2.5, 2.5])
    first, second, third = (repeats(weights, 0, epoch) for epoch in range(3))
    assert first[0] == second[0] == 1
    assert first[1:5].sum() == second[1:5].sum() == 2 and (first + second)[1:5].tolist() == [1] * 4
    assert sorted(first[5:].tolist()) == sorted(second[5:].tolist()) == [2, 3]
    assert (first + second)[5:].tolist() == [5, 5] and third.tolist() == first.tolist()
    other = np.stack([repeats(np.full(8, 0.5), seed, 0) for seed in range(20)])
    assert len(np.unique(other, axis=0)) > 10 and (other.sum(axis=1) == 4).all()
    assert repeats(np.zeros(0), 0, 0).shape == (0,)


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from([0.1, 0.3, 1 / 3, 0.5, 1.0, 2.0, 2.7, 3.25]), min_size=1, max_size=12), st.integers(0, 99)
)
def test_epochs_add_up_to_the_weights(weights, seed):
    weights, epochs = np.array(weights), 40
    counts = np.stack([repeats(weights, seed, epoch) for epoch in range(epochs)])
    # Neither over the first epochs nor in any one is a sequence a whole time away from its weight.
    expected = np.arange(1, epochs + 1)[:, None] * weights
    assert (np.abs(np.cumsum(counts, axis=0) - expected) < 1).all()
    assert (np.abs(counts - weights) < 1).all()
    for weight in np.unique(weights):  # nor are the sequences of one weight together
        alike = weights == weight
        assert (np.abs(counts[:, alike].sum(axis=1) - weight * alike.sum()) < 1 + 1e-9).all()


def test_a_sequence_that_comes_twice_is_in_the_batches_twice():
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
    labels = targets(mask, ids, np.array([0, 5]), num_depths=2)
    assert labels.dtype == np.int32
    assert labels.tolist() == [[12, 13, 14, IGNORE, IGNORE], [13, 14, IGNORE, IGNORE, IGNORE]]
    assert useful_positions(labels).tolist() == [0, 1, 2]


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
            found = targets(mask, data.token_ids, data.offsets, num_depths)
            expected = targets_one_by_one(mask, data.token_ids, data.offsets, num_depths)
            np.testing.assert_array_equal(found, expected)
    # The control: as one conversation, the same tokens have labels that cross the borders.
    data = numbered([5, 7])
    everything = np.ones(12, bool)
    joined = targets(everything, data.token_ids, np.array([0, 12]), 2)
    assert not np.array_equal(joined, targets(everything, data.token_ids, data.offsets, 2))


# Looking at it


def test_inspect_colours_exactly_the_reply(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    inspect(write_lines(tmp_path / "d.jsonl", GOOD, GOOD), tokenizer, 1, 512, file=out)
    text = out.getvalue()
    assert "\x1b[1;32m Hello</s>\x1b[0m" in text and text.count("Hello") == 1
    assert "ASSISTANT:\x1b[0m" in text and "2 of 2 conversations from d.jsonl" in text


def test_the_command_line_answers_mistakes_with_one_line_and_status_2(tmp_path, capsys):
    path = str(write_lines(tmp_path / "d.jsonl", GOOD))
    assert main(["--inspect", path, "--count", "1"]) == 0
    assert "in the loss" in capsys.readouterr().out
    mistakes = [
        ["--inspect", "nowhere"],
        ["--inspect", path, "--template", "lama-2"],
        ["--inspect", path, "--count", "0"],
        ["--inspect", path, "--loss-on", "none"],
        ["--inspect", str(tmp_path)],
    ]
    for arguments in mistakes:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.skipif(not DEV.exists(), reason="needs the chat data")
def test_real_conversations_survive_whole(tokenizer):
    conversations, report = load_conversations(DEV)
    assert report.kept == report.read == len(conversations) == 3337 and not report.malformed
    data = encode_conversations(conversations[:200], tokenizer, 512, report)
    assert 0.2 < report.loss_tokens / report.tokens < 0.8 and data.lengths.max() <= 512
    labels = targets(data.mask, data.token_ids, data.offsets, 4)
    assert np.isin(labels[labels != IGNORE], data.token_ids[data.mask]).all()
