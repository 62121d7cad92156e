"""The one reader and writer of JSON and YAML: what it accepts, refuses in one line, and never writes."""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from runtime.files.documents import (
    MOST_DEPTH,
    MOST_JSON,
    identity,
    parse_json,
    plain,
    read_json,
    read_object,
    read_yaml,
    to_json,
    to_yaml,
    write_json,
)
from runtime.files.shown import shown


@pytest.fixture(autouse=True)
def _the_limit_of_recursion_that_jittor_sets():
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    yield
    assert sys.getrecursionlimit() == 10**6
    sys.setrecursionlimit(before)


def refusal(read, path):
    """The message of the ValueError, which must be one line that names the file, or its folder's name."""
    with pytest.raises(ValueError) as caught:
        read(path)
    text = str(caught.value)
    assert type(caught.value) is ValueError and str(path) in text and "\n" not in text and len(text) < 500, text
    return text


# Reading JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "line 1: not valid JSON (Expecting property name"),
        (b'{"a": 1,\n "b": }', "line 2: not valid JSON (Expecting value, column 7)"),
        (b"", "line 1: not valid JSON"),
        (b"[1] [2]", "something follows a complete value"),
        (b'"\xff"', "not UTF-8 text: invalid start byte at byte 1"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b"[" * 10_000_000, "nested more than 64 deep"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 64 deep"),
        (b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1), "nested more than 64 deep"),
        (b"1" * 65, "an integer of 65 digits"),
        (b"[-1" + b"0" * 10_000 + b"]", "an integer of 10002 digits"),
        (b"1e400", "1e400, which is outside float64"),
    ],
    ids=range(12),
)
def test_a_json_file_that_no_one_wrote_in_good_faith_is_refused_in_one_line(tmp_path, content, reason):
    (tmp_path / "a.json").write_bytes(content)
    assert reason in refusal(read_json, tmp_path / "a.json")


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"a": 1}',  # with a byte order mark
        b'{"model_max_length": 1000000000000000019884624838656, "a": 1}',
        b'{"a": 2, "a": 1}',  # the last one counts, as everywhere
        b'{"b": ' + b"[" * (MOST_DEPTH - 1) + b"]" * (MOST_DEPTH - 1) + b', "a": 1}',
    ],
)
def test_what_files_of_the_field_hold_is_read(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json")["a"] == 1


def test_older_files_hold_bare_nan_which_is_read():
    assert math.isnan(parse_json('{"loss": NaN}', "a.json")["loss"])


def test_a_repeated_name_is_refused_where_each_may_occur_once():
    assert parse_json('{"a": 1, "a": 2}', "a.json") == {"a": 2}
    with pytest.raises(ValueError, match=r"^a\.json: it holds 'a' twice$"):
        parse_json('{"a": 1, "a": 2}', "a.json", each_once=True)


def test_a_line_of_a_file_is_named_by_its_number():
    with pytest.raises(ValueError, match=r"^a\.jsonl line 7: not valid JSON \(Expecting value, column 2\)"):
        parse_json("[", "a.jsonl", 7)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_pipe_and_a_device_are_refused_without_waiting(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    began = time.monotonic()
    assert "is a pipe, expected a regular file" in refusal(read, tmp_path / "pipe")
    assert "is a device" in refusal(read, "/dev/zero")
    assert "is a folder" in refusal(read, tmp_path)
    assert time.monotonic() - began < 5


def test_a_file_without_end_is_refused_before_it_fills_the_memory(tmp_path):
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(64 << 30)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"more than {MOST_JSON:,} bytes" in refusal(read_json, tmp_path / "large.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # kilobytes


def test_a_missing_file_is_an_oserror_and_as_an_object_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    assert "does not exist" in refusal(read_object, tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    assert "holds a list, expected a JSON object" in refusal(read_object, tmp_path / "list.json")


# Writing JSON --------------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_null_in_every_file(tmp_path):
    content = {"loss": [1.5, math.nan, np.float32("inf")], "array": np.array([1.0, -np.inf]), "count": np.int64(3)}
    write_json(tmp_path / "a" / "b.json", content)
    text = (tmp_path / "a" / "b.json").read_text()
    assert json.loads(text) == {"loss": [1.5, None, None], "array": [1.0, None], "count": 3}
    assert "NaN" in json.dumps(content["loss"][:2])  # what would have been written


def test_what_is_written_is_read_again_as_plain_types():
    value = {1: (2, Path("a")), "half": "\ud83d", "text": "\N{SNOWMAN}", "none": None, "yes": True}
    expected = {"1": [2, "a"], "half": "\ud83d", "text": "\N{SNOWMAN}", "none": None, "yes": True}
    assert parse_json(to_json(value), "it") == plain(value) == expected
    assert to_json(value).encode("utf-8")  # a lone surrogate does not stop the writing
    with pytest.raises(UnicodeEncodeError):
        json.dumps(value["half"], ensure_ascii=False).encode("utf-8")


def test_a_type_that_json_does_not_know_is_an_error():
    with pytest.raises(TypeError, match="a set cannot be written as JSON"):
        to_json({"a": {1}})


def test_the_text_inside_a_hash_is_what_it_always_was():
    value = {"b": [1, 2.5, math.nan], "a": "\N{SNOWMAN}"}
    assert identity(value, sort_keys=True) == '{"a": "\\u2603", "b": [1, 2.5, NaN]}'


# YAML ----------------------------------------------------------------------------------------------------------------


def bomb(levels, width=10):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(levels):
    return "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, levels))])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: [", "is not valid YAML"),
        ("[1, 2]", "must hold a mapping of options to values, got a list"),
        ("", "got a NoneType"),
        ("a: " + "[" * 100_000, "nested more than 64 deep"),
        ("a: " + "[" * 70 + "]" * 70, "nested more than 64 deep"),
        (bomb(12), "more than 100,000 values"),
        (merges(30), "more than 100,000 values"),
        ("a: &a [*a]", "nested more than 64 deep"),
        ("a: 1" + "0" * 400, "an integer of 401 digits"),
        ("a: !!timestamp x", "is not valid YAML"),
        ("a: 2024-99-99", "is not valid YAML"),
        ("a: !!int ''", "is not valid YAML"),
        ("a: !!bool x", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("? [a]\n: 1", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
        ("# " + "x" * (1 << 18), "more than 262,144 bytes"),
    ],
    ids=range(18),
)
def test_a_yaml_file_that_no_one_wrote_in_good_faith_is_refused_in_one_line(tmp_path, content, reason):
    (tmp_path / "a.yaml").write_text(content)
    assert reason in refusal(read_yaml, tmp_path / "a.yaml")


def test_options_with_aliases_and_merges_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("base: &b {low: 1.0e-4, high: 1}\nrate: {<<: *b, log: true}\nsame: *b\n")
    content = read_yaml(tmp_path / "a.yaml")
    assert content["rate"] == {"low": 1e-4, "high": 1, "log": True} and content["same"] == content["base"]
    (tmp_path / "b.yaml").write_text(to_yaml(content))
    assert read_yaml(tmp_path / "b.yaml") == content


# Messages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        b"\xff" * 10_000_000,
        10**5000,
        -(1 << 100_000),
        [[["x" * 1000] * 1000] * 1000] * 1000,
        {f"key{n}": "\n" * 100 for n in range(10_000)},
        {"a\ud800": math.nan},
        np.arange(10_000),
    ],
    ids=range(8),
)
def test_a_value_in_a_message_is_short_and_on_one_line(value):
    text = shown(value)
    assert len(text) <= 80 and "\n" not in text and text.isprintable()
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [("abc", "'abc'"), (1.5, "1.5"), (None, "None"), ([1, {"a": 2}], "[1, {'a': 2}]"), ("abcdef", "'abcdef'")],
)
def test_a_short_value_is_shown_as_it_is(value, text):
    assert shown(value) == text


def test_a_long_value_is_cut_at_the_length_asked_for():
    assert shown("abcdefgh", 6) == "'ab..."
