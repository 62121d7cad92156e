"""A training corpus that the backbone writes itself: both sides of conversations, many of them at a time.

    python -m trainer.distill --num-conversations 100 --out corpus.jsonl.gz

A draft head has to predict what the backbone says when it decodes greedily, so the best text to train it on is the
backbone's own. The user's turns are sampled, for variety, or come from a file; most replies are greedy.

Every conversation has its own random numbers, drawn from (seed, its index), and on the CPU the backbone's rows do not
depend on their neighbours: the file depends on neither the batch size nor the timing.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.entry import run_entry

# Jittor and the tokenizers are loaded where they are used: a mistyped option is answered at once.
if TYPE_CHECKING:
    from backbone.model import Backbone
    from backbone.tokenizer import ChatTokenizer
    from ops.decoder_layer import RowPlan

# Sampling looks at this many candidates: enough for top-p 0.95 at temperature 0.8 in nearly every row, and cheap.
NUM_CANDIDATES = 64
# A reply whose last 64 tokens repeat with a period of at most 21 went round three times: a loop.
LOOP_TOKENS, LOOP_PERIOD = 64, 21
# Room a further turn needs to be worth starting, in tokens.
TURN_ROOM = 48

# How a conversation may open: kind -> (weight, first words). The model goes on from there; "free" leaves the first
# word to it too. The weights are chosen so that every kind has at least an eighth of the tokens.
NAMES = "Anna Ben Carla David Emma Frank Grace Henry Irene Jack Kate Leo Maria Nick Olivia Peter Rosa Sam Tina Victor"
OPENINGS: dict[str, tuple[float, tuple[str, ...]]] = {
    "booking": (0.17, (
        "I need", "I want to", "I would like", "I'd like to", "I'm looking for", "Can you find", "Can you help me",
        "Could you", "Please", "Find me", "Book", "Show me", "What is the weather", "Are there any", "I am planning",
        "Help me", "My", "I have to", "We", "Search for", "Reserve", "Is there", "Play", "Get me",
    )),
    "openchat": (0.20, (
        "Have you seen", "Did you watch", "Do you like", "Do you watch", "What kind of", "Who is your favorite",
        "I love", "I think", "My favorite", "What do you think", "Have you heard", "I just", "I really", "Hey", "So",
        "What movies", "What music", "I used to", "Have you ever", "Who do you", "I saw", "I am a fan of", "Which",
        "The",
    )),
    "story": (0.14, ("Continue this story:", *(f"Continue this story: {words}" for words in (
        "Once upon a time", "There was once", "There lived", "One day", "In the", "The king", "The old", "When",
        "A poor", "Now", "Then", "But", "So", "Long ago", "At last", "The next", '"', "She", "He", "They", "After",
    )))),
    "math": (0.20, (
        *(f"{name}{rest}" for name in NAMES.split() for rest in ("", " has", " buys", "'s", " and")),
        "A", "There are", "If", "In a", "At the", "The", "Each", "How many", "A farmer", "A shop", "Half of", "Two",
        "On Monday", "A train", "A baker", "Last", "Every", "It takes", "Three",
    )),
    "chitchat": (0.22, (
        "Hi", "Hello", "How are", "How old", "How do you", "Who are", "Who made", "Tell me", "What is your",
        "What's your", "What are you", "What can you", "Are you", "Are you a", "Do you", "Do you have", "Can you",
        "You are", "You're", "You're so", "You have", "Good", "Will you", "Where do", "Where are", "Why are", "I am",
        "I'm", "I'm so", "I feel", "I like you", "I love you", "I hate", "Should I", "Be my", "That was", "That's",
        "Let's", "Thank", "Thanks", "Say", "Sing", "Stop", "My friend", "Yes", "No", "Wow", "Sorry", "See you",
        "Nice", "When is your",
    )),
    "free": (0.10, ("",)),
}  # fmt: skip


def _option(default, text: str, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Options:
    """What decides the corpus, besides the backbone. Raises ValueError for values that make no sense."""

    num_tokens: int | None = _option(None, "stop when the kept conversations hold this many tokens", type=int)
    num_conversations: int | None = _option(None, "stop when this many conversations are kept", type=int)
    batch_size: int = _option(64, "conversations written at a time; does not change the result")
    seed: int = _option(0, "every choice is drawn from it")
    temperature_user: float = _option(0.8, "sampling temperature of the user's turns")
    temperature: float = _option(0.7, "sampling temperature of the replies that are not greedy")
    greedy_share: float = _option(0.8, "share of the conversations whose replies are greedy")
    top_p: float = _option(0.95, "sample from the likeliest tokens that hold this much probability")
    max_turns: int = _option(4, "most question-answer turns of a conversation")
    continuation: float | None = _option(
        None,
        "probability of a further turn; default: as probable as the backbone thinks one is",
        flag="--continue",
        type=float,
    )
    max_length: int = _option(512, "most tokens of a conversation, template included")
    max_user_tokens: int = _option(160, "most tokens of a user's turn; a longer one is not used")
    max_reply_tokens: int = _option(192, "most tokens of a reply")
    max_loops: float = _option(0.04, "most kept conversations, as a share, that end in a reply that repeats itself")

    def __post_init__(self) -> None:
        for name in ("temperature_user", "temperature"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1")
        for name in ("greedy_share", "max_loops"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a share between 0 and 1")
        self._check("continuation", self.continuation is None or 0 <= self.continuation <= 1, "between 0 and 1")
        for name in ("batch_size", "max_turns", "max_length", "max_user_tokens", "max_reply_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_tokens", "num_conversations"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        self._check("seed", self.seed >= 0, "0 or more")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected {expected}")


def _flag(name: str) -> str:
    named = {f.name: f.metadata.get("flag") for f in fields(Options)}
    return named.get(name) or "--" + name.replace("_", "-")


# A conversation while it is written -----------------------------------------------------------------------------------

USER, REPLY, DECIDE = "user", "reply", "decide"


@dataclass
class Talk:
    """One conversation. ``ids`` are its tokens so far, of which the backbone has seen the first ``fed``.

    ``turn`` is where the current turn's tokens begin. ``dropped`` says why it is of no use, "" if it is.
    """

    index: int
    category: str
    greedy: bool
    uniforms: np.ndarray  # (2 * max_length,) float64, the conversation's random numbers
    draws: int = 0
    questions: tuple[str, ...] | None = None  # the user's turns where they are given
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    fed: int = 0
    turn: int = 0
    phase: str = USER
    awaited: int = -1  # DECIDE: the token by which the backbone would open a further turn
    opening: list[int] = field(default_factory=list)  # DECIDE: the tokens up to that turn's text
    num_tokens: int = 0
    loops: bool = False
    dropped: str = ""

    @property
    def num_turns(self) -> int:
        return len(self.messages) // 2

    def uniform(self) -> float:
        """The next of its random numbers."""
        self.draws += 1
        return float(self.uniforms[(self.draws - 1) % len(self.uniforms)])

    def expect(self, ids: list[int]) -> None:
        """The tokens are to be exactly these: what the backbone has seen of others is forgotten."""
        common = 0
        for ours, theirs in zip(self.ids[: self.fed], ids, strict=False):
            if ours != theirs:
                break
            common += 1
        self.ids, self.fed = list(ids), min(common, len(ids) - 1)


def in_loop(token_ids: list[int]) -> bool:
    """True when the last 64 tokens repeat with a period of at most 21.

    >>> in_loop([9] + [1, 2, 3] * 22), in_loop(list(range(100)))
    (True, False)
    """
    tail = token_ids[-LOOP_TOKENS:]
    return len(tail) == LOOP_TOKENS and any(tail[p:] == tail[:-p] for p in range(1, LOOP_PERIOD + 1))


class Writer:
    """Takes conversations through their turns, one token at a time. Knows the template, not the backbone."""

    def __init__(self, tokenizer: ChatTokenizer, options: Options):
        self.tokenizer, self.options = tokenizer, options
        mark = "\N{ASTERISM}"
        before, after = tokenizer.render([{"role": "user", "content": mark}], True).split(mark)
        if not after.strip():
            raise ValueError("the chat template does not mark where a reply begins; choose one by name with --template")
        if len(tokenizer.encode(before)) + TURN_ROOM > options.max_length:
            raise ValueError(
                f"--max-length is {options.max_length}, expected {TURN_ROOM} more than the template's opening of "
                f"{len(tokenizer.encode(before))} tokens"
            )
        self.mark, self.reply_mark = mark, after.strip()
        self.marker_ids = tokenizer.encode(after)
        labels = {self.reply_mark, before.split()[-1] if before.split() else ""}
        self.labels = [label for label in labels if label]
        texts = [tokenizer.decode([i], False) for i in range(tokenizer.vocab_size)]
        self.special = {i for i, text in enumerate(texts) if text and not tokenizer.decode([i], True)}
        self.closing = {i for i, text in enumerate(texts) if self.reply_mark and text.endswith(self.reply_mark[-1])}

    def start(self, talk: Talk, first_words: str) -> None:
        """Put the template's opening and the first words, or the first given question, before the backbone."""
        if talk.questions is not None:
            self._ask(talk, talk.questions[0])
        else:
            self._open_turn(talk, first_words)

    def temperature(self, talk: Talk) -> float:
        """What the talk's next token is sampled with; 0 is greedy."""
        if talk.phase == USER:
            return self.options.temperature_user
        return 0.0 if talk.greedy or talk.phase == DECIDE else self.options.temperature

    def take(self, talk: Talk, token: int, probability: float) -> bool:
        """The token chosen behind the talk's last one; True when the conversation is over.

        probability: of the awaited token, while that is what is asked.
        """
        if talk.phase == DECIDE:
            if talk.uniform() >= probability:
                return self._finish(talk)
            talk.expect(talk.opening)
            talk.phase, talk.turn = USER, len(talk.ids)
            return False
        talk.ids.append(token)
        return self._user_token(talk, token) if talk.phase == USER else self._reply_token(talk, token)

    # The user's turn

    def _opening_ids(self, messages: list[dict[str, str]], first_words: str) -> tuple[list[int], list[int]]:
        """The tokens up to the text of the next user's turn, without and with its first words."""
        text = self.tokenizer.render([*messages, {"role": "user", "content": self.mark}], False).split(self.mark)[0]
        encode = self.tokenizer.encode
        return encode(text.rstrip(" ")), encode(text + first_words if first_words else text.rstrip(" "))

    def _open_turn(self, talk: Talk, first_words: str) -> None:
        empty, ids = self._opening_ids(talk.messages, first_words)
        talk.expect(ids)
        talk.phase, talk.turn = USER, min(len(empty), len(ids))

    def _user_token(self, talk: Talk, token: int) -> bool:
        if token in self.special:
            if token != self.marker_ids[0]:
                return self._break_off(talk, "user turn without an end")
            return self._end_user_turn(talk, talk.ids[talk.turn : -1])
        if token in self.closing:
            tail = self.tokenizer.decode(talk.ids[max(talk.turn, len(talk.ids) - len(self.marker_ids) - 4) :], False)
            if self.reply_mark in tail:
                return self._end_user_turn(talk, talk.ids[talk.turn :])
        if len(talk.ids) - talk.turn >= self.options.max_user_tokens or len(talk.ids) >= self.options.max_length:
            return self._break_off(talk, "user turn too long")
        return False

    def _end_user_turn(self, talk: Talk, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids).split(self.reply_mark)[0].strip()
        if not any(c.isalnum() for c in text):
            return self._break_off(talk, "user turn empty")
        if not self._clean(text):
            return self._break_off(talk, "user turn garbled")
        return self._ask(talk, text)

    def _ask(self, talk: Talk, text: str) -> bool:
        """The user says this; the tokens are those of the rendered text, however they were come by."""
        talk.messages.append({"role": "user", "content": text})
        ids = self.tokenizer.encode_chat(talk.messages)
        if len(ids) + TURN_ROOM // 2 > self.options.max_length:
            return self._break_off(talk, "prompt too long")
        talk.expect(ids)
        talk.phase, talk.turn = REPLY, len(ids)
        return False

    # The reply

    def _reply_token(self, talk: Talk, token: int) -> bool:
        ids = talk.ids[talk.turn :]
        if token in self.special:
            ended = token in self.tokenizer.eos_ids
            return self._end_reply(talk, ids[:-1]) if ended else self._break_off(talk, "reply garbled")
        if len(ids) >= self.options.max_reply_tokens or len(talk.ids) >= self.options.max_length - 1:
            if talk.num_turns:  # the last whole turn is the better end
                return self._break_off(talk, "reply cut")
            talk.loops = in_loop(ids)
            return self._end_reply(talk, ids, over=True)
        return False

    def _end_reply(self, talk: Talk, ids: list[int], over: bool = False) -> bool:
        text = self.tokenizer.decode(ids).strip()
        if not text:
            return self._break_off(talk, "reply empty")
        if not self._clean(text):
            return self._break_off(talk, "reply garbled")
        talk.messages.append({"role": "assistant", "content": text})
        if over or talk.num_turns >= self.options.max_turns:
            return self._finish(talk)
        if talk.questions is not None:
            if talk.num_turns == len(talk.questions):
                return self._finish(talk)
            return self._ask(talk, talk.questions[talk.num_turns])
        opening = self._opening_ids(talk.messages, "")[0]
        if len(opening) + TURN_ROOM > self.options.max_length:
            return self._finish(talk)
        if self.options.continuation is not None:
            if talk.uniform() >= self.options.continuation:
                return self._finish(talk)
            self._open_turn(talk, "")
            return False
        closed = self.tokenizer.encode_chat(talk.messages, add_generation_prompt=False)
        shared = 0
        while shared < min(len(closed), len(opening) - 1) and closed[shared] == opening[shared]:
            shared += 1
        talk.phase, talk.opening, talk.awaited = DECIDE, opening, opening[shared]
        talk.expect(opening[:shared])
        return False

    # The end

    def _clean(self, text: str) -> bool:
        """No half characters, and no role label that would make the rendered text read differently."""
        return "\N{REPLACEMENT CHARACTER}" not in text and not any(label in text for label in self.labels)

    def _break_off(self, talk: Talk, reason: str) -> bool:
        """The turn is of no use: the conversation ends before it, and is dropped when nothing came before."""
        talk.messages = talk.messages[: talk.num_turns * 2]
        if not talk.messages:
            talk.dropped = reason
            return True
        return self._finish(talk)

    def _finish(self, talk: Talk) -> bool:
        talk.num_tokens = len(self.tokenizer.encode_chat(talk.messages, add_generation_prompt=False))
        return True


# Many at a time -------------------------------------------------------------------------------------------------------


def lane_plan(lanes: np.ndarray, fed: np.ndarray, counts: np.ndarray, capacity: int) -> RowPlan:
    """New rows for several sequences in one cache, each in its own stretch of ``capacity`` slots.

    Worked example with capacity 10: lanes [0, 2], fed [3, 0], counts [1, 2] give slots [3, 20, 21], positions
    [3, 0, 1], starts [0, 20, 20] and contiguous [4, 1, 2].
    """
    from ops.decoder_layer import RowPlan

    rows = np.arange(counts.sum())
    positions = rows - np.repeat(np.cumsum(counts) - counts - fed, counts)
    starts = np.repeat(lanes * capacity, counts)
    plan = RowPlan.__new__(RowPlan)
    plan._build(positions, starts + positions, starts, positions + 1, [[]] * len(rows))
    return plan


def sample(values: np.ndarray, temperatures: np.ndarray, top_p: float, uniforms: np.ndarray) -> np.ndarray:
    """A column for each row: the first where the temperature is 0, else drawn from the smallest set of columns that
    holds ``top_p`` of the probability. values: (rows, columns), descending. Returns (rows,) int64.

    A row's result does not depend on the other rows.
    """
    columns = np.zeros(len(values), np.int64)
    drawn = np.flatnonzero(temperatures > 0)
    if len(drawn):
        scores = values[drawn].astype(np.float64)
        p = np.exp((scores - scores[:, :1]) / temperatures[drawn, None])
        p /= p.sum(1, keepdims=True)
        p = np.where(p.cumsum(1) - p < top_p, p, 0.0)
        edges = p.cumsum(1)
        columns[drawn] = (edges <= uniforms[drawn, None] * edges[:, -1:]).sum(1)
    return columns


class Batch:
    """The lanes: each carries a conversation until it is over, then the next one. ``generated`` counts new tokens."""

    def __init__(self, backbone: Backbone, writer: Writer):
        from backbone.cache import KVCache

        self.backbone, self.writer, self.generated = backbone, writer, 0
        options = writer.options
        if options.max_length > backbone.config.max_positions:
            raise ValueError(
                f"--max-length is {options.max_length}, the backbone has {backbone.config.max_positions} positions"
            )
        self.capacity = options.max_length
        # One stretch of slots per lane: more slots than positions, which is why new_cache does not serve here.
        self.cache = KVCache(backbone.config, options.batch_size * self.capacity, backbone.dtype)

    def run(self, talks: Iterator[Talk]) -> Iterator[Talk]:
        """Each conversation once it is over, in the order of their indices."""
        free = list(range(self.writer.options.batch_size))[::-1]
        active: dict[int, Talk] = {}
        finished: dict[int, Talk] = {}
        awaited = next_index = 0
        while True:
            while free and (talk := next(talks, None)) is not None:
                assert talk.index == next_index, (talk.index, next_index)
                next_index += 1
                if talk.messages or talk.ids:  # one whose prompt did not fit is over before it began
                    active[free.pop()] = talk
                else:
                    finished[talk.index] = talk
            while awaited in finished:
                yield finished.pop(awaited)
                awaited += 1
            if not active:
                return
            for lane in self._step(active):
                talk = active.pop(lane)
                finished[talk.index] = talk
                free.append(lane)

    def _step(self, active: dict[int, Talk]) -> list[int]:
        """One pass over what is new in every lane, one token more for each. Returns the lanes that are done."""
        from ops.select import top_k

        lanes, talks = list(active), list(active.values())
        fed = np.array([talk.fed for talk in talks])
        counts = np.array([len(talk.ids) for talk in talks]) - fed
        token_ids = np.array([token for talk in talks for token in talk.ids[talk.fed :]], np.int32)
        plan = lane_plan(np.array(lanes), fed, counts, self.capacity)
        hidden = self.backbone.forward(token_ids[None], cache=self.cache, attend=plan, logits=None).hidden
        hidden = hidden.reshape(len(token_ids), -1)
        if len(token_ids) > len(lanes):
            hidden = hidden[(counts.cumsum() - 1).astype(np.int32)]
        logits = self.backbone.lm_logits(hidden)
        values, indices = (v.numpy() for v in top_k(logits, min(NUM_CANDIDATES, logits.shape[1])))
        temperatures = np.array([self.writer.temperature(talk) for talk in talks])
        uniforms = np.array([talk.uniform() if t > 0 else 0.0 for talk, t in zip(talks, temperatures, strict=True)])
        columns = sample(values, temperatures, self.writer.options.top_p, uniforms)
        done = []
        for row, (lane, talk) in enumerate(zip(lanes, talks, strict=True)):
            talk.fed = len(talk.ids)
            probability = 0.0
            if talk.phase == DECIDE:
                p = np.exp(values[row].astype(np.float64) - values[row, 0])
                probability = float(p[indices[row] == talk.awaited].sum() / p.sum())
            else:
                self.generated += 1
            if self.writer.take(talk, int(indices[row, columns[row]]), probability):
                done.append(lane)
        return done


def new_talks(writer: Writer, prompts: list[Prompt] | None) -> Iterator[Talk]:
    """The conversations to be written, opened: one for each prompt, or without end."""
    options = writer.options
    kinds = list(OPENINGS)
    weights = np.array([OPENINGS[kind][0] for kind in kinds])
    index = 0
    while prompts is None or index < len(prompts):
        random = np.random.default_rng([options.seed, index])
        greedy = bool(random.random() < options.greedy_share)
        kind = kinds[int(random.choice(len(kinds), p=weights / weights.sum()))]
        words = OPENINGS[kind][1]
        first_words = words[int(random.integers(len(words)))]
        talk = Talk(index, kind, greedy, random.random(2 * options.max_length))
        if prompts is not None:
            talk.category, talk.questions = prompts[index].category, prompts[index].turns
        writer.start(talk, first_words)
        index += 1
        yield talk


# Files ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """The user's turns of a conversation, in order."""

    turns: tuple[str, ...]
    category: str = ""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a JSON list or JSON lines: ``turns`` as in MT-Bench, or the user's turns of ``conversations``.

    Raises ValueError for a file that holds none.
    """
    from trainer.data import ROLES, _records

    prompts = []
    for line, record in _records(Path(path)):
        where = f"{path} line {line}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: got a {type(record).__name__}, expected an object with turns or conversations")
        turns = record.get("turns")
        if turns is None:
            said = record.get("conversations", record.get("messages")) or []
            said = [t for t in said if ROLES.get(t.get("from", t.get("role"))) == "user"]
            turns = [t.get("value", t.get("content")) for t in said]
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{where}: expected a list of texts under turns, or conversations")
        turns = tuple(turn.strip() for turn in turns if turn.strip())
        if turns:
            prompts.append(Prompt(turns, str(record.get("category", ""))))
    if not prompts:
        raise ValueError(f"{path} holds no user's turn; expected turns or conversations")
    return prompts


class Corpus:
    """What is kept, what is not and why, and the numbers of the report."""

    def __init__(self, options: Options):
        self.options = options
        self.dropped: Counter[str] = Counter()
        self.kinds: dict[str, Counter[str]] = {}
        self.replies: Counter[str] = Counter()
        self.seen: set[tuple[str, ...]] = set()
        self.written = self.kept = self.tokens = self.loops = self.greedy = 0

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
        kind = self.kinds.setdefault(talk.category, Counter())
        kind.update(conversations=1, turns=talk.num_turns, tokens=talk.num_tokens)
        self.replies.update(m["content"] for m in talk.messages if m["role"] == "assistant")
        return True

    def _refuse(self, talk: Talk) -> str:
        asked = [m["content"].casefold() for m in talk.messages if m["role"] == "user"]
        key = tuple(asked) if talk.questions is not None else (asked[0],)
        if key in self.seen:
            return "same opening as an earlier one"
        if talk.loops and self.loops + 1 > self.options.max_loops * (self.kept + 1):
            return "reply in a loop"
        self.seen.add(key)
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
        lost = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common()) or "none"
        return "\n".join([*lines, f"dropped {self.dropped.total():,} of {self.written:,}: {lost}"])


def record_of(talk: Talk) -> dict[str, Any]:
    """The conversation as a ShareGPT record, with its kind."""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in talk.messages]
    return {"id": f"{talk.category or 'talk'}-{talk.index}", "category": talk.category, "conversations": turns}


def _temporary(path: Path) -> tuple[int, str]:
    """An open file beside ``path``, and its name."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a directory; expected a file, such as {path / 'corpus.jsonl.gz'}")
    try:
        return tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Raises ValueError when ``path`` cannot be written."""
    handle, temporary = _temporary(path)
    os.close(handle)
    os.unlink(temporary)


@contextlib.contextmanager
def atomic_lines(path: Path) -> Iterator[Any]:
    """A function that writes one record a line, gzipped for a name in .gz; the file appears once all is well.

    The bytes depend on the records alone: no time and no name are stored. Raises ValueError when the folder takes no
    new file.
    """
    handle, temporary = _temporary(path)
    try:
        with open(handle, "wb") as raw:
            zipped = path.suffix == ".gz"
            file = gzip.GzipFile("", "wb", 9, raw, mtime=0) if zipped else raw
            yield lambda record: file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            if zipped:
                file.close()
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp lets nobody else read it
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_corpus(
    backbone: Backbone, tokenizer: ChatTokenizer, options: Options, out: str | Path, prompts: list[Prompt] | None = None
) -> Corpus:
    """Write conversations to ``out`` until there are enough, or one for each prompt; returns the counts.

    Raises ValueError for a file that cannot be written, before any work, and when none of the first 1000
    conversations is of use. Ctrl-C says how far it got and leaves no file.
    """
    corpus = Corpus(options)
    with atomic_lines(Path(out)) as write:
        batch = Batch(backbone, Writer(tokenizer, options))
        begun = said = time.perf_counter()

        def progress() -> str:
            speed = batch.generated / (time.perf_counter() - begun)
            return f"{corpus.kept:,} conversations, {corpus.tokens:,} tokens kept; {speed:,.0f} tokens/s written"

        try:
            for talk in batch.run(new_talks(batch.writer, prompts)):
                if corpus.keep(talk):
                    write(record_of(talk))
                elif not corpus.kept and corpus.written == 1000:
                    raise ValueError(f"none of 1000 conversations is of use: {dict(corpus.dropped)}")
                if corpus.full:
                    break
                if time.perf_counter() - said > 5:
                    said = time.perf_counter()
                    print(progress(), file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(f"interrupted at {progress()}; {out} was not written", file=sys.stderr)
            raise
        if not corpus.kept:
            raise ValueError(f"none of {corpus.written} conversations is of use: {dict(corpus.dropped)}")
        print(progress(), file=sys.stderr)
    return corpus


def main(arguments: list[str]) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m trainer.distill", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write; gzipped if it ends in .gz")
    parser.add_argument("--backbone", metavar="DIR", help="who writes (default: the embedded one)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="default: %(default)s")
    parser.add_argument("--template", metavar="NAME", help="chat template by name instead of the backbone's own")
    parser.add_argument("--prompts", metavar="FILE", help="take the user's turns from this file (MT-Bench or ShareGPT)")
    for f in fields(Options):
        kind = f.metadata.get("type", type(f.default))
        shown = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument(
            _flag(f.name), dest=f.name, type=kind, default=f.default, metavar="N", help=f.metadata["help"] + shown
        )
    given = parser.parse_args(arguments)
    values = {f.name: getattr(given, f.name) for f in fields(Options)}
    if not given.prompts and values["num_tokens"] is None and values["num_conversations"] is None:
        raise ValueError("nothing says when to stop; pass --num-tokens, --num-conversations or --prompts")
    options = Options(**values)
    prompts = read_prompts(given.prompts) if given.prompts else None
    check_writable(Path(given.out))
    from backbone.model import load_backbone
    from backbone.tokenizer import load_tokenizer

    backbone = load_backbone(given.backbone, given.dtype)
    tokenizer = load_tokenizer(given.backbone, given.template)
    tokenizer.check_fits(backbone.config)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Jittor's own handler ends the process on the spot
    corpus = write_corpus(backbone, tokenizer, options, given.out, prompts)
    print(corpus.summary())
    print(f"{given.out}: {Path(given.out).stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
