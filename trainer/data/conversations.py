"""Conversations from ShareGPT-shaped files, and a report on every record that was read.

Files are JSON lists or JSON lines, gzipped or not, and the tables that ``trainer.data.parquet`` reads. Nothing is
merged or made up: records that cannot be learned from are dropped and counted.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from runtime.files.documents import parse_json
from runtime.files.regular import open_regular, unpacked
from runtime.files.shown import shown
from trainer.data.parquet import is_table, read_rows

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
CHUNK_BYTES = 1 << 20  # read at a time
ROLES = dict.fromkeys(("human", "user"), "user") | dict.fromkeys(("gpt", "chatgpt", "assistant"), "assistant")
ROLES["system"] = "system"


@dataclass(frozen=True)
class Conversation:
    """Alternating turns of user and assistant, after an optional system message; the last one is an answer."""

    messages: tuple[dict[str, str], ...]
    id: str = ""
    category: str = ""


@dataclass
class DataReport:
    """Counts of the records that were read: of conversations, except where a name says otherwise."""

    files: list[str] = field(default_factory=list)
    read: int = 0  # records: conversations and texts
    blank: int = 0  # no assistant text, or no text at all: dropped
    malformed: int = 0  # turns do not alternate, a turn is empty, half a character: dropped
    trimmed: int = 0  # replies before the first question, or a last question without an answer, were removed
    kept: int = 0
    truncated: int = 0  # to max_length tokens
    too_long: int = 0  # no token with loss left after truncation: dropped
    texts: int = 0  # plain texts among the records, blank and malformed ones included
    blocks: int = 0  # sequences made of the texts
    rest_tokens: int = 0  # after the last block, too few for another: dropped
    tokens: int = 0
    loss_tokens: int = 0
    parts: list[DataReport] = field(default_factory=list)  # file by file, where there are several

    def add(self, part: DataReport) -> None:
        """Add the report of one file."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.files += part.files
        self.parts.append(part)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: files by name, ``parts`` only where there are several."""
        files = [Path(file).name for file in self.files]
        counts = {name: int(getattr(self, name)) for name in COUNTS}
        return {"files": files, **counts} | (
            {"parts": [part.as_dict() for part in self.parts]} if len(self.parts) > 1 else {}
        )

    def summary(self) -> str:
        """One line for the log."""
        conversations = self.read - self.texts
        sequences = [f"{self.kept:,} of {conversations:,} conversations"] if conversations or not self.texts else []
        if self.texts:
            sequences.append(f"{self.blocks:,} blocks of {self.texts:,} text{'s' * (self.texts > 1)}")
        parts = [f"{' and '.join(sequences)} from {', '.join(Path(f).name for f in self.files)}"]
        dropped = {"blank": self.blank, "malformed": self.malformed, "too long": self.too_long}
        reasons = [f"{count:,} {reason}" for reason, count in dropped.items() if count]
        if reasons:
            parts.append("dropped " + ", ".join(reasons))
        if self.trimmed:
            parts.append(f"{self.trimmed:,} trimmed to complete question-answer turns")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens, {self.loss_tokens:,} of them in the loss")
        return "; ".join(parts)


COUNTS = tuple(f.name for f in dataclasses.fields(DataReport) if f.type == "int")


# Records -------------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> Iterator[str]:
    """The text of a file, gzipped or not, piece by piece, with its line ends unchanged and without a byte order mark.

    Raises ValueError for a file that cannot be read, and naming the first byte that is not UTF-8.
    """
    decoder, taken = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        with open_regular(path) as file:
            stream = unpacked(file, path)
            while piece := stream.read(CHUNK_BYTES):
                taken += len(piece)
                yield decoder.decode(piece)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = taken - len(error.object) + error.start
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {place}; expected text or JSON") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def located_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of JSON lines, a JSON list, a datasets folder or a Parquet file.

    ``where`` names the file and the line, item (counted from 0) or row. JSON lines and tables are read on demand.
    Raises ValueError naming the file and the line where JSON is broken.
    """
    if is_table(path):
        yield from ((f"{path} row {row}", record) for row, record in read_rows(path))
        return
    pieces, start, first_line = read_text(Path(path)), "", 1
    for piece in pieces:
        if piece.strip():
            start = piece
            break
        first_line += piece.count("\n")
    if start.lstrip().startswith("["):
        items = _parse(path, first_line, start + "".join(pieces))
        yield from ((f"{path} item {number}", record) for number, record in enumerate(items))
        return
    for number, line in enumerate(_lines(chain([start], pieces)), start=first_line):
        if line.strip():
            yield f"{path} line {number}", _parse(path, number, line)


def _parse(path: str | Path, first_line: int, text: str) -> Any:
    return parse_json(text, path, first_line)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines of a text. splitlines() would also break at characters such as U+2028, which JSON may contain."""
    rest = ""
    for piece in pieces:
        *complete, rest = (rest + piece).split("\n")
        yield from complete
    yield rest


def read_messages(record: Any, where: str) -> list[dict[str, str]]:
    """The turns of a record as {"role", "content"}. Raises ValueError for a record of another shape."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: got a {type(record).__name__}, expected an object with conversations or messages")
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list):
        keys = ", ".join(map(str, record))[:200]
        raise ValueError(f"{where}: expected a list under conversations or messages, got the keys {keys}")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: turn {number} is a {type(turn).__name__}, expected an object")
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}: turn {number} is from {shown(role)}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}: turn {number} holds {shown(content, 40)}, expected text under value or content")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def share_gpt(messages: Iterable[dict[str, str]], name: str, category: str) -> dict[str, Any]:
    """The record of a conversation, as ``read_messages`` reads it."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]
    return {"id": name, "category": category, "conversations": turns}


def _complete_turns(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages without replies before the first question and without a last question that has no answer."""
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    while turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    return system + turns


def _is_sound(messages: list[dict[str, str]]) -> bool:
    """Whether user and assistant alternate after an optional system message, no turn is empty, and UTF-8 can encode
    the text: JSON also allows half a surrogate pair, which truncating a text can leave."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not all(turn["content"].strip() for turn in turns):
        return False
    return not any(HALF_CHARACTER.search(turn["content"]) for turn in messages)


def read_conversations(paths: Iterable[str | Path], report: DataReport) -> Iterator[Conversation]:
    """``load_conversations`` one by one, counted in ``report``."""
    paths = list(paths)
    report.files += map(str, paths)
    for where, record in chain.from_iterable(map(located_records, paths)):
        report.read += 1
        messages = read_messages(record, where)
        if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
            report.blank += 1
            continue
        turns = _complete_turns(messages)
        if not any(turn["role"] == "assistant" for turn in turns) or not _is_sound(turns):
            report.malformed += 1
            continue
        report.trimmed += len(turns) < len(messages)
        report.kept += 1
        yield Conversation(tuple(turns), str(record.get("id", "")), str(record.get("category", "")))
    if not report.kept:
        raise ValueError(
            f"no usable conversation in {', '.join(report.files) or 'no files'}: {report.read} read, {report.blank} "
            f"blank, {report.malformed} malformed; expected user and assistant turns that alternate"
        )


def load_conversations(paths: Iterable[str | Path] | str | Path) -> tuple[list[Conversation], DataReport]:
    """Conversations of ShareGPT-shaped files, and the counts of those that cannot be learned from, which are dropped.

    Raises ValueError with file and line for broken files and records of another shape, and naming the files when
    nothing is left.
    """
    report = DataReport()
    return list(read_conversations([paths] if isinstance(paths, (str, Path)) else paths, report)), report
