"""One reader of prompts for measurement and corpora; it sees what the trainer sees of a conversation."""

import json

import pytest

from backbone.tokenizer import load_tokenizer
from tests.trainer.data.made import talk, write_lines
from trainer.data.conversations import load_conversations
from trainer.data.prompts import Prompt, prompt_of, read_prompts

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def only(path):
    (prompt,) = read_prompts(path).prompts
    return prompt


@pytest.mark.parametrize(
    "record",
    [
        talk("s:Be brief.", "h:Hi", "g:Hello"),
        {"id": "x", "messages": [{"role": "system", "content": "Be brief."}, *HI]},
        {"id": "x", "system": "Be brief.", "messages": HI, "conversations": None},
        {"question_id": "x", "category": "chat", "system": "Be brief.", "turns": ["Hi"]},
    ],
)
def test_the_system_text_is_part_of_the_prompt(tmp_path, record):
    prompt = only(write_lines(tmp_path / "p.jsonl", record))
    assert prompt == Prompt("x", "chat", ("Hi",), "Be brief.")
    messages = [*prompt.opening(), {"role": "user", "content": "Hi"}]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    ids, bare = (load_tokenizer().encode_chat(each) for each in (messages, messages[1:]))
    assert len(ids) < len(bare) and ids != bare  # the embedded template has a longer system text of its own
    if "turns" not in record:
        (conversation,), _ = load_conversations(tmp_path / "p.jsonl")
        assert prompt_of(conversation) == Prompt("x", "", ("Hi",), "Be brief.")  # training reads the same


def test_unusable_records_are_left_out_and_counted_and_the_others_read(tmp_path):
    found = read_prompts(
        write_lines(
            tmp_path / "p.jsonl",
            {"turns": ["One", " "], "category": None, "question_id": None},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "tool"}]},
            {"turns": [1]},
            {"turns": "Hi"},
            ["Hi"],
            {"prompt": "Hi"},
            talk("h:a", "h:b"),
            talk("g:Welcome", "h:Two", "g:x", "h:Three"),
            {"conversations": [{"from": "human", "value": "Four"}, {"from": "gpt", "value": None}]},
            {"turns": ["half \ud83d"], "question_id": "\ud83d"},
        )
    )
    turns = [("One",), ("Two", "Three"), ("Four",), ("half \ud83d",)]
    assert [prompt.turns for prompt in found.prompts] == turns
    assert [prompt.prompt_id for prompt in found.prompts] == ["1", "x", "9", "\\ud83d"]
    assert found.prompts[0].category == "question"
    assert found.dropped() == {
        "blank_turns": 1,
        "blank_prompts": 0,
        "no_human_turns": 0,
        "replies_to_nothing": 1,
        "a turn from 'tool'": 1,
        "turns that are not a list of texts": 2,
        "a list instead of an object": 1,
        "an unknown shape, with the keys prompt": 1,
        "turns that do not alternate": 1,
    }
    assert "a turn from 'tool' (1, first in p.jsonl line 2)" in found.describe()


@pytest.mark.parametrize("wrap", [lambda record: record, lambda record: [record]])
def test_a_pretty_printed_record_is_read(tmp_path, wrap):
    (tmp_path / "p.json").write_text(json.dumps(wrap({"question_id": 7, "turns": ["Hi"]}), indent=1))
    assert only(tmp_path / "p.json") == Prompt("7", "question", ("Hi",))


BROKEN = ('{\n"turns": [\n"Hi }"\n]\n}', '{"turns":\n[\n"Hi }"],\n"x": {\n"y": "\\"{"\n}\n}', '{"turns": ["Hi }"]}')


@pytest.mark.parametrize("text", BROKEN)
def test_an_object_may_be_broken_across_lines_anywhere(tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{text}\n" * 3)
    assert [prompt.turns for prompt in read_prompts(path).prompts] == [("Hi }",)] * 3
    path.write_text(f"{text}\n" * 2 + text[:-1])  # the control
    with pytest.raises(ValueError, match=r"line \d+: not valid JSON"):
        read_prompts(path)
