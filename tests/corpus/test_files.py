"""What goes into a corpus: which prompts a file gives, and which conversations are kept."""

import json

import numpy as np
import pytest

from corpus.dialogue import Prompt, Talk
from corpus.files import Corpus, read_prompts
from corpus.write import Options, main
from runtime.entry import run_entry


def test_loops_and_repeated_openings_are_kept_to_their_share():
    corpus = Corpus(Options(max_loops=0.5))

    def talk(question, loops=False):
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
        return Talk(0, "", True, np.zeros(1), messages=said, loops=loops)

    kept = [corpus.keep(t) for t in (talk("a"), talk("A"), talk("b", True), talk("c", True), talk("d"))]
    assert kept == [True, False, True, False, True]
    assert corpus.dropped == {"same opening as an earlier one": 1, "reply in a loop": 1}


def test_prompts_are_read_from_either_shape(tmp_path):
    path = tmp_path / "prompts.jsonl"
    said = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi "},
        {"from": "gpt", "value": "Yo"},
        {"from": "human", "value": "Bye"},
    ]
    others = [{"role": "user", "content": "And this"}]
    records = [
        {"question_id": 1, "turns": ["One", " ", "Two"], "category": "math"},
        {"conversations": said},
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
        ({"prompt": "Hi"}, "expected turns, conversations or messages, got the keys prompt"),
        ({"conversations": ["Hi"]}, "turn 0 is 'Hi', expected an object"),
        ({"conversations": [{"from": "narrator", "value": "Hi"}]}, "turn 0 is from 'narrator', expected one of human"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "turn 0 is from"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 0 holds None"),
        (["Hi"], "got a list, expected an object"),
    ],
)
def test_a_bad_prompt_is_answered_with_file_and_line(tmp_path, capsys, record, reason):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "x.jsonl"
    path.write_text('{"turns": ["Fine"]}\n' + json.dumps(record) + "\n")
    assert run_entry(main, ["--prompts", str(path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"{path} line 2: " in said and reason in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "reason"), [('{"turns": []}\n', "no user's turn"), ("What is this?\n", "line 1: not valid JSON")]
)
def test_a_file_without_prompts_is_refused(tmp_path, text, reason):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.jsonl")


def test_conversations_that_end_before_their_last_prompt_are_counted():
    corpus = Corpus(Options())
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Yes."}]
    for questions in (("a",), ("a", "b"), ("a", "b", "c")):
        assert corpus.keep(Talk(0, "", True, np.zeros(1), questions=questions, messages=said, num_tokens=9))
    assert "\n2 end before the last of their given turns" in corpus.summary()


def test_of_given_prompts_none_is_left_out_for_being_a_copy_or_for_its_loop():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Yes."}]

    def kept(**changes):
        corpus = Corpus(Options(**changes))
        return [
            corpus.keep(Talk(i, "", True, np.zeros(1), questions=("a",), messages=said, loops=i > 0)) for i in range(4)
        ]

    assert kept() == [True, True, True, True]
    assert kept(max_loops=0.5) == [True, True, False, False]
