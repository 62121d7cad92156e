"""Which of the generated conversations go into the corpus, and the numbers of the report."""

from __future__ import annotations

from collections import Counter

from corpus.dialogue import Dialogue
from corpus.options import MAX_LOOPS, Options
from trainer.data.turns import short_place


class Selection:
    """Accepts conversations one by one, in order, and counts those it rejects by reason."""

    def __init__(self, options: Options):
        self.options = options
        self.dropped: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # reason -> the place of the first prompt that was dropped for it
        self.kinds: dict[str, Counter[str]] = {}
        self.replies: set[int] = set()  # hashes: the texts of a large corpus need not stay in memory
        self.openings: set[str] = set()
        self.generated = self.accepted = self.tokens = self.loops = self.greedy = 0
        self.shortened: Counter[str] = Counter()

    def accept(self, dialogue: Dialogue) -> bool:
        """Count the conversation; False when it does not go into the corpus."""
        self.generated += 1
        reason = dialogue.dropped or self._reason_against(dialogue)
        if reason:
            self.dropped[reason] += 1
            if dialogue.prompt is not None:
                self.first.setdefault(reason, short_place(dialogue.prompt.where))
            return False
        self.accepted += 1
        self.tokens += dialogue.num_tokens
        self.loops += dialogue.loops
        self.greedy += dialogue.greedy
        if dialogue.prompt is not None and dialogue.num_turns < len(dialogue.questions):
            self.shortened[dialogue.cut or "as --max-turns says"] += 1
        kind = self.kinds.setdefault(dialogue.category, Counter())
        kind.update(conversations=1, turns=dialogue.num_turns, tokens=dialogue.num_tokens)
        self.replies.update(hash(m["content"]) for m in dialogue.messages if m["role"] == "assistant")
        return True

    def _reason_against(self, dialogue: Dialogue) -> str:
        """Why a complete conversation is rejected, "" if it is not. Prompts may be repeated as often as they like."""
        opening = dialogue.messages[0]["content"].casefold()
        if dialogue.prompt is None and opening in self.openings:
            return "same opening as an earlier one"
        most = self.options.max_loops
        if most is None:
            most = MAX_LOOPS if dialogue.prompt is None else 1.0
        if dialogue.loops and self.loops + 1 > most * (self.accepted + 1):
            return "reply in a loop"
        self.openings.add(opening)
        return ""

    @property
    def full(self) -> bool:
        """Whether the corpus has as much as was asked for."""
        o = self.options
        return (o.num_tokens is not None and self.tokens >= o.num_tokens) or (
            o.num_conversations is not None and self.accepted >= o.num_conversations
        )

    def summary(self) -> str:
        """The report, several lines."""
        turns = sum(kind["turns"] for kind in self.kinds.values())
        repeated = 1 - len(self.replies) / max(1, turns)
        lines = [
            f"{self.accepted:,} conversations, {turns:,} turns, {self.tokens:,} tokens; {self.greedy:,} with greedy "
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
                f"{self.shortened.total():,} end before the last turn of their prompt: "
                f"{', '.join(f'{count:,} {why}' for why, count in self.shortened.most_common())}; see --max-length, "
                "--max-reply-tokens, --max-turns"
            )
        return "\n".join([*lines, f"dropped {self.dropped.total():,} of {self.generated:,}: {self.reasons()}"])

    def reasons(self) -> str:
        """Why conversations were dropped, with counts and, for prompts, the first place."""
        places = {reason: f" (first: {place})" for reason, place in self.first.items()}
        common = self.dropped.most_common()
        reasons = ", ".join(f"{count:,} {reason}{places.get(reason, '')}" for reason, count in common)
        return reasons or "none"
