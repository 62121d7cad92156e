"""Prompt files: recognized by shape, refused with a place, spread over categories."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.record.prompts import Prompt, join_prompt_sets, load_prompts, spread

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published prompt files are not here")


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def question(number, category="writing", turns=("Hello?",)):
    return {"question_id": number, "category": category, "turns": list(turns)}


TALK = [("gpt", "Welcome."), ("human", "One?"), ("gpt", "1."), ("human", "Two?")]
FROM = {"conversations": [{"from": who, "value": text} for who, text in TALK]}
NAMES = {"gpt": "assistant", "human": "user"}
ROLE = {"conversations": [{"role": NAMES[who], "content": text} for who, text in TALK]}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        (question(81, "writing", ["Write.", "Rewrite."]), Prompt("81", "writing", ("Write.", "Rewrite."))),
        ({"id": "x", **FROM}, Prompt("x", "chat", ("One?", "Two?"))),
        ({"category": "math", **ROLE}, Prompt("1", "math", ("One?", "Two?"))),
        ({"question": "1 + 1?", "answer": "#### 2"}, Prompt("1", "math", ("1 + 1?",))),
        ({"task_id": "He/0", "prompt": "def f():\n", "test": "assert f"}, Prompt("He/0", "coding", ("def f():\n",))),
    ],
)
def test_each_shape_gives_id_category_and_the_turns_of_the_user(tmp_path, record, prompt):
    path = write_lines(tmp_path / "a.txt", [record])
    loaded = load_prompts(path)
    assert loaded.prompts == (prompt,)
    assert (loaded.source, loaded.sha256) == (str(path), hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_json_list_json_lines_and_gzip_read_the_same_whatever_the_name(tmp_path):
    records = [question(1), question(2, "math")]
    lines, one_list, zipped = (tmp_path / name for name in ("lines.gz", "list.jsonl", "zipped.txt"))
    write_lines(lines, records)
    one_list.write_text(json.dumps(records, indent=2), encoding="utf-8")
    zipped.write_bytes(gzip.compress(lines.read_bytes()))
    expected = load_prompts(lines).prompts
    assert [prompt.prompt_id for prompt in expected] == ["1", "2"]
    assert load_prompts(one_list).prompts == load_prompts(zipped).prompts == expected
    one_list.write_text(json.dumps(records[0], indent=2), encoding="utf-8")  # one object over several lines
    assert load_prompts(one_list).prompts == expected[:1]


def test_plain_text_is_one_prompt_a_paragraph(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeffFirst\r\nstill first\r\n\r\n \n\n[INST] second {x}\n".encode())
    prompts = load_prompts(path).prompts
    assert [prompt.turns for prompt in prompts] == [("First\r\nstill first",), ("[INST] second {x}",)]
    assert [prompt.category for prompt in prompts] == ["text", "text"]


@pytest.mark.parametrize("text", ["[INST] hello [/INST]", "{name}, hello", "{ braces }"])
def test_text_that_only_looks_like_json_stays_text(tmp_path, text):
    path = tmp_path / "a"
    path.write_text(text, encoding="utf-8")
    assert load_prompts(path).prompts == (Prompt("1", "text", (text,)),)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"question_id": 1, "turns": ["a"]}\n\n{"question_id": 2, "turns": ["b"\n', " line 3: not valid JSON"),
        ('[\n{"question_id": 1, "turns": ["a"]},\n{"question_id" 2}]', " line 3: not valid JSON"),
        ('{\n"question_id": 1,\n"turns": ["a"]\n', " line 4: not valid JSON"),
        ('{"question_id": 1, "turns": ["a"]}\n{"text": "b", "label": 1}\n', ":2: unknown shape: .* label, text;"),
        ('["a", "b"]', "record 1: unknown shape: a str"),
        ('{"question_id": 1, "turns": ["a", 2]}', ":1: the turns must be a list of strings"),
        ('{"question_id": 1, "turns": ["a"], "category": 3}', ":1: category must be a string"),
        ('{"conversations": [{"speaker": "human", "text": "a"}]}', ":1: a message must have from/value"),
        ('{"conversations": [{"from": "human", "value": null}]}', ":1: a message's value must be a string"),
        (" \n\n", "the file is empty"),
        ("[]", "no prompt is left"),
        ('{"question_id": 1, "turns": [" "]}', "no prompt is left"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_place(tmp_path, text, complaint):
    path = tmp_path / "prompts"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_and_broken_gzip_are_refused(tmp_path):
    latin, broken = tmp_path / "latin", tmp_path / "broken"
    latin.write_bytes(b"fine\nna\xefve\n")
    broken.write_bytes(gzip.compress(b"hello" * 100)[:-9])
    with pytest.raises(ValueError, match=r"latin:2: not UTF-8"):
        load_prompts(latin)
    with pytest.raises(ValueError, match=r"broken: broken gzip"):
        load_prompts(broken)
    with pytest.raises(OSError, match="missing"):
        load_prompts(tmp_path / "missing")


def test_blank_turns_and_prompts_are_dropped_and_counted(tmp_path):
    silent = {"conversations": [{"from": "gpt", "value": "Hello."}]}
    records = [question(1, turns=["a", " ", "b"]), question(2, turns=["", "\n"]), silent, question(3)]
    loaded = load_prompts(write_lines(tmp_path / "a", records))
    assert [(prompt.prompt_id, prompt.turns) for prompt in loaded.prompts] == [("1", ("a", "b")), ("3", ("Hello?",))]
    assert loaded.dropped == {"blank_turns": 3, "blank_prompts": 1, "no_human_turns": 1}


def test_repeated_ids_become_unique_without_taking_a_name_in_use(tmp_path):
    loaded = load_prompts(write_lines(tmp_path / "a", [question(name) for name in ("a", "a", "a#2", "a", "b")]))
    assert [prompt.prompt_id for prompt in loaded.prompts] == ["a", "a#3", "a#2", "a#4", "b"]


def test_two_files_with_the_same_ids_join_without_a_clash(tmp_path):
    first = load_prompts(write_lines(tmp_path / "a", [question(1, turns=["x", ""])]))
    second = load_prompts(write_lines(tmp_path / "b", [question(1, turns=["y", ""])]))
    joined = join_prompt_sets([first, second])
    assert [(prompt.prompt_id, prompt.turns) for prompt in joined.prompts] == [("1", ("x",)), ("1#2", ("y",))]
    assert joined.dropped["blank_turns"] == 2
    assert joined.sha256 not in (first.sha256, second.sha256)
    assert joined.sha256 != join_prompt_sets([second, first]).sha256


def prompts_of(categories):
    return [Prompt(str(number), category, ("x",)) for number, category in enumerate(categories)]


def test_a_sample_goes_round_the_categories_and_a_seed_shuffles_within_them(tmp_path):
    prompts = prompts_of("aaabcb")
    assert [prompt.prompt_id for prompt in spread(prompts, 99)] == ["0", "3", "4", "1", "5", "2"]
    many = prompts_of("ab" * 50)
    chosen = spread(many, 20, seed=1)
    assert chosen == spread(many, 20, seed=1) and chosen not in (spread(many, 20, seed=2), spread(many, 20))
    assert [prompt.category for prompt in chosen] == ["a", "b"] * 10
    path = write_lines(tmp_path / "a", [question(1, "x"), question(2, "x"), question(3, "y")])
    assert [prompt.prompt_id for prompt in load_prompts(path, 2).prompts] == ["1", "3"]
    assert [prompt.prompt_id for prompt in load_prompts(path, seed=7).prompts] == ["1", "2", "3"]  # all, in order


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=30), st.integers(1, 30), st.integers(0, 3))
def test_a_sample_is_even_and_the_beginning_of_a_larger_one(categories, num_prompts, seed):
    prompts = prompts_of(categories)
    chosen = spread(prompts, num_prompts, seed)
    assert len({prompt.prompt_id for prompt in chosen}) == len(chosen) == min(num_prompts, len(prompts))
    assert spread(prompts, num_prompts + 1, seed)[: len(chosen)] == chosen
    available, taken = Counter(categories), Counter(prompt.category for prompt in chosen)
    most = max(taken.values())
    assert all(taken[category] >= min(available[category], most - 1) for category in available)


@needs_data
@pytest.mark.parametrize(
    ("name", "num_prompts", "num_categories", "num_turns"),
    [
        ("mt_bench/question.jsonl", 80, 8, 160),
        ("vicuna_bench/question.jsonl", 80, 9, 80),
        ("spec_bench/question.jsonl", 480, 13, 560),
        ("gsm8k/test.jsonl", 1319, 1, 1319),
        ("humaneval/HumanEval.jsonl.gz", 164, 1, 164),
        ("chat/dev.jsonl.gz", 3337, 5, 23834),
    ],
)
def test_published_files_are_read_completely(name, num_prompts, num_categories, num_turns):
    loaded = load_prompts(DATA / name)
    assert len(loaded.prompts) == num_prompts
    assert len({prompt.category for prompt in loaded.prompts}) == num_categories
    assert sum(len(prompt.turns) for prompt in loaded.prompts) == num_turns
    assert not any(loaded.dropped.values())


@needs_data
def test_reference_answers_are_not_taken_for_questions():
    with pytest.raises(ValueError, match=r":1: unknown shape: .*choices"):
        load_prompts(DATA / "mt_bench" / "reference_gpt-4.jsonl")
