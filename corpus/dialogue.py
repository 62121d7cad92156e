"""A conversation while it is written: how it opens, and how each turn ends. Knows the template, not the backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.conversations import HALF_CHARACTER

if TYPE_CHECKING:
    from backbone.tokenizer import ChatTokenizer
    from corpus.write import Options

# A reply whose last 64 tokens repeat with a period of at most 21 went round three times: a loop.
LOOP_TOKENS, LOOP_PERIOD = 64, 21
# Room a further turn needs to be worth starting, in tokens.
TURN_ROOM = 48
# Most turns of a conversation whose user's turns are sampled.
MAX_TURNS = 4

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

USER, REPLY, DECIDE = "user", "reply", "decide"


@dataclass(frozen=True)
class Prompt:
    """The user's turns of a conversation, in order."""

    turns: tuple[str, ...]
    category: str = ""


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
            self._ask_next(talk)
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

    def _ask_next(self, talk: Talk) -> bool:
        """The next of the given questions. One with half a character, cut in two with its text, is of no use."""
        text = talk.questions[talk.num_turns]
        if HALF_CHARACTER.search(text):
            return self._break_off(talk, "prompt garbled")
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
        given = MAX_TURNS if talk.questions is None else len(talk.questions)
        most = given if self.options.max_turns is None else self.options.max_turns
        if over or talk.num_turns >= most:
            return self._finish(talk)
        if talk.questions is not None:
            return self._finish(talk) if talk.num_turns == given else self._ask_next(talk)
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


def new_talks(writer: Writer, prompts: list[Prompt] | None, first: int = 0) -> Iterator[Talk]:
    """The conversations to be written, opened: one for each prompt, or without end; from index ``first`` on.

    Each depends on the options' seed and its index alone.
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
        talk = Talk(index, kind, greedy or options.temperature == 0, random.random(2 * options.max_length))
        if prompts is not None:
            talk.category, talk.questions = prompts[index].category, prompts[index].turns
        writer.start(talk, first_words)
        index += 1
        yield talk
