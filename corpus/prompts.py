"""The user's turns that a corpus is generated for, read from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.conversations import located_records, read_messages


@dataclass(frozen=True)
class Prompt:
    """The user's turns of a conversation, in order."""

    turns: tuple[str, ...]
    category: str = ""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a JSON list, JSON lines, gzipped or not, a datasets folder or a Parquet file: ``turns`` as in
    MT-Bench, or the user's turns of ``conversations`` or ``messages``. Records without a user's turn are skipped.

    Raises ValueError, with file and line, for records of another shape, and for a file that holds no prompt.
    """
    prompts = []
    for where, record in located_records(path):
        turns = tuple(turn.strip() for turn in _user_turns(record, where) if turn.strip())
        if turns:
            prompts.append(Prompt(turns, str(record.get("category") or "")))
    if not prompts:
        raise ValueError(f"{path} holds no user's turn; expected turns or conversations")
    return prompts


def _user_turns(record: Any, where: str) -> list[str]:
    """The user's turns of a record, blank ones included."""
    turns = record.get("turns") if isinstance(record, dict) else None
    if turns is None:
        return [turn["content"] for turn in read_messages(record, where) if turn["role"] == "user"]
    if not isinstance(turns, list):
        raise ValueError(f"{where}: expected a list under turns, got {turns!r:.60}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, str):
            raise ValueError(f"{where}: turn {number} holds {turn!r:.60}, expected text")
    return turns
