"""The backbone's own conversations: the same file whatever the batch, and replies that it generates by itself."""

import gzip
import json
import shutil

import numpy as np
import pytest

from backbone.tokenizer import EMBEDDED, load_tokenizer
from corpus.dialogue import DECIDE, USER, Dialogue, Writer, in_loop
from corpus.lanes import Batch
from corpus.options import Options
from corpus.write import main, write_corpus
from ops.select import argmax
from runtime.entry import run_entry
from trainer.data.conversations import load_conversations
from trainer.data.prompts import Prompt
from trainer.data.tokens import encode_conversations
from trainer.features.teacher import open_teacher
from trainer.features.top_k import top_k_folder


def options(**changes):
    return Options(**{"num_conversations": 6, "batch_size": 8, "greedy_share": 1.0, "max_turns": 3} | changes)


def records_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def corpus(backbone, tokenizer, tmp_path_factory):
    """(path, counts) of a few conversations, some with sampled replies."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl.gz"
    return path, write_corpus(backbone, tokenizer, options(greedy_share=0.5), path)


def greedy_reply(backbone, tokenizer, messages, most):
    """The reply by a separate loop, one token a pass; None if it does not end."""
    ids = tokenizer.encode_chat(messages)
    cache = backbone.new_cache(len(ids) + most)
    out, rows = [], ids
    while len(out) < most:
        logits = backbone.forward(np.array([rows], np.int32), cache=cache, logits="last").logits
        cache.commit(range(len(rows)))
        token = int(argmax(logits.reshape(1, -1)).numpy()[0])
        if token in tokenizer.eos_ids:
            return tokenizer.decode(out).strip()
        out.append(token)
        rows = [token]
    return None


# The file ------------------------------------------------------------------------------------------------------------


def test_the_same_options_give_the_same_bytes_at_any_batch_size(backbone, tokenizer, corpus, tmp_path):
    path, counts = corpus
    for batch_size in (8, 3):
        again = tmp_path / f"{batch_size}.jsonl.gz"
        write_corpus(backbone, tokenizer, options(greedy_share=0.5, batch_size=batch_size), again)
        assert again.read_bytes() == path.read_bytes()
    write_corpus(backbone, tokenizer, options(greedy_share=0.5, seed=1), tmp_path / "other.gz")
    assert (tmp_path / "other.gz").read_bytes() != path.read_bytes()
    assert counts.accepted == len(records_of(path)) == 6
    conversations, report = load_conversations(path)
    assert (report.kept, report.trimmed) == (6, 0)
    tokens = sum(len(ids) for ids, _ in tokenizer.encode_many_with_mask([talk.messages for talk in conversations]))
    assert tokens == counts.tokens


def test_fewer_conversations_are_the_beginning_of_more(backbone, tokenizer, corpus, tmp_path):
    write_corpus(backbone, tokenizer, options(greedy_share=0.5, num_conversations=2), tmp_path / "two.gz")
    assert records_of(tmp_path / "two.gz") == records_of(corpus[0])[:2]


@pytest.mark.parametrize("max_length", [512, 90])
def test_the_trainer_finds_its_tokens_in_the_top_k_files(backbone, tokenizer, tmp_path, max_length):
    path = tmp_path / "corpus.jsonl.gz"
    write_corpus(backbone, tokenizer, options(top_k_probabilities=4), path)
    data = encode_conversations(load_conversations(path)[0], tokenizer, max_length)
    assert data.lengths.max() > 90 or max_length == 90
    teacher = open_teacher(backbone, 4, str(top_k_folder(path)))
    ids, probabilities = (v.numpy() for v in teacher(None, data.token_ids, data.offsets))
    output = backbone.forward(data.conversation(1)[0][None])
    rows = slice(data.offsets[1], data.offsets[2])
    assert (ids[rows, 0] == output.chosen.numpy()[0]).all()
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-5
    with pytest.raises(ValueError, match="does not hold"):
        teacher(None, data.token_ids[1:], np.maximum(data.offsets - 1, 0))


# What is generated ---------------------------------------------------------------------------------------------------


def test_greedy_replies_are_those_of_a_loop_of_one_token_at_a_time(backbone, tokenizer, tmp_path):
    prompts = [
        Prompt("1", "chat", ("I need a hotel in Paris.", "For two nights.")),
        Prompt("2", "chat", ("How are you?",)),
        Prompt("3", "chat", ("Tom has 3 apples and buys 4 more. How many apples has he?",)),
    ]
    path = tmp_path / "replies.jsonl.gz"
    write_corpus(backbone, tokenizer, Options(batch_size=2, greedy_share=1.0), path, prompts)
    records = records_of(path)
    assert len(records) == len(prompts)
    for record, prompt in zip(records, prompts, strict=True):
        turns = [turn["value"] for turn in record["conversations"]]
        assert tuple(turns[::2]) == prompt.turns
        messages = []
        for question, reply in zip(turns[::2], turns[1::2], strict=True):
            messages.append({"role": "user", "content": question})
            assert reply == greedy_reply(backbone, tokenizer, messages, 192)
            messages.append({"role": "assistant", "content": reply})


def test_a_reply_is_truncated_at_its_limit_and_a_later_truncated_turn_is_left_out(tokenizer):
    writer = Writer(tokenizer, options(max_reply_tokens=3))
    word = tokenizer.encode(" good")[0]
    dialogue = Dialogue(0, "", True, np.zeros(8), prompt=Prompt("1", "chat", ("Hi", "And you?")))
    writer.start(dialogue, "")
    assert [writer.take(dialogue, word, 0.0) for _ in range(3)] == [False, False, True]
    assert dialogue.messages[1]["content"] == "good good good" and not dialogue.dropped
    dialogue = Dialogue(0, "", True, np.zeros(8), prompt=Prompt("1", "chat", ("Hi", "And you?")))
    writer.start(dialogue, "")
    writer.take(dialogue, word, 0.0)
    assert not writer.take(dialogue, tokenizer.eos_ids[0], 0.0)  # on to the second question
    assert [writer.take(dialogue, word, 0.0) for _ in range(3)] == [False, False, True]
    assert [m["content"] for m in dialogue.messages] == ["Hi", "good"]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("", "user turn empty"),
        (" USER: I", "user turn garbled"),
        ("</s>", "user turn without an end"),
        (" word" * 9, "user turn too long"),
    ],
)
def test_an_unusable_user_turn_drops_the_conversation(tokenizer, turn, reason):
    writer = Writer(tokenizer, options(max_user_tokens=8))
    dialogue = Dialogue(0, "", True, np.zeros(8))
    writer.start(dialogue, "")
    assert any(writer.take(dialogue, token, 0.0) for token in tokenizer.encode(turn + " ASSISTANT:"))
    assert (dialogue.dropped, dialogue.messages) == (reason, [])


def test_the_tokens_before_a_reply_are_those_of_the_rendered_text(tokenizer):
    """A sampled word may consist of other tokens than the tokenizer's: the reply must not see those."""
    writer = Writer(tokenizer, options())
    dialogue = Dialogue(0, "", True, np.zeros(8))
    writer.start(dialogue, "Hello")
    dialogue.fed = len(dialogue.ids)
    letters = [token for c in " there" for token in tokenizer.encode(c)]
    assert letters != tokenizer.encode(" there")
    for token in [*letters, *tokenizer.encode(" ASSISTANT:")]:
        assert not writer.take(dialogue, token, 0.0)
        dialogue.fed = len(dialogue.ids) - 1
    assert dialogue.messages == [{"role": "user", "content": "Hello there"}]
    assert dialogue.ids == tokenizer.encode_chat(dialogue.messages)


def test_continue_is_the_probability_of_a_further_turn(tokenizer):
    turns = {}
    for probability in (0.0, 0.4, 0.6):  # the random numbers are all 0.5
        writer = Writer(tokenizer, options(continuation=probability))
        dialogue = Dialogue(0, "", True, np.full(8, 0.5))
        writer.start(dialogue, "Hello")
        for token in tokenizer.encode(" ASSISTANT: Hi"):
            writer.take(dialogue, token, 0.0)
        turns[probability] = writer.take(dialogue, tokenizer.eos_ids[0], 0.0)
    assert turns == {0.0: True, 0.4: True, 0.6: False}
    assert dialogue.ids == tokenizer.encode(tokenizer.render(dialogue.messages, False) + "USER:")


@pytest.mark.parametrize("head_follows", [False, True])
def test_the_backbone_decides_on_a_further_turn_before_the_templates_next_head(tmp_path, head_follows):
    shutil.copytree(EMBEDDED, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    always = "" if head_follows else "{% if add_generation_prompt %}"
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        f"{always}<assistant>{'' if head_follows else '{% endif %}'}"
    )
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    writer, dialogue = Writer(tokenizer, options()), Dialogue(0, "", True, np.full(8, 0.5))
    writer.start(dialogue, "Hello")
    for token in writer.marker_ids:
        if dialogue.phase == USER:
            writer.take(dialogue, token, 0.0)
    for token in tokenizer.encode("Hi"):
        writer.take(dialogue, token, 0.0)
    assert not writer.take(dialogue, tokenizer.eos_ids[0], 0.0) and dialogue.phase == DECIDE
    written = "<user>Hello</s>\n<assistant>Hi</s>\n"
    assert tokenizer.decode(dialogue.ids, False) == written
    assert tokenizer.decode([*dialogue.ids, dialogue.awaited], False) == f"{written}<"


# Parts ---------------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_from_the_most_probable_with_the_dialogues_own_numbers(backbone, tokenizer):
    def columns(top_p, temperature):
        batch = Batch(backbone, Writer(tokenizer, options(top_p=top_p, temperature_user=temperature)), 4)
        dialogues = [Dialogue(0, "", True, np.array([u])) for u in (0.99, 0.5, 0.7, 0.99)]
        return batch._choose(np.log(np.array([[0.6, 0.3, 0.1]] * 4)), dialogues).tolist()

    assert columns(1.0, 0.0) == [0, 0, 0, 0]
    assert columns(1.0, 1.0) == [2, 0, 1, 2]
    assert columns(0.8, 1.0) == [1, 0, 1, 1]
    assert columns(0.5, 1.0) == [0, 0, 0, 0]


def test_a_repeated_tail_is_a_loop():
    assert in_loop([9, 9, *[1, 2, 3] * 30])
    assert not in_loop([1, 2, 3] * 10)
    assert not in_loop(list(range(30)) * 5)


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        "--temperature-user nan",
        "--top-p 0",
        "--continue 2",
        "--max-length 40",
        "--max-length 4096",
        "--top-k-probabilities 99999",
    ],
)
def test_a_bad_option_is_reported_in_one_line(wrong, tmp_path, capsys):
    arguments = ["--num-conversations", "1", "--out", str(tmp_path / "x.jsonl.gz"), *wrong.split()]
    assert run_entry(main, arguments) == 2
    assert wrong.split()[0] in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("backbone.model.load_backbone", lambda *_, **__: pytest.fail("read the model"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "x.jsonl.gz", tmp_path):
        assert run_entry(main, ["--num-tokens", "9", "--out", str(out)]) == 2
        assert str(out) in capsys.readouterr().err
    assert run_entry(main, ["--out", str(tmp_path / "x.gz")]) == 2
    assert "--num-tokens" in capsys.readouterr().err


def test_the_command_line_answers_every_prompt_in_order(tmp_path, capsys, backbone, tokenizer, monkeypatch):
    monkeypatch.setattr("backbone.model.load_backbone", lambda *_, **__: backbone)
    turns = [
        ["Hi"],
        ["How are you?"] * 6,
        ["Hi"],
        ["half of \ud83d"],
        ["word " * 600],
        ["I need a hotel.", "In Paris."],
    ]
    path, out = tmp_path / "prompts.jsonl", tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    assert run_entry(main, ["--prompts", str(path), "--temperature", "0", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["id"] for r in records] == ["question-0", "question-1", "question-2", "question-5"]
    for record in records:
        index = int(record["id"].split("-")[1])
        values = [turn["value"] for turn in record["conversations"]]
        assert values[::2] == turns[index]
        messages = [{"role": "user", "content": values[0]}]
        assert values[1] == greedy_reply(backbone, tokenizer, messages, 192)
    report = capsys.readouterr().out
    assert "4 conversations, 10 turns" in report and "4 with greedy replies" in report
    assert "dropped 2 of 6: 1 prompt refused: message 0 holds half a character" in report
    assert "(first: prompts.jsonl line 4), 1 prompt too long (first: prompts.jsonl line 5)" in report


def test_system_texts_are_part_of_the_corpus_and_stop_tokens_that_are_words_end_a_reply(tokenizer, monkeypatch):
    writer = Writer(tokenizer, options())
    prompt = Prompt("1", "chat", ("Hi", "And you?"), "Be brief.")
    dialogue, word = Dialogue(0, "", True, np.zeros(8), prompt=prompt), tokenizer.encode(" good")[0]
    writer.start(dialogue, "")
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert dialogue.messages == [system, question] and dialogue.ids == tokenizer.encode_chat([system, question])
    stop = tokenizer.encode(" yes")[0]
    assert stop not in writer.special
    monkeypatch.setattr(tokenizer, "eos_ids", (2, stop))
    assert not writer.take(dialogue, word, 0.0) and not writer.take(dialogue, stop, 0.0)
    assert [m["content"] for m in dialogue.messages] == ["Be brief.", "Hi", "good", "And you?"]
    assert dialogue.num_turns == 1
    assert not writer.take(dialogue, word, 0.0) and writer.take(dialogue, 2, 0.0)
    assert [m["role"] for m in dialogue.messages] == ["system", *["user", "assistant"] * 2]


def test_a_refused_prompt_is_dropped_with_its_reason(tokenizer):
    writer = Writer(tokenizer, options())
    for turns, system, kept in ((("\ud83d",), "Be brief.", 0), (("Hi", "\ud83d"), None, 2)):
        dialogue = Dialogue(0, "", True, np.zeros(8), prompt=Prompt("1", "chat", turns, system))
        writer.start(dialogue, "")
        if kept:
            writer.take(dialogue, tokenizer.encode(" good")[0], 0.0)
            assert writer.take(dialogue, 2, 0.0)
        assert len(dialogue.messages) == kept
        assert "half a character" in (dialogue.cut if kept else dialogue.dropped)


def test_a_conversation_that_training_would_leave_out_is_dropped(tokenizer, monkeypatch):
    def refuse(messages):
        raise ValueError("the history is rewritten")

    writer, dialogue = (
        Writer(tokenizer, options()),
        Dialogue(0, "", True, np.zeros(8), prompt=Prompt("1", "c", ("Hi",))),
    )
    monkeypatch.setattr(tokenizer, "encode_with_mask", refuse)
    writer.start(dialogue, "")
    assert not writer.take(dialogue, tokenizer.encode(" good")[0], 0.0) and writer.take(dialogue, 2, 0.0)
    assert (dialogue.dropped, dialogue.messages) == ("conversation refused: the history is rewritten", [])


def test_a_temperature_samples_every_reply_unless_a_greedy_share_is_given():
    shares = [
        (Options(**given).temperature, Options(**given).greedy_share)
        for given in ({}, {"temperature": 0.9}, {"temperature": 0.9, "greedy_share": 0.5}, {"greedy_share": 0.1})
    ]
    assert shares == [(0.7, 0.8), (0.9, 0.0), (0.9, 0.5), (0.7, 0.1)]


def test_the_command_line_reports_what_it_writes_and_passes_on_the_storage(tmp_path, capsys, backbone, monkeypatch):
    calls = []

    def load(*arguments):
        calls.append(arguments)
        return backbone

    monkeypatch.setattr("backbone.model.load_backbone", load)
    arguments = ["--num-conversations", "1", "--max-turns", "1", "--batch-size", "2"]
    for name, flags in (("a", []), ("b", ["--load-in-8bit", "--dtype", "float32"]), ("c", ["--load-in-4bit"])):
        assert run_entry(main, [*arguments, *flags, "--out", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert out.startswith("1 conversations, 1 turns") and f"{(tmp_path / name).stat().st_size:,} bytes" in out
    assert calls == [
        (None, "float16", False, False),
        (None, "float32", True, False),
        (None, "float16", False, True),
    ]
