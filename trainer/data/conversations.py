"""Conversations from files, and what became of every record that was read.

ShareGPT-shaped records come from JSON lists, JSON lines, gzipped or not, and from the tables that
``trainer.data.parquet`` reads. Nothing is merged or made up: what cannot be learnt from is left out and counted.
"""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from trainer.data.parquet import is_table, read_rows

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
CHUNK_BYTES = 1 << 20  # read at a time
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Conversation:
    """A conversation that alternates user and assistant, a system message possibly before it, an answer at its end."""

    messages: tuple[dict[str, str], ...]
    id: str = ""
    category: str = ""


@dataclass
class DataReport:
    """What became of the records that were read. Numbers count conversations except where a name says more."""

    files: list[str] = field(default_factory=list)
    read: int = 0  # records: conversations and texts
    blank: int = 0  # no assistant text, or no text at all: dropped
    malformed: int = 0  # turns do not alternate, an empty turn among others, half a character: dropped
    trimmed: int = 0  # replies before the first question, or a last question without answer: cut off, rest kept
    kept: int = 0
    truncated: int = 0  # cut at max_length tokens
    too_long: int = 0  # no token with loss left after the cut: dropped
    texts: int = 0  # plain texts among the records, blank and malformed ones included
    blocks: int = 0  # sequences made of the texts
    rest_tokens: int = 0  # behind the last block, too few for another: dropped
    tokens: int = 0
    loss_tokens: int = 0
    parts: list[DataReport] = field(default_factory=list)  # file by file, where there are several

    def add(self, part: DataReport) -> None:
        """Counts a file's report in."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.files += part.files
        self.parts.append(part)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: files by name, ``parts`` only where there are several."""
        found: dict[str, Any] = {"files": [Path(file).name for file in self.files]}
        found |= {name: int(getattr(self, name)) for name in COUNTS}
        return found | ({"parts": [part.as_dict() for part in self.parts]} if len(self.parts) > 1 else {})

    def summary(self) -> str:
        """One line for the log."""
        conversations = self.read - self.texts
        made = [f"{self.kept:,} of {conversations:,} conversations"] if conversations or not self.texts else []
        if self.texts:
            made.append(f"{self.blocks:,} blocks of {self.texts:,} text{'s' * (self.texts > 1)}")
        parts = [f"{' and '.join(made)} from {', '.join(Path(f).name for f in self.files)}"]
        dropped = {"blank": self.blank, "malformed": self.malformed, "too long": self.too_long}
        lost = [f"{count:,} {reason}" for reason, count in dropped.items() if count]
        if lost:
            parts.append("dropped " + ", ".join(lost))
        if self.trimmed:
            parts.append(f"{self.trimmed:,} trimmed to whole question-answer turns")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens, {self.loss_tokens:,} of them in the loss")
        return "; ".join(parts)


COUNTS = tuple(f.name for f in dataclasses.fields(DataReport) if f.type == "int")


# Records -------------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> Iterator[str]:
    """The text of a file, gzipped or not, a piece at a time and with its line ends as they are; a byte order mark in
    front is left out. Raises ValueError for a file that cannot be read, and naming the first byte that is not UTF-8."""
    decoder, taken = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        with open(path, "rb") as file:
            stream = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
            while piece := stream.read(CHUNK_BYTES):
                taken += len(piece)
                yield decoder.decode(piece)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = taken - len(error.object) + error.start
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {place}; expected text or JSON") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of JSON lines, which are read as they are asked for, or of a JSON list, which is read whole.

    Raises ValueError with file and line where JSON is broken.
    """
    pieces, head = read_text(path), ""
    for piece in pieces:
        head += piece
        if head.strip():
            break
    if head.lstrip().startswith("["):
        yield from _list_records(path, head + "".join(pieces))
    else:
        yield from _line_records(path, _lines(chain([head], pieces)))


def located_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a JSON file, a datasets folder or a Parquet file; ``where`` names file and line or row."""
    if is_table(path):
        yield from ((f"{path} row {row}", record) for row, record in read_rows(path))
    else:
        yield from ((f"{path} line {line}", record) for line, record in records(Path(path)))


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines of a text. splitlines() would also cut at characters such as U+2028, which JSON may hold as they are."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        yield from whole
    yield rest


def _line_records(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number}: not valid JSON ({error.msg}, column {error.colno})") from error


def _list_records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Items of one JSON list, decoded one by one so that each knows its line."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    def fail(position: int, message: str) -> ValueError:
        return ValueError(f"{path} line {1 + text.count(chr(10), 0, position)}: not valid JSON ({message})")

    position = skip(skip(0) + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise fail(error.pos, error.msg) from error
        line, counted = line + text.count("\n", counted, position), position
        yield line, record
        end = skip(end)
        mark = text[end : end + 1]
        if mark == "]":
            if skip(end + 1) < len(text):
                raise fail(skip(end + 1), "text after the list")
            return
        if mark != ",":
            raise fail(end, "expected ',' or ']'" if mark else "the list does not end: truncated?")
        position = skip(end + 1)


def read_messages(record: Any, where: str) -> list[dict[str, str]]:
    """The turns of a record in our form. Raises ValueError for a record of another shape."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: got a {type(record).__name__}, expected an object with conversations or messages")
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list):
        raise ValueError(
            f"{where}: expected a list under conversations or messages, got the keys {', '.join(map(str, record))}"
        )
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: turn {number} is a {type(turn).__name__}, expected an object")
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}: turn {number} is from {role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}: turn {number} holds {content!r:.40}, expected text under value or content")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _whole_turns(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without replies before the first question and without a last question that has no answer."""
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    while turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    return system + turns


def _is_sound(messages: list[dict[str, str]]) -> bool:
    """User and assistant in turns, a system message only in front, no empty turn, and text that UTF-8 can write.

    Half an emoji, cut in two by whoever truncated the text, is valid in JSON and nowhere else.
    """
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not all(turn["content"].strip() for turn in turns):
        return False
    return not any(HALF_CHARACTER.search(turn["content"]) for turn in messages)


def read_conversations(paths: Iterable[str | Path], report: DataReport) -> Iterator[Conversation]:
    """``load_conversations`` one by one, counted in ``report`` on the way."""
    paths = list(paths)
    report.files += map(str, paths)
    for where, record in chain.from_iterable(map(located_records, paths)):
        report.read += 1
        messages = read_messages(record, where)
        if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
            report.blank += 1
            continue
        whole = _whole_turns(messages)
        if not any(turn["role"] == "assistant" for turn in whole) or not _is_sound(whole):
            report.malformed += 1
            continue
        report.trimmed += len(whole) < len(messages)
        report.kept += 1
        yield Conversation(tuple(whole), str(record.get("id", "")), str(record.get("category", "")))
    if not report.kept:
        raise ValueError(
            f"no usable conversation in {', '.join(report.files) or 'no files'}: {report.read} read, {report.blank} "
            f"blank, {report.malformed} malformed; expected user and assistant turns that alternate"
        )


def load_conversations(paths: Iterable[str | Path] | str | Path) -> tuple[list[Conversation], DataReport]:
    """Conversations of ShareGPT-shaped files: a JSON list or JSON lines, gzipped or not, datasets folders, Parquet.

    A record holds its turns under ``conversations`` or ``messages``, each as ``from``/``value`` or
    ``role``/``content``. Broken files and records of another shape raise ValueError with file and line. Conversations
    that are well formed but cannot be learnt from are left out and counted; nothing is merged or made up. Raises
    ValueError naming the files when nothing is left.
    """
    report = DataReport()
    return list(read_conversations([paths] if isinstance(paths, (str, Path)) else paths, report)), report
