"""Files become conversations, and every record that is dropped is counted."""

import gzip
import json
from pathlib import Path

import pytest

from tests.trainer.data.made import GOOD, MESSAGES, talk, write_lines
from trainer.data.conversations import Conversation, load_conversations

DEV = Path(__file__).resolve().parents[4] / "shared" / "data" / "chat" / "dev.jsonl.gz"


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


def test_records_that_cannot_be_learned_from_are_dropped_and_counted(tmp_path):
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
        "3 of 13 conversations from d.jsonl; dropped 3 blank, 7 malformed; left out: without a reply (3, first in "
        "d.jsonl line 2), turns that do not alternate (2, first in d.jsonl line 5), an empty turn (2, first in d.jsonl "
        "line 7), other reasons (3); 2 trimmed to complete question-answer turns"
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"conversations": []}\n{"conversations": [}\n', r"line 2: not valid JSON \(Expecting value, column 20\)"),
        ('[\n{"conversations": []},\n{"conversations": [}]', "line 3: not valid JSON"),
        ('[{"conversations": []}]\n[]', r"line 2: not valid JSON \(something follows a complete value, column 1\)"),
        ('{\n "conversations": [\n}\n', "line 3: not valid JSON"),
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


@pytest.mark.parametrize("text", ["", '[{"messages": []}]'])
def test_no_usable_conversation_is_an_error_that_names_the_files(tmp_path, text):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(text), second.write_text(text)
    with pytest.raises(ValueError, match=r"no usable conversation in .*first\.json, .*second\.json"):
        load_conversations([first, second])
    with pytest.raises(ValueError, match="no usable conversation in no files"):
        load_conversations([])


@pytest.mark.skipif(not DEV.exists(), reason="needs the chat data")
def test_no_real_conversation_is_dropped():
    conversations, report = load_conversations(DEV)
    assert report.kept == report.read == len(conversations) == 3337 and not report.malformed
