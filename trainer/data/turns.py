"""What a record says: the turns of a conversation, for training, prompts and corpora alike, or why it is left out.

A field that is null or empty decides nothing: the other spelling of it counts. Two that are filled must agree. Nothing
is merged or made up, and what is left out is counted (``LeftOut``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.files.shown import shown

HALF = "half a character (a lone surrogate)"  # JSON allows it, truncating a text can leave it, UTF-8 cannot hold it
ROLES = dict.fromkeys(("human", "user"), "user") | dict.fromkeys(("gpt", "chatgpt", "assistant"), "assistant")
ROLES["system"] = "system"
TURNS = ("conversations", "messages")  # the first that is filled counts
SYSTEM = ("system", "system_prompt")
RECORD_FIELDS = {*TURNS, *SYSTEM, "id", "category", "tools"}
TURN_FIELDS = {"from", "role", "value", "content", "weight", "tool_calls", "function_call"}
EMPTY: tuple[Any, ...] = (None, "", [], {})
MOST_REASONS, OTHERS = 20, "other reasons"  # told apart

Messages = list[dict[str, str]]


class Unusable(ValueError):
    """A record that cannot be used; the message is the reason that it is counted under."""


@dataclass
class LeftOut:
    """What was left out of files: ``reasons`` counts records, ``first`` has the place of the first for each reason.
    ``fields``: how many records had a value in a field that was not read; those of turns have a dot in front."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    fields: Counter[str] = field(default_factory=Counter)

    def count(self, reason: object, where: str) -> None:
        """Count a record at a place."""
        reason = str(reason)
        if reason not in self.reasons and len(self.reasons) >= MOST_REASONS:
            reason = OTHERS
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)

    def add(self, other: LeftOut) -> None:
        """Add what was left out of another file."""
        self.reasons.update(other.reasons)
        self.fields.update(other.fields)
        self.first = {**other.first, **self.first}

    def ignore(self, record: Mapping[str, Any], known: Iterable[str]) -> None:
        """Count the fields of a record that are not read."""
        names = {str(name) for name in record.keys() - set(known) if record[name] not in EMPTY}
        names |= {name for name in TURNS[1:] if record.get(name) not in EMPTY and record[name] != turns_of(record)}
        for turn in turns_of(record) or ():
            if isinstance(turn, dict):
                names |= {f".{name}" for name in turn.keys() - TURN_FIELDS if turn[name] not in EMPTY}
        self.fields.update(name for name in names if name in self.fields or len(self.fields) < MOST_REASONS)

    def describe(self, most: int = 3) -> str:
        """The reasons with their counts and first places, the most frequent ones; "" without any."""
        common = self.reasons.most_common(most)
        parts = [f"{reason} ({count:,}, first in {short_place(self.first[reason])})" for reason, count in common]
        rest = self.reasons.total() - sum(count for _, count in common)
        return ", ".join([*parts, *([f"other reasons ({rest:,})"] if rest else [])])

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, files by name; {} where nothing was left out."""
        found = {
            reason: {"records": count, "first": short_place(self.first[reason])}
            for reason, count in self.reasons.most_common()
        }
        return ({"left_out": found} if found else {}) | ({"unread_fields": dict(self.fields)} if self.fields else {})


def short_place(where: str) -> str:
    """A place with its file by name: "/data/a b.json item 3" is "a b.json item 3"."""
    file, kind, number = where.rsplit(" ", 2) if where.count(" ") > 1 else (where, "", "")
    return f"{Path(file).name} {kind} {number}".strip()


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _filled(holder: Mapping[str, Any], names: Iterable[str], read: Any = lambda value: value) -> Any:
    """The value under the first of the names that is filled, else "" if one is empty, else None. Raises Unusable where
    two are filled with different things."""
    given = {name: holder[name] for name in names if holder.get(name) is not None}
    filled = {name: value for name, value in given.items() if value not in EMPTY}
    (first, value), *others = filled.items() or [("", next(iter(given.values()), None))]
    for name, other in others:
        if read(other) != read(value):
            raise Unusable(f"{first} and {name} differ")
    return value


def _role(name: Any) -> str:
    if not isinstance(name, str) or name not in ROLES:
        raise Unusable("a turn without a role" if name in (None, "") else f"a turn from {shown(name, 30)}")
    return ROLES[name]


def turns_of(record: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a record, as they are; None without any. An empty list counts where nothing else is there."""
    lists = [record[name] for name in TURNS if record.get(name) is not None]
    return next((turns for turns in lists if turns not in EMPTY), lists[0] if lists else None)


def read_messages(record: Any, replies: bool = True) -> Messages:
    """The turns of a record as {"role", "content"}, a system text first. replies: False where only the questions are
    asked for, and a reply may lack its text.

    Raises Unusable for a record of another shape or with something that a conversation in text does not show.
    """
    if not isinstance(record, dict):
        raise Unusable(f"{kind_of(record)} instead of an object")
    turns = turns_of(record)
    if turns is None:
        keys = shown(", ".join(map(str, record)), 30)[1:-1]
        raise Unusable(f"neither {' nor '.join(TURNS)} among the keys {keys}" if record else "an empty object")
    if not isinstance(turns, list):
        raise Unusable(f"{kind_of(turns)} instead of a list of turns")
    if record.get("tools") not in (*EMPTY, "[]", "{}", "null"):
        raise Unusable("tools, which are not supported")
    messages = [_read_turn(turn, replies) for turn in turns]
    return with_system(messages, system_of(record))


def _read_turn(turn: Any, replies: bool) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise Unusable(f"{kind_of(turn)} instead of a turn")
    role = _role(_filled(turn, ("from", "role"), ROLES.get))
    if role == "assistant" and not replies:
        return {"role": role, "content": ""}
    if any(turn.get(name) not in EMPTY for name in ("tool_calls", "function_call")):
        raise Unusable("a turn that calls a tool")
    if role == "assistant" and turn.get("weight") not in (None, 1):
        raise Unusable(f"a reply of weight {shown(turn['weight'], 30)}")
    content = _filled(turn, ("value", "content"))
    if not isinstance(content, str):
        raise Unusable("a turn without text" if content is None else f"{kind_of(content)} instead of a turn's text")
    return {"role": role, "content": content}


def system_of(record: Mapping[str, Any]) -> str | None:
    """The system text beside the turns of a record, None without one or where it is blank."""
    text = _filled(record, SYSTEM)
    if text is not None and not isinstance(text, str):
        raise Unusable(f"{kind_of(text)} instead of a system text")
    return text if text and text.strip() else None


def with_system(messages: Messages, system: str | None) -> Messages:
    """The messages, opened by the system text, in place of a blank one. Raises Unusable if they open with another."""
    if system is None:
        return messages
    turn, others = split_system(messages)
    if turn and turn[0]["content"].strip() not in ("", system.strip()):
        raise Unusable("a system turn beside another system text")
    return messages if turn and turn[0]["content"].strip() else [{"role": "system", "content": system}, *others]


def split_system(messages: Messages) -> tuple[Messages, Messages]:
    """The system message, in a list that is empty without one, and the others."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    return messages[:first], messages[first:]


def check_alternates(turns: Messages) -> None:
    """Raises Unusable unless user and assistant alternate, the user first."""
    roles = [turn["role"] for turn in turns]
    if "system" in roles:
        raise Unusable("a system turn that is not the first")
    if roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise Unusable("turns that do not alternate")


def label(value: Any, default: str = "") -> str:
    """An id or a category as text that UTF-8 can encode; the default for null."""
    return default if value is None else str(value).encode("utf-8", "backslashreplace").decode()
