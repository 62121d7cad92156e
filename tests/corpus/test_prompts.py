"""The prompts of a file, in all shapes, and the mistakes in it."""

import json

import pytest

from corpus.prompts import Prompt, read_prompts
from corpus.write import main
from runtime.entry import run_entry


def test_prompts_are_read_from_either_shape(tmp_path):
    path = tmp_path / "prompts.jsonl"
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi "},
        {"from": "gpt", "value": "Yo"},
        {"from": "human", "value": "Bye"},
    ]
    others = [{"role": "user", "content": "And this"}]
    records = [
        {"question_id": 1, "turns": ["One", " ", "Two"], "category": "math"},
        {"conversations": turns},
        {"turns": []},
        {"messages": others, "category": None},
    ]
    expected = [Prompt(("One", "Two"), "math"), Prompt(("Hi", "Bye")), Prompt(("And this",))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_prompts(path) == expected
    path.write_text(json.dumps(records, indent=1))
    assert read_prompts(path) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"turns": [1]}, "turn 0 holds 1, expected text"),
        ({"turns": "Hi"}, "expected a list under turns, got 'Hi'"),
        ({"prompt": "Hi"}, "expected a list under conversations or messages, got the keys prompt"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "turn 0 is from"),
        (["Hi"], "got a list, expected an object"),
    ],
)
def test_a_bad_prompt_is_reported_with_file_and_line(tmp_path, capsys, record, reason):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "x.jsonl"
    path.write_text('{"turns": ["Fine"]}\n' + json.dumps(record) + "\n")
    assert run_entry(main, ["--prompts", str(path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{path} line 2: " in error and reason in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "reason"), [('{"turns": []}\n', "no user's turn"), ("What is this?\n", "line 1: not valid JSON")]
)
def test_a_file_without_prompts_is_refused(tmp_path, text, reason):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.jsonl")
