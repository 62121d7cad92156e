"""What a user asks, read from the files the field publishes: for measurement and for corpora alike.

A file is recognized by the shape of its records, not by its name, so a renamed or gzipped copy reads the same. Every
record becomes a ``Prompt``: its system text, if it has one, and the user's turns in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.conversations import Conversation
from trainer.data.parquet import is_table
from trainer.data.records import located_records, read_text
from trainer.data.turns import (
    EMPTY,
    LeftOut,
    Unusable,
    check_alternates,
    kind_of,
    label,
    read_messages,
    split_system,
    system_of,
    turns_of,
)

# The beginning of a JSON list or object; "[INST] ..." and "{name}, ..." are text.
JSON_OPENING = re.compile(r'\s*(\[\s*[\[{"\]]|\{\s*["}])')
OPENING_CHARACTERS = 4096  # enough to tell JSON from text
# Shapes without a conversation: their keys -> (key of the id, key of the text, category without one).
QUESTIONS = {("question", "answer"): (None, "question", "math"), ("task_id", "prompt"): ("task_id", "prompt", "coding")}
KNOWN_SHAPES = (
    "turns (MT-Bench); conversations or messages (ShareGPT); question, answer (GSM8K); task_id, prompt (HumanEval); "
    "or text"
)
BLANK_TURNS, BLANK_PROMPTS, SILENT, GREETINGS = "blank_turns", "blank_prompts", "no_human_turns", "replies_to_nothing"


@dataclass(frozen=True)
class Prompt:
    """One conversation to generate for: the user's turns in order, none of them blank, after a system text, None
    without one. where: file and record."""

    prompt_id: str
    category: str
    turns: tuple[str, ...]
    system: str | None = None
    where: str = field(default="", compare=False)

    def opening(self) -> list[dict[str, str]]:
        """The messages before the first turn."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file. counts: ``blank_turns``, ``blank_prompts`` (only blank turns), ``no_human_turns``
    (conversations in which no user speaks) and ``replies_to_nothing`` (before the first question) were left out.
    left_out: unusable records."""

    prompts: tuple[Prompt, ...]
    counts: dict[str, int]
    left_out: LeftOut

    def dropped(self) -> dict[str, int]:
        """Everything that was left out, by its reason."""
        return {**self.counts, **self.left_out.reasons}

    def describe(self) -> str:
        """What was left out, on one line."""
        counts = [f"{name.replace('_', ' ')} ({count:,})" for name, count in self.counts.items() if count]
        return ", ".join(filter(None, [*counts, self.left_out.describe()]))


def read_prompts(path: str | Path) -> PromptFile:
    """Read a prompt file: MT-Bench, Vicuna-bench, Spec-Bench, ShareGPT, GSM8K, HumanEval or plain text.

    JSON may be a list or one record per line, plain text is one prompt per paragraph, each may be gzipped; datasets
    folders and Parquet files hold conversations. Unusable records are left out and counted.

    Raises ValueError naming the file and the line for a file that cannot be read, and for one without a prompt.
    """
    counts, left_out, prompts = dict.fromkeys((BLANK_TURNS, BLANK_PROMPTS, SILENT, GREETINGS), 0), LeftOut(), []
    read = 0
    for read, (where, record) in enumerate(_records(path), start=1):
        try:
            prompt, greetings = _prompt_of(record, read, where)
        except Unusable as reason:
            left_out.count(reason, where)
            continue
        turns = tuple(turn for turn in prompt.turns if turn.strip())
        counts[BLANK_TURNS] += len(prompt.turns) - len(turns)
        counts[GREETINGS] += greetings
        if turns:
            prompts.append(Prompt(prompt.prompt_id, prompt.category, turns, prompt.system, where))
        else:
            counts[BLANK_PROMPTS if prompt.turns else SILENT] += 1
    if not read:
        raise ValueError(f"{path}: the file is empty; expected prompts")
    if not prompts:
        reasons = PromptFile((), counts, left_out).describe()
        raise ValueError(f"{path}: no prompt is left of {read} record(s): {reasons}; expected {KNOWN_SHAPES}")
    return PromptFile(tuple(prompts), counts, left_out)


def _records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a file; a paragraph of plain text is a record of one turn."""
    if is_table(path):
        yield from located_records(path)
        return
    pieces, opening = read_text(Path(path)), ""
    for piece in pieces:
        opening += piece
        if len(opening.lstrip()) > OPENING_CHARACTERS:
            break
    if JSON_OPENING.match(opening):
        yield from located_records(path)
        return
    text = opening + "".join(pieces)
    blocks = (block.strip("\r\n") for block in re.split(r"\n[ \t\r]*\n", text) if block.strip())
    for number, block in enumerate(blocks, start=1):
        yield f"{path} paragraph {number}", {"turns": [block], "category": "text"}


def _prompt_of(record: Any, number: int, where: str) -> tuple[Prompt, int]:
    """The prompt of one record, blank turns included, and how many replies before the first question it lost.
    number: its id if the record has none. Half a character in a turn is left to who tokenizes it. Raises Unusable for
    another shape."""
    if not isinstance(record, dict):
        raise Unusable(f"{kind_of(record)} instead of an object")
    shape = next((keys for keys in QUESTIONS if all(record.get(key) is not None for key in keys)), None)
    greetings, id_key = 0, "question_id" if "question_id" in record else "id"
    if record.get("turns") not in EMPTY:
        turns, category, system = record["turns"], "question", system_of(record)
    elif shape is not None and turns_of(record) in EMPTY:
        id_key, text_key, category = QUESTIONS[shape]
        turns, system = [record[text_key]], system_of(record)
    elif record.get("turns") is not None and turns_of(record) in EMPTY:
        turns, category, system = [], "question", None
    elif turns_of(record) is not None:
        turns, system, greetings = _questions(record)
        category = "chat"
    else:
        raise Unusable(f"an unknown shape, with the keys {', '.join(sorted(map(str, record)))[:60] or '(none)'}")
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise Unusable("turns that are not a list of texts")
    name = label(record.get(id_key) if id_key else None, str(number))
    return Prompt(name, label(record.get("category"), category), tuple(turns), system), greetings


def prompt_of(talk: Conversation) -> Prompt:
    """The prompt that a finished conversation answers."""
    system, turns = split_system(list(talk.messages))
    asked = tuple(turn["content"] for turn in turns if turn["role"] == "user")
    return Prompt(talk.id, talk.category, asked, system[0]["content"] if system else None, talk.where)


def _questions(record: dict[str, Any]) -> tuple[list[str], str | None, int]:
    """The user's turns of a conversation, its system text, and the number of replies before the first question."""
    system, turns = split_system(read_messages(record, replies=False))
    greetings = 0
    while turns and turns[0]["role"] == "assistant":
        turns, greetings = turns[1:], greetings + 1
    check_alternates(turns)
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    return asked, system[0]["content"] if system else None, greetings
