"""What goes into a corpus that the backbone writes: the prompts it is given, the conversations that are kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpus.dialogue import Prompt, Talk
from trainer.data.conversations import ROLES, located_records

if TYPE_CHECKING:
    from corpus.write import Options

# Most kept conversations, as a share, that end in a reply in a loop, where the user's turns are sampled.
MAX_LOOPS = 0.04


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a JSON list, JSON lines, gzipped or not, a datasets folder or a Parquet file: ``turns`` as in
    MT-Bench, or the user's turns of ``conversations`` or ``messages``. A record in which no user says anything is
    passed over.

    Raises ValueError, with file and line, for records of another shape, and for a file that holds no prompt.
    """
    prompts = []
    for where, record in located_records(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: got a {type(record).__name__}, expected an object with turns or conversations")
        turns = tuple(turn.strip() for turn in _user_turns(record, where) if turn.strip())
        if turns:
            prompts.append(Prompt(turns, str(record.get("category") or "")))
    if not prompts:
        raise ValueError(f"{path} holds no user's turn; expected turns or conversations")
    return prompts


def _user_turns(record: dict[str, Any], where: str) -> list[str]:
    """What the user says in a record, blank turns included."""
    shape = next((key for key in ("turns", "conversations", "messages") if record.get(key) is not None), None)
    if shape is None:
        keys = ", ".join(map(str, record)) or "none"
        raise ValueError(f"{where}: expected turns, conversations or messages, got the keys {keys}")
    said = record[shape]
    if not isinstance(said, list):
        raise ValueError(f"{where}: expected a list under {shape}, got {said!r:.60}")
    turns = []
    for number, turn in enumerate(said):
        text, role = turn, "user"
        if shape != "turns":
            if not isinstance(turn, dict):
                raise ValueError(f"{where}: turn {number} is {turn!r:.60}, expected an object")
            name = turn.get("from", turn.get("role"))
            if not isinstance(name, str) or name not in ROLES:
                raise ValueError(f"{where}: turn {number} is from {name!r:.60}, expected one of {', '.join(ROLES)}")
            text, role = turn.get("value", turn.get("content")), ROLES[name]
        if not isinstance(text, str):
            raise ValueError(f"{where}: turn {number} holds {text!r:.60}, expected text")
        if role == "user":
            turns.append(text)
    return turns


class Corpus:
    """What is kept, what is not and why, and the numbers of the report."""

    def __init__(self, options: Options):
        self.options = options
        self.dropped: Counter[str] = Counter()
        self.kinds: dict[str, Counter[str]] = {}
        self.replies: set[int] = set()  # hashes: the texts of a large corpus need not be held
        self.openings: set[str] = set()
        self.written = self.kept = self.tokens = self.loops = self.greedy = self.shortened = 0

    def keep(self, talk: Talk) -> bool:
        """Count the conversation; False when it is not to be kept."""
        self.written += 1
        reason = talk.dropped or self._refuse(talk)
        if reason:
            self.dropped[reason] += 1
            return False
        self.kept += 1
        self.tokens += talk.num_tokens
        self.loops += talk.loops
        self.greedy += talk.greedy
        self.shortened += talk.questions is not None and talk.num_turns < len(talk.questions)
        kind = self.kinds.setdefault(talk.category, Counter())
        kind.update(conversations=1, turns=talk.num_turns, tokens=talk.num_tokens)
        self.replies.update(hash(m["content"]) for m in talk.messages if m["role"] == "assistant")
        return True

    def _refuse(self, talk: Talk) -> str:
        """Why a whole conversation is not kept. Of given prompts each has its own, however often it is given."""
        opening = talk.messages[0]["content"].casefold()
        if talk.questions is None and opening in self.openings:
            return "same opening as an earlier one"
        most = self.options.max_loops
        if most is None:
            most = MAX_LOOPS if talk.questions is None else 1.0
        if talk.loops and self.loops + 1 > most * (self.kept + 1):
            return "reply in a loop"
        self.openings.add(opening)
        return ""

    @property
    def full(self) -> bool:
        """Enough is kept."""
        o = self.options
        return (o.num_tokens is not None and self.tokens >= o.num_tokens) or (
            o.num_conversations is not None and self.kept >= o.num_conversations
        )

    def summary(self) -> str:
        """The report, several lines."""
        turns = sum(kind["turns"] for kind in self.kinds.values())
        repeated = 1 - len(self.replies) / max(1, turns)
        lines = [
            f"{self.kept:,} conversations, {turns:,} turns, {self.tokens:,} tokens; {self.greedy:,} with greedy "
            f"replies, {self.loops:,} end in a loop, {repeated:.1%} of the replies repeat an earlier one",
            f"{'kind':12} {'conversations':>13} {'turns':>8} {'tokens':>10} {'share':>6}",
        ]
        for name, kind in sorted(self.kinds.items()):
            share = kind["tokens"] / self.tokens
            lines.append(
                f"{name or '-':12} {kind['conversations']:13,} {kind['turns']:8,} {kind['tokens']:10,} {share:6.1%}"
            )
        if self.shortened:
            lines.append(
                f"{self.shortened:,} end before the last of their given turns: see --max-length, --max-reply-tokens, "
                "--max-turns"
            )
        lost = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common()) or "none"
        return "\n".join([*lines, f"dropped {self.dropped.total():,} of {self.written:,}: {lost}"])


def record_of(talk: Talk) -> dict[str, Any]:
    """The conversation as a ShareGPT record, with its kind."""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in talk.messages]
    return {"id": f"{talk.category or 'talk'}-{talk.index}", "category": talk.category, "conversations": turns}
