"""Decoding prompts by each side (the baseline, the head, an adapted backbone): what they share, and what they gave.

Later turns of a prompt read the baseline's replies, for every side. With a batch size, the n-th turns of several
prompts are decoded together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from backbone.cache import BatchCache, KVCache
from backbone.model import Backbone
from backbone.tokenizer import ChatTokenizer
from bench.record.prompts import Prompt
from bench.record.schema import Failure
from decoding.drafter import ChainDrafter, make_drafter
from decoding.generate import (
    Generation,
    Timers,
    first_difference,
    generate,
    generate_autoregressive,
    generate_batch,
)
from decoding.options import Acceptance
from decoding.rules import Rule
from decoding.tree import DynamicTree, Tree
from heads.base import Head
from trainer.data.turns import short_place

# The sides: the original backbone alone, the backbone that the head adapted alone, the head.
BASELINE, ADAPTED, HEAD = "baseline", "adapted", "head"


@dataclass
class Setup:
    """What all sides share. backbone: the original. head: None measures the baseline alone; tree: then a lone root.
    decoder: the backbone that the head decodes with. batch_size: prompts that are decoded together. draft_dtype: of
    ``generate``."""

    backbone: Backbone
    tokenizer: ChatTokenizer
    cache: KVCache
    max_new_tokens: int
    repeats: int = 1
    acceptance: Acceptance = field(default_factory=Acceptance)
    batch_size: int = 1
    head: Head | None = None
    tree: Tree | DynamicTree = field(default_factory=Tree.autoregressive)
    draft_dtype: str = "float16"
    decoder: Backbone = field(init=False)

    def __post_init__(self):
        self.decoder = self.backbone if self.head is None else self.head.decoding_backbone
        ours, theirs = ((b.config, b.dtype) for b in (self.backbone, self.decoder))
        assert ours == theirs, f"an adapted backbone has the original's shape and dtype: {theirs} instead of {ours}"

    @property
    def adapts(self) -> bool:
        """Whether the head changes the backbone."""
        return self.decoder is not self.backbone

    @property
    def sides(self) -> tuple[str, ...]:
        """Who decodes a prompt; the two that are timed first."""
        adapted = self.adapts and self.acceptance.exact  # sampled texts are not compared
        return (BASELINE, *((HEAD,) if self.head is not None else ()), *((ADAPTED,) if adapted else ()))

    @property
    def drafts_in_one_call(self) -> bool:
        """Whether the head drafts its tree in one call, in the draft dtype."""
        rule = self.acceptance.rule()
        return bool(self.tree.depth) and isinstance(
            make_drafter(self.head, self.tree, rule, self.draft_dtype), ChainDrafter
        )

    @functools.cached_property
    def lanes(self) -> BatchCache:
        """The cache of a batch; as many rows for each prompt as ``cache`` has for one."""
        return BatchCache(self.backbone.config, self.batch_size, self.cache.max_length, self.backbone.dtype)

    @property
    def settings(self) -> dict:
        """When a text ends. A tokenizer is passed only if the template's end of turn is not one token but text."""
        ending = self.tokenizer.end_of_turn
        is_text = bool(ending) and tuple(self.tokenizer.encode(ending)) not in {(i,) for i in self.tokenizer.eos_ids}
        return {
            "max_new_tokens": self.max_new_tokens,
            "stop_ids": self.tokenizer.eos_ids,
            "stop_strings": (ending,) if is_text else (),
            "tokenizer": self.tokenizer if is_text else None,
        }

    def reply_text(self, generation: Generation) -> str:
        """A reply as a later turn reads it. A stop token is no part of it, though it may be an ordinary word."""
        if generation.text is not None:
            return generation.text.strip()
        ids = generation.token_ids
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.tokenizer.eos_ids else ids).strip()

    def decode(self, prompt_ids: Sequence[int], side: str, rule: Rule | None = None) -> Generation:
        """One reply, greedy without a rule."""
        settings = {**self.settings, "cache": self.cache, "rule": rule}
        if side == HEAD:
            settings["draft_dtype"] = self.draft_dtype
            return generate(self.decoder, self.head, prompt_ids, self.tree, **settings)
        return generate_autoregressive(self.backbone if side == BASELINE else self.decoder, prompt_ids, **settings)

    def decode_all(self, prompts: Sequence[Sequence[int]], side: str, rules: Sequence[Rule]) -> list[Generation]:
        """A reply to each prompt, in one batch if ``batch_size`` is above 1. Each text of a batch gets a share of the
        batch's seconds in proportion to its tokens, so that sums over texts are seconds."""
        if self.batch_size == 1:
            return [self.decode(ids, side, rule) for ids, rule in zip(prompts, rules, strict=True)]
        backbone, head = (self.backbone if side == BASELINE else self.decoder), (self.head if side == HEAD else None)
        settings = {**self.settings, "cache": self.lanes, "rules": rules, "draft_dtype": self.draft_dtype}
        found = generate_batch(backbone, head, prompts, self.tree, **settings)
        total = sum(len(each.token_ids) for each in found)
        for each in found:
            each.timers = scale_timers(each.timers, len(each.token_ids) / total)
        return found


@dataclass
class Stretch:
    """The turns of one prompt, decoded one way, once. Prefills and the tokens they emit are in none of the sums."""

    generations: list[Generation] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the decoding passes; the first token of a turn is the prefill's."""
        return sum(len(generation.token_ids) - 1 for generation in self.generations)

    @property
    def passes(self) -> int:
        """Backbone passes, without prefills."""
        return sum(generation.num_passes for generation in self.generations)

    @property
    def timers(self) -> Timers:
        """Seconds by stage, summed over the turns."""
        return sum_timers(generation.timers for generation in self.generations)

    @property
    def time_s(self) -> float:
        """Seconds of decoding."""
        timers = self.timers
        return timers.total_s - timers.prefill_s

    @property
    def total_variation(self) -> float | None:
        """The rule's, summed over the turns; None for an exact rule."""
        found = [generation.total_variation for generation in self.generations]
        return None if None in found else sum(found)

    def by_depth(self, name: str) -> list[int]:
        """``reached_by_depth`` or ``accepted_by_depth``, summed over the turns."""
        return np.sum([getattr(generation, name) for generation in self.generations], axis=0, dtype=int).tolist()


@dataclass
class Difference:
    """Where a head first differed from autoregressive decoding by its backbone. before: tokens of the turns before;
    position: in this turn."""

    prompt_ids: list[int]
    expected_ids: list[int]
    head_ids: list[int]
    before: int
    position: int


@dataclass
class Attempt:
    """One prompt, every turn by every side, once; an absent side has no turns. dropped_turns: turns whose prompt did
    not fit into the cache."""

    baseline: Stretch
    head: Stretch
    adapted: Stretch
    dropped_turns: int = 0
    difference: Difference | None = None


def sum_timers(several) -> Timers:
    """Stage by stage."""
    total = Timers()
    for timers in several:
        for stage, seconds in dataclasses.asdict(timers).items():
            setattr(total, stage, getattr(total, stage) + seconds)
    return total


def scale_timers(timers: Timers, share: float) -> Timers:
    """Every stage times ``share``."""
    return Timers(**{stage: seconds * share for stage, seconds in dataclasses.asdict(timers).items()})


class Conversation:
    """One prompt's turns so far, and what every side replied. The history holds the baseline's replies."""

    def __init__(self, setup: Setup, prompt: Prompt, index: int):
        self.setup, self.prompt, self.index = setup, prompt, index
        self.attempt, self.messages = Attempt(Stretch(), Stretch(), Stretch()), prompt.opening()

    def ask(self, turn: int) -> list[int] | None:
        """The prompt's tokens up to this turn; None once the conversation is over. Raises ValueError if the first turn
        does not fit into the cache or makes no prompt."""
        if turn >= len(self.prompt.turns) or self.attempt.dropped_turns:
            return None
        self.messages.append({"role": "user", "content": self.prompt.turns[turn]})
        prompt_ids, rows = self.setup.tokenizer.encode_chat(self.messages), self.setup.cache.max_length
        if len(prompt_ids) > rows:
            if turn == 0:
                raise ValueError(f"the prompt has {len(prompt_ids)} tokens, the cache {rows} rows; see --cache-length")
            self.attempt.dropped_turns = len(self.prompt.turns) - turn
            return None
        return prompt_ids

    def take(self, prompt_ids: list[int], given: dict[str, Generation]) -> None:
        """Add the replies of all sides to one turn."""
        attempt, baseline = self.attempt, given[BASELINE]
        expected = given.get(ADAPTED, baseline)
        if HEAD in given and attempt.difference is None and self.setup.acceptance.exact:
            position = first_difference(expected.token_ids, given[HEAD].token_ids)
            if position is not None:
                earlier = (attempt.adapted if self.setup.adapts else attempt.baseline).generations
                before = sum(len(generation.token_ids) for generation in earlier)
                attempt.difference = Difference(prompt_ids, expected.token_ids, given[HEAD].token_ids, before, position)
        for side, generation in given.items():
            getattr(attempt, side).generations.append(generation)
        self.messages.append({"role": "assistant", "content": self.setup.reply_text(baseline)})


def attempt_all(setup: Setup, prompts: Sequence[Prompt], first: int, head_first: bool) -> list[Attempt]:
    """All turns of some prompts, the n-th turns of all of them together, each decoded by the sides back to back, the
    timed ones first. first: the number of the first prompt among all.

    Raises ValueError for a prompt whose first turn does not fit into the cache or makes no prompt.
    """
    talks = [Conversation(setup, prompt, first + place) for place, prompt in enumerate(prompts)]
    sides = (HEAD, BASELINE, *setup.sides[2:]) if head_first and HEAD in setup.sides else setup.sides
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = [(talk, ids) for talk in talks if (ids := talk.ask(turn)) is not None]
        if not asked:
            break
        rules = [setup.acceptance.rule(talk.index, turn) for talk, _ in asked]
        replies = {side: setup.decode_all([ids for _, ids in asked], side, rules) for side in sides}
        for place, (talk, ids) in enumerate(asked):
            talk.take(ids, {side: found[place] for side, found in replies.items()})
    return [talk.attempt for talk in talks]


def check_prompt(setup: Setup, prompt: Prompt) -> None:
    """Raises ValueError if the first turn does not fit into the cache, or if any turn makes no prompt: the template
    refuses it, or it holds half a character. Later turns are tried with a stand-in for the replies."""
    messages = prompt.opening()
    for turn in prompt.turns:
        messages.append({"role": "user", "content": turn})
        setup.tokenizer.render(messages)
        messages.append({"role": "assistant", "content": "-"})
    Conversation(setup, prompt, 0).ask(0)


def usable_prompts(setup: Setup, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Failure]]:
    """The prompts that can be decoded, and why the others cannot."""
    usable, failures = [], []
    for prompt in prompts:
        try:
            check_prompt(setup, prompt)
            usable.append(prompt)
        except ValueError as error:
            place = f" ({short_place(prompt.where)})" if prompt.where else ""
            failures.append(Failure(prompt_id=prompt.prompt_id, error=f"{error}{place}"))
    return usable, failures
