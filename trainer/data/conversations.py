"""Conversations to train on, and a report on every record that was read.

Nothing is merged or made up: records that cannot be learned from are left out and counted, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from runtime.files.documents import HALF_CHARACTER
from trainer.data.parquet import is_table, unread_columns
from trainer.data.records import located_records
from trainer.data.turns import (
    HALF,
    RECORD_FIELDS,
    LeftOut,
    Messages,
    Unusable,
    check_alternates,
    label,
    read_messages,
    split_system,
)


@dataclass(frozen=True)
class Conversation:
    """Alternating turns of user and assistant, after an optional system message; the last one is an answer."""

    messages: tuple[dict[str, str], ...]
    id: str = ""
    category: str = ""
    where: str = field(default="", compare=False)  # file and record


@dataclass
class DataReport:
    """Counts of the records that were read: of conversations, except where a name says otherwise."""

    files: list[str] = field(default_factory=list)
    read: int = 0  # records: conversations and texts
    blank: int = 0  # no assistant text, or no text at all: dropped
    malformed: int = 0  # of another shape, turns that do not alternate, an empty turn, half a character ...: dropped
    trimmed: int = 0  # replies before the first question, or a last question without an answer, were removed
    kept: int = 0
    truncated: int = 0  # to max_length tokens
    too_long: int = 0  # no token with loss left after truncation: dropped
    refused: int = 0  # by the chat template: dropped
    texts: int = 0  # plain texts among the records, blank and malformed ones included
    blocks: int = 0  # sequences made of the texts
    rest_tokens: int = 0  # after the last block, too few for another: dropped
    tokens: int = 0
    loss_tokens: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)  # why records were dropped, and where the first of each kind is
    parts: list[DataReport] = field(default_factory=list)  # file by file, where there are several

    def add(self, part: DataReport) -> None:
        """Add the report of one file."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.files += part.files
        self.left_out.add(part.left_out)
        self.parts.append(part)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: files by name, ``parts`` only where there are several."""
        files = [Path(file).name for file in self.files]
        counts = {name: int(getattr(self, name)) for name in COUNTS}
        return {"files": files, **counts, **self.left_out.as_dict()} | (
            {"parts": [part.as_dict() for part in self.parts]} if len(self.parts) > 1 else {}
        )

    def summary(self) -> str:
        """One line for the log."""
        conversations = self.read - self.texts
        sequences = [f"{self.kept:,} of {conversations:,} conversations"] if conversations or not self.texts else []
        if self.texts:
            sequences.append(f"{self.blocks:,} blocks of {self.texts:,} text{'s' * (self.texts > 1)}")
        parts = [f"{' and '.join(sequences)} from {', '.join(Path(f).name for f in self.files)}"]
        dropped = {
            "blank": self.blank, "malformed": self.malformed, "too long": self.too_long, "refused": self.refused,
        }  # fmt: skip
        counts = [f"{count:,} {reason}" for reason, count in dropped.items() if count]
        if counts:
            parts += [f"dropped {', '.join(counts)}", f"left out: {self.left_out.describe()}"]
        if self.trimmed:
            parts.append(f"{self.trimmed:,} trimmed to complete question-answer turns")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens, {self.loss_tokens:,} of them in the loss")
        return "; ".join(parts)


COUNTS = tuple(f.name for f in dataclasses.fields(DataReport) if f.type == "int")


def _complete_turns(messages: Messages) -> Messages:
    """The messages without replies before the first question and without a last question that has no answer."""
    system, turns = split_system(messages)
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    while turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    return system + turns


def _check_sound(messages: Messages) -> None:
    """Raises Unusable unless user and assistant alternate after an optional system message and no turn is empty."""
    turns = split_system(messages)[1]
    if not turns:
        raise Unusable("a reply to nothing")
    check_alternates(turns)
    if not all(turn["content"].strip() for turn in turns):
        raise Unusable("an empty turn")
    if any(HALF_CHARACTER.search(turn["content"]) for turn in messages):
        raise Unusable(HALF)


def read_conversations(paths: Iterable[str | Path], report: DataReport) -> Iterator[Conversation]:
    """``load_conversations`` one by one, counted in ``report``."""
    paths = list(paths)
    report.files += map(str, paths)
    for where, record in chain.from_iterable(map(located_records, paths)):
        report.read += 1
        try:
            messages = read_messages(record)
            if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
                report.blank += 1
                report.left_out.count("without a reply", where)
                continue
            turns = _complete_turns(messages)
            _check_sound(turns)
        except Unusable as reason:
            report.malformed += 1
            report.left_out.count(reason, where)
            continue
        report.trimmed += len(turns) < len(messages)
        report.left_out.ignore(record, RECORD_FIELDS)
        report.kept += 1
        yield Conversation(tuple(turns), label(record.get("id")), label(record.get("category")), where)
    for path in paths:
        if is_table(path):
            report.left_out.fields.update(dict.fromkeys(unread_columns(path), report.read))
    if not report.kept:
        counts = f"{report.read} read, {report.blank} blank, {report.malformed} malformed"
        because = f": {report.left_out.describe()}" if report.left_out.reasons else ""
        raise ValueError(
            f"no usable conversation in {', '.join(report.files) or 'no files'}: {counts}{because}; expected user and "
            "assistant turns that alternate, under conversations or messages"
        )


def load_conversations(paths: Iterable[str | Path] | str | Path) -> tuple[list[Conversation], DataReport]:
    """Conversations of ShareGPT-shaped files, and the counts of those that cannot be learned from, which are dropped.

    Raises ValueError with file and line for broken files, and naming the files when nothing is left.
    """
    report = DataReport()
    return list(read_conversations([paths] if isinstance(paths, (str, Path)) else paths, report)), report


def share_gpt(messages: Iterable[dict[str, str]], name: str, category: str) -> dict[str, Any]:
    """The record of a conversation, as ``read_messages`` reads it."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]
    return {"id": name, "category": category, "conversations": turns}
