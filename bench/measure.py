"""Times a head and its autoregressive twin on the same prompts, back to back, and counts what both gave.

Both sides share one backbone, one key-value cache and one set of stopping rules, and read the same prompts: the
history of a later turn holds the twin's replies on either side. Which side goes first alternates by prompt, so that
a machine that grows warmer or busier favours neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from backbone.cache import KVCache
from backbone.model import Backbone
from backbone.tokenizer import ChatTokenizer
from bench.metrics import comparable_rows
from bench.prompts import Prompt
from bench.record import Baseline, Failure, FirstDifference, Parity, PromptRow, Timing
from decoding.draft import draft
from decoding.generate import (
    Generation,
    Timers,
    accepted_features,
    first_difference,
    generate,
    generate_autoregressive,
    logit_gap,
)
from decoding.tree import Tree
from heads.base import Head
from runtime import jt, warm
from runtime.interrupt import check_interrupt, deferred_interrupts

# Prompt lengths of the warm-up: a lone row has kernels of its own, two rows are the shortest text, forty a usual one.
WARM_LENGTHS = (1, 2, 40)
WARM_TOKENS = 8


@dataclass
class Setup:
    """What both sides share. head: None measures the twin alone; tree: a lone root then."""

    backbone: Backbone
    tokenizer: ChatTokenizer
    cache: KVCache
    max_new_tokens: int
    repeats: int = 1
    head: Head | None = None
    tree: Tree = field(default_factory=Tree.autoregressive)

    def decode(self, prompt_ids: Sequence[int], with_head: bool) -> Generation:
        """One reply. A tokenizer goes along only where the template's end of turn is no token and has to be read."""
        ending = self.tokenizer.end_of_turn
        is_text = bool(ending) and tuple(self.tokenizer.encode(ending)) not in {(i,) for i in self.tokenizer.eos_ids}
        rules = {
            "max_new_tokens": self.max_new_tokens,
            "stop_ids": self.tokenizer.eos_ids,
            "stop_strings": (ending,) if is_text else (),
            "tokenizer": self.tokenizer if is_text else None,
            "cache": self.cache,
        }
        if with_head:
            return generate(self.backbone, self.head, prompt_ids, self.tree, **rules)
        return generate_autoregressive(self.backbone, prompt_ids, **rules)


@dataclass
class Stretch:
    """The turns of one prompt, decoded one way, once. Prefills and the tokens they emit are in none of the sums."""

    generations: list[Generation] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the decoding passes; a turn's first token is its prefill's."""
        return sum(len(generation.token_ids) - 1 for generation in self.generations)

    @property
    def passes(self) -> int:
        """Backbone passes, prefills not among them."""
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

    def by_depth(self, name: str) -> list[int]:
        """``reached_by_depth`` or ``accepted_by_depth``, summed over the turns."""
        return np.sum([getattr(generation, name) for generation in self.generations], axis=0, dtype=int).tolist()


@dataclass
class Difference:
    """Where a head first left its twin. before: tokens of the turns before; position: in this turn."""

    prompt_ids: list[int]
    baseline_ids: list[int]
    head_ids: list[int]
    before: int
    position: int


@dataclass
class Attempt:
    """One prompt, every turn both ways, once. dropped_turns: turns whose prompt no longer fitted into the cache."""

    baseline: Stretch
    head: Stretch
    dropped_turns: int = 0
    difference: Difference | None = None


@dataclass
class Measurement:
    """What one head and its twin gave on all prompts. Rows of the two lists belong together; ``rows`` is empty when
    the twin was measured alone. timers: the sums over the rows."""

    rows: list[PromptRow] = field(default_factory=list)
    baseline_rows: list[PromptRow] = field(default_factory=list)
    timers: Timers = field(default_factory=Timers)
    baseline_timers: Timers = field(default_factory=Timers)
    failures: list[Failure] = field(default_factory=list)
    difference: FirstDifference | None = None
    dropped_turns: int = 0
    late_kernels: int | None = None
    interrupted: bool = False

    @property
    def baseline(self) -> Baseline:
        """The twin on the prompts that count on both sides. pass_s is the median over prompts."""
        rows = comparable_rows(self.rows)
        tokens = sum(row.baseline_tokens for row in rows)
        seconds = sum(row.baseline_time_s for row in rows)
        per_pass = [row.baseline_time_s / row.baseline_passes for row in rows if row.baseline_passes]
        return Baseline(
            tokens_per_s=tokens / seconds if seconds else None,
            pass_s=float(np.median(per_pass)) if per_pass else None,
            total_s=float(seconds),
            tokens=tokens,
        )

    @property
    def parity(self) -> Parity:
        """How many prompts gave the twin's tokens, all turns of all repeats."""
        identical = sum(bool(row.identical) for row in self.rows)
        return Parity(prompts=len(self.rows), identical=identical, first_difference=self.difference)


def timing(timers: Timers) -> Timing:
    """The ``timing`` of a record."""
    return Timing(**dataclasses.asdict(timers))


def sum_timers(several) -> Timers:
    """Stage by stage."""
    total = Timers()
    for timers in several:
        for stage, seconds in dataclasses.asdict(timers).items():
            setattr(total, stage, getattr(total, stage) + seconds)
    return total


def measure(setup: Setup, prompts: Sequence[Prompt], on_prompt: Callable[[Measurement], None]) -> Measurement:
    """Measure every prompt; what a prompt cannot be measured for goes to ``failures`` and the run goes on.

    on_prompt: called after each prompt. Ctrl-C ends the run and keeps the prompts that were finished.
    """
    result = Measurement()
    try:
        with deferred_interrupts():
            warm_up(setup)
            kernels = loaded_kernels()
            for index, prompt in enumerate(prompts):
                try:
                    measure_prompt(setup, prompt, index, result)
                except ValueError as error:
                    result.failures.append(Failure(prompt_id=prompt.prompt_id, error=str(error)))
                on_prompt(result)
                check_interrupt()
            result.late_kernels = None if kernels is None else loaded_kernels() - kernels
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def measure_prompt(setup: Setup, prompt: Prompt, index: int, result: Measurement) -> None:
    """Decode one prompt ``setup.repeats`` times both ways and add its rows, of the repeats with the median time.

    Raises ValueError when the first turn does not fit into the cache, or does not make a prompt.
    """
    attempts = [measure_once(setup, prompt, (index + repeat) % 2 == 1) for repeat in range(setup.repeats)]
    twin = middle([attempt.baseline for attempt in attempts])
    differences = [attempt.difference for attempt in attempts if attempt.difference is not None]
    dropped = attempts[0].dropped_turns
    row = None
    if setup.head is not None:
        stretch = middle([attempt.head for attempt in attempts])
        if differences and result.difference is None:
            result.difference = explain(setup.backbone, prompt, differences[0])
        row = make_row(prompt, stretch, dropped, twin, identical=not differences)
    # From here on nothing is computed: an interrupt must not leave one side of a pair behind.
    result.baseline_rows.append(make_row(prompt, twin, dropped))
    result.baseline_timers = sum_timers([result.baseline_timers, twin.timers])
    result.dropped_turns += dropped
    if row is not None:
        result.rows.append(row)
        result.timers = sum_timers([result.timers, stretch.timers])


def measure_once(setup: Setup, prompt: Prompt, head_first: bool) -> Attempt:
    """All turns of a prompt in order, each decoded by both sides back to back."""
    attempt, messages = Attempt(Stretch(), Stretch()), []
    for turn, said in enumerate(prompt.turns):
        messages.append({"role": "user", "content": said})
        prompt_ids = setup.tokenizer.encode_chat(messages)
        if len(prompt_ids) > setup.cache.max_length:
            if turn == 0:
                rows = setup.cache.max_length
                raise ValueError(f"the prompt has {len(prompt_ids)} tokens, the cache {rows} rows; see --cache-length")
            attempt.dropped_turns = len(prompt.turns) - turn
            break
        sides = (False,) if setup.head is None else (True, False) if head_first else (False, True)
        given = {with_head: setup.decode(prompt_ids, with_head) for with_head in sides}
        twin = given[False]
        if setup.head is not None:
            position = first_difference(twin.token_ids, given[True].token_ids)
            if position is not None and attempt.difference is None:
                before = sum(len(earlier.token_ids) for earlier in attempt.baseline.generations)
                attempt.difference = Difference(prompt_ids, twin.token_ids, given[True].token_ids, before, position)
            attempt.head.generations.append(given[True])
        attempt.baseline.generations.append(twin)
        reply = setup.tokenizer.decode(twin.token_ids) if twin.text is None else twin.text
        messages.append({"role": "assistant", "content": reply.strip()})
    return attempt


def middle(stretches: Sequence[Stretch]) -> Stretch:
    """The one with the median decoding time; of an even number, the lower of the middle two."""
    return sorted(stretches, key=lambda stretch: stretch.time_s)[(len(stretches) - 1) // 2]


def explain(backbone: Backbone, prompt: Prompt, difference: Difference) -> FirstDifference:
    """The difference as a record holds it, with the gap between the backbone's two best logits there."""

    def token(ids: list[int]) -> int | None:
        return ids[difference.position] if difference.position < len(ids) else None

    return FirstDifference(
        prompt_id=prompt.prompt_id,
        position=difference.before + difference.position,
        baseline_token=token(difference.baseline_ids),
        head_token=token(difference.head_ids),
        logit_gap=logit_gap(backbone, difference.prompt_ids, difference.baseline_ids, difference.position),
    )


def make_row(
    prompt: Prompt, stretch: Stretch, dropped_turns: int, twin: Stretch | None = None, identical: bool | None = None
) -> PromptRow:
    """One line of ``per_prompt``. twin: the baseline's stretch; None in the baseline's own record."""
    tokens, passes, timers = stretch.tokens, stretch.passes, stretch.timers
    return PromptRow(
        prompt_id=prompt.prompt_id,
        category=prompt.category,
        turns=len(stretch.generations),
        prompt_tokens=sum(generation.prompt_tokens for generation in stretch.generations),
        tokens=tokens,
        passes=passes,
        accepted_by_depth=stretch.by_depth("accepted_by_depth"),
        reached_by_depth=stretch.by_depth("reached_by_depth"),
        accept_length=tokens / passes if passes else None,
        time_s=stretch.time_s,
        baseline_tokens=twin.tokens if twin else None,
        baseline_passes=twin.passes if twin else None,
        baseline_time_s=twin.time_s if twin else None,
        draft_s=timers.draft_s,
        verify_s=timers.verify_s,
        identical=identical,
        finish_reason="cache" if dropped_turns else stretch.generations[-1].finish_reason,
    )


def warm_up(setup: Setup) -> None:
    """Run every shape that a measurement meets, so that no kernel is compiled on the clock."""
    short = dataclasses.replace(setup, max_new_tokens=min(WARM_TOKENS, setup.max_new_tokens))
    for length in WARM_LENGTHS:
        prompt_ids = np.arange(min(length, setup.cache.max_length)) % setup.backbone.config.vocab_size
        for with_head in (False, True) if setup.head is not None else (False,):
            short.decode(prompt_ids, with_head)
    if setup.tree.depth:
        warm_acceptance(setup)
    warm()


def warm_acceptance(setup: Setup) -> None:
    """What follows when drafts are accepted, which the warm-up's prompts may not show: several rows are kept, not
    all of them next to each other, and the head goes on from them."""
    head, tree, cache = setup.head, setup.tree, setup.cache
    cache.rewind(0)
    with jt.no_grad():
        tokens = np.zeros((1, tree.num_nodes), np.int32)
        output = setup.backbone.forward(tokens, cache=cache, attend=tree.plan, layers=head.layers)
        path, state = np.array([0, tree.num_nodes - 1], np.int32), None
        for rows in (path, path, path[:1]):
            following = jt.array(np.zeros((1, len(rows)), np.int32))
            state = head.begin(accepted_features(output, rows), following, state)
            draft(head, state, 0, tree)
        cache.commit(path)
        cache.data.sync()
    cache.rewind(0)


def loaded_kernels() -> int | None:
    """Kernels this process has compiled or read from Jittor's cache; None where the system does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return len({line.split()[-1] for line in maps.splitlines() if "/jit/" in line and line.endswith(".so")})
