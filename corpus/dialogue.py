"""A conversation while it is generated: how it opens and how each turn ends. Knows the template, not the backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from corpus.options import MAX_TURNS, Options
from runtime.files.documents import read_json
from trainer.data.prompts import Prompt

if TYPE_CHECKING:
    from backbone.tokenizer import ChatTokenizer

# A reply whose last 64 tokens repeat with a period of at most 21 has repeated itself three times: a loop.
LOOP_TOKENS, LOOP_PERIOD = 64, 21
TURN_ROOM = 48  # tokens that must be left for a further turn to be worth starting

# How a conversation may open: kind -> (weight, first words), which the backbone continues; in "free" it chooses the
# first word too. The weights give every kind at least an eighth of the tokens.
OPENINGS: dict[str, tuple[float, list[str]]] = read_json(Path(__file__).with_name("openings.json"))

USER, REPLY, DECIDE = "user", "reply", "decide"


@dataclass
class Dialogue:
    """One conversation. ``ids`` are its tokens so far, of which the backbone has seen the first ``fed``.

    ``turn`` is where the current turn's tokens begin. ``dropped`` says why it is unusable, "" if it is usable.
    """

    index: int
    category: str
    greedy: bool
    uniforms: np.ndarray  # (2 * max_length,) float64, the conversation's random numbers
    draws: int = 0
    prompt: Prompt | None = None  # None: the user's turns are sampled
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
    cut: str = ""  # why it ends before a turn that was begun, "" if none was

    @property
    def questions(self) -> tuple[str, ...] | None:
        """The user's turns of the prompt."""
        return None if self.prompt is None else self.prompt.turns

    @property
    def num_turns(self) -> int:
        """Complete ones."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def random(self) -> float:
        """The next of its random numbers, in [0, 1)."""
        self.draws += 1
        return float(self.uniforms[(self.draws - 1) % len(self.uniforms)])

    def expect(self, ids: list[int]) -> None:
        """Replace the tokens; of what the backbone has seen, the common beginning stays."""
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
    """Takes conversations through their turns, one token at a time."""

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

    def start(self, dialogue: Dialogue, first_words: str) -> None:
        """Set the tokens that the backbone continues: the template's opening and the first words, or the first
        question of the prompt."""
        if dialogue.prompt is not None:
            dialogue.messages = dialogue.prompt.opening()
            self._ask_next(dialogue)
        else:
            self._open_turn(dialogue, first_words)

    def temperature(self, dialogue: Dialogue) -> float:
        """Of the next token; 0 is greedy."""
        if dialogue.phase == USER:
            return self.options.temperature_user
        return 0.0 if dialogue.greedy or dialogue.phase == DECIDE else self.options.temperature

    def take(self, dialogue: Dialogue, token: int, probability: float) -> bool:
        """Append the next token; True when the conversation is over.

        probability: of the awaited token, in the phase DECIDE.
        """
        if dialogue.phase == DECIDE:
            if dialogue.random() >= probability:
                return self._finish(dialogue)
            dialogue.expect(dialogue.opening)
            dialogue.phase, dialogue.turn = USER, len(dialogue.ids)
            return False
        dialogue.ids.append(token)
        return self._user_token(dialogue, token) if dialogue.phase == USER else self._reply_token(dialogue, token)

    # The user's turn

    def _opening_ids(self, messages: list[dict[str, str]], first_words: str) -> tuple[list[int], list[int]]:
        """The tokens up to the text of the next user's turn, without and with its first words."""
        text = self.tokenizer.render([*messages, {"role": "user", "content": self.mark}], False).split(self.mark)[0]
        encode = self.tokenizer.encode
        return encode(text.rstrip(" ")), encode(text + first_words if first_words else text.rstrip(" "))

    def _open_turn(self, dialogue: Dialogue, first_words: str) -> None:
        empty, ids = self._opening_ids(dialogue.messages, first_words)
        dialogue.expect(ids)
        dialogue.phase, dialogue.turn = USER, min(len(empty), len(ids))

    def _user_token(self, dialogue: Dialogue, token: int) -> bool:
        if token in self.special:
            if token != self.marker_ids[0]:
                return self._break_off(dialogue, "user turn without an end")
            return self._end_user_turn(dialogue, dialogue.ids[dialogue.turn : -1])
        if token in self.closing:
            tail = self.tokenizer.decode(
                dialogue.ids[max(dialogue.turn, len(dialogue.ids) - len(self.marker_ids) - 4) :], False
            )
            if self.reply_mark in tail:
                return self._end_user_turn(dialogue, dialogue.ids[dialogue.turn :])
        if (
            len(dialogue.ids) - dialogue.turn >= self.options.max_user_tokens
            or len(dialogue.ids) >= self.options.max_length
        ):
            return self._break_off(dialogue, "user turn too long")
        return False

    def _end_user_turn(self, dialogue: Dialogue, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids).split(self.reply_mark)[0].strip()
        if not any(c.isalnum() for c in text):
            return self._break_off(dialogue, "user turn empty")
        if not self._clean(text):
            return self._break_off(dialogue, "user turn garbled")
        return self._ask(dialogue, text)

    def _ask_next(self, dialogue: Dialogue) -> bool:
        """Ask the prompt's next question."""
        return self._ask(dialogue, dialogue.questions[dialogue.num_turns])

    def _ask(self, dialogue: Dialogue, text: str) -> bool:
        """Add the user's turn. The tokens become those of the rendered text, whichever were sampled."""
        dialogue.messages.append({"role": "user", "content": text})
        try:
            ids = self.tokenizer.encode_chat(dialogue.messages)
        except ValueError as error:  # the template refuses it, or a prompt holds half a character
            return self._break_off(dialogue, f"prompt refused: {error}")
        if len(ids) + TURN_ROOM // 2 > self.options.max_length:
            return self._break_off(dialogue, "prompt too long")
        dialogue.expect(ids)
        dialogue.phase, dialogue.turn = REPLY, len(ids)
        return False

    # The reply

    def _reply_token(self, dialogue: Dialogue, token: int) -> bool:
        ids = dialogue.ids[dialogue.turn :]
        if token in self.tokenizer.eos_ids:
            return self._end_reply(dialogue, ids[:-1])
        if token in self.special:
            return self._break_off(dialogue, "reply garbled")
        if len(ids) >= self.options.max_reply_tokens or len(dialogue.ids) >= self.options.max_length - 1:
            if dialogue.num_turns:  # better to end with the last complete turn
                return self._break_off(dialogue, "reply cut")
            dialogue.loops = in_loop(ids)
            return self._end_reply(dialogue, ids, over=True)
        return False

    def _end_reply(self, dialogue: Dialogue, ids: list[int], over: bool = False) -> bool:
        text = self.tokenizer.decode(ids).strip()
        if not text:
            return self._break_off(dialogue, "reply empty")
        if not self._clean(text):
            return self._break_off(dialogue, "reply garbled")
        dialogue.messages.append({"role": "assistant", "content": text})
        available = MAX_TURNS if dialogue.questions is None else len(dialogue.questions)
        most = available if self.options.max_turns is None else self.options.max_turns
        if over or dialogue.num_turns >= most:
            return self._finish(dialogue)
        if dialogue.questions is not None:
            return self._finish(dialogue) if dialogue.num_turns == available else self._ask_next(dialogue)
        opening = self._opening_ids(dialogue.messages, "")[0]
        if len(opening) + TURN_ROOM > self.options.max_length:
            return self._finish(dialogue)
        if self.options.continuation is not None:
            if dialogue.random() >= self.options.continuation:
                return self._finish(dialogue)
            self._open_turn(dialogue, "")
            return False
        try:
            closed, said = self.tokenizer.encode_with_mask(dialogue.messages)
        except ValueError:
            return self._finish(dialogue)  # which drops it with its reason
        last = max(index for index, is_said in enumerate(said) if is_said)
        shared = 0
        while shared < min(len(closed), len(opening) - 1) and closed[shared] == opening[shared]:
            # Some templates always write the head of the next turn: the backbone decides before it.
            if shared > last and self.tokenizer.decode(closed[shared : shared + 1], False).strip():
                break
            shared += 1
        dialogue.phase, dialogue.opening, dialogue.awaited = DECIDE, opening, opening[shared]
        dialogue.expect(opening[:shared])
        return False

    # The end

    def _clean(self, text: str) -> bool:
        """Whether a text has no half characters and no role label, which would change how the rendered text reads."""
        return "\N{REPLACEMENT CHARACTER}" not in text and not any(label in text for label in self.labels)

    def _break_off(self, dialogue: Dialogue, reason: str) -> bool:
        """The turn is unusable: end the conversation before it, or drop it when this is the first turn."""
        while dialogue.messages and dialogue.messages[-1]["role"] != "assistant":
            dialogue.messages.pop()
        if not dialogue.messages:
            dialogue.dropped = reason
            return True
        dialogue.cut = reason
        return self._finish(dialogue)

    def _finish(self, dialogue: Dialogue) -> bool:
        """Count the tokens as training will; drop what training would have to leave out."""
        try:
            dialogue.num_tokens = len(self.tokenizer.encode_with_mask(dialogue.messages)[0])
        except ValueError as error:
            dialogue.messages, dialogue.dropped = [], f"conversation refused: {error}"
        return True


def new_dialogues(writer: Writer, prompts: list[Prompt] | None, first: int = 0) -> Iterator[Dialogue]:
    """Conversations to generate, opened, from index ``first`` on: one for each prompt, or without end.

    Each depends on the options' seed and its index only.
    """
    options = writer.options
    kinds = list(OPENINGS)
    weights = np.array([OPENINGS[kind][0] for kind in kinds])
    index = first
    while prompts is None or index < len(prompts):
        random = np.random.default_rng([options.seed, index])
        greedy = bool(random.random() < options.greedy_share)
        kind = kinds[int(random.choice(len(kinds), p=weights / weights.sum()))]
        words = OPENINGS[kind][1]
        first_words = words[int(random.integers(len(words)))]
        dialogue = Dialogue(index, kind, greedy or options.temperature == 0, random.random(2 * options.max_length))
        if prompts is not None:
            dialogue.category, dialogue.prompt = prompts[index].category, prompts[index]
        writer.start(dialogue, first_words)
        index += 1
        yield dialogue
