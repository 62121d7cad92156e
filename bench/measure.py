"""Times a head and autoregressive decoding, the baseline, on the same prompts, back to back, and counts what both gave.

Both sides share one key-value cache and one set of stopping rules, and read the same prompts: the history of a later
turn holds the baseline's replies for every side. Which of them goes first alternates by prompt, so that a machine that
grows warmer or busier favours neither.

The head's tokens have to be those of its twin: autoregressive decoding by the backbone that the head decodes with. That
is the baseline, unless the head adapts the backbone; then the twin is a third side, off the clock, and says besides how
far the adapted backbone's text is from the original's. The baseline is the original backbone's in any case: what a user
had before.
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
from bench.metrics import agreement, comparable_rows
from bench.prompts import Prompt
from bench.record import Adaptation, AdaptedText, Baseline, Failure, FirstDifference, Parity, PromptRow, Timing
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
# The sides: the original backbone alone, the backbone that the head changed alone, the head.
BASELINE, ADAPTED, HEAD = "baseline", "adapted", "head"


@dataclass
class Setup:
    """What all sides share. backbone: the original. head: None measures the baseline alone; tree: a lone root then.
    decoder: the backbone that the head decodes with, asked for once."""

    backbone: Backbone
    tokenizer: ChatTokenizer
    cache: KVCache
    max_new_tokens: int
    repeats: int = 1
    head: Head | None = None
    tree: Tree = field(default_factory=Tree.autoregressive)
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
        """Who decodes a prompt; the two on the clock first."""
        return (BASELINE, *((HEAD,) if self.head is not None else ()), *((ADAPTED,) if self.adapts else ()))

    def decode(self, prompt_ids: Sequence[int], side: str) -> Generation:
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
        if side == HEAD:
            return generate(self.decoder, self.head, prompt_ids, self.tree, **rules)
        return generate_autoregressive(self.backbone if side == BASELINE else self.decoder, prompt_ids, **rules)


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
    twin_ids: list[int]
    head_ids: list[int]
    before: int
    position: int


@dataclass
class Attempt:
    """One prompt, every turn by every side, once; a side that is not there has no turns. dropped_turns: turns whose
    prompt no longer fitted into the cache."""

    baseline: Stretch
    head: Stretch
    adapted: Stretch
    dropped_turns: int = 0
    difference: Difference | None = None


@dataclass
class Measurement:
    """What one head and the baseline gave on all prompts. Rows of the two lists belong together; ``rows`` is empty when
    the baseline was measured alone. timers: the sums over the rows."""

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
        """The baseline on the prompts that count on both sides. pass_s is the median over prompts."""
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

    def adaptation(self, stats: dict) -> Adaptation | None:
        """What the head did to the backbone's text; None where it left the backbone alone. stats: the checkpoint's."""
        if not any(row.adapted for row in self.rows):
            return None
        greedy, tokens = agreement(self.rows)
        return Adaptation(stats=stats, greedy_agreement=greedy, token_agreement=tokens)


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
    """Decode one prompt ``setup.repeats`` times by every side and add its rows, of the repeats with the median time.

    Raises ValueError when the first turn does not fit into the cache, or does not make a prompt.
    """
    attempts = [measure_once(setup, prompt, (index + repeat) % 2 == 1) for repeat in range(setup.repeats)]
    baseline = middle([attempt.baseline for attempt in attempts])
    differences = [attempt.difference for attempt in attempts if attempt.difference is not None]
    dropped = attempts[0].dropped_turns
    row = None
    if setup.head is not None:
        stretch = middle([attempt.head for attempt in attempts])
        if differences and result.difference is None:
            result.difference = explain(setup.decoder, prompt, differences[0])
        adapted = compare_texts(attempts[0].baseline, attempts[0].adapted) if setup.adapts else None
        row = make_row(prompt, stretch, dropped, baseline, identical=not differences, adapted=adapted)
    # From here on nothing is computed: an interrupt must not leave one side of a pair behind.
    result.baseline_rows.append(make_row(prompt, baseline, dropped))
    result.baseline_timers = sum_timers([result.baseline_timers, baseline.timers])
    result.dropped_turns += dropped
    if row is not None:
        result.rows.append(row)
        result.timers = sum_timers([result.timers, stretch.timers])


def measure_once(setup: Setup, prompt: Prompt, head_first: bool) -> Attempt:
    """All turns of a prompt in order, each decoded by the sides back to back, those on the clock first."""
    attempt, messages = Attempt(Stretch(), Stretch(), Stretch()), []
    sides = (HEAD, BASELINE, *setup.sides[2:]) if head_first and HEAD in setup.sides else setup.sides
    for turn, said in enumerate(prompt.turns):
        messages.append({"role": "user", "content": said})
        prompt_ids = setup.tokenizer.encode_chat(messages)
        if len(prompt_ids) > setup.cache.max_length:
            if turn == 0:
                rows = setup.cache.max_length
                raise ValueError(f"the prompt has {len(prompt_ids)} tokens, the cache {rows} rows; see --cache-length")
            attempt.dropped_turns = len(prompt.turns) - turn
            break
        given = {side: setup.decode(prompt_ids, side) for side in sides}
        baseline, twin = given[BASELINE], given.get(ADAPTED, given[BASELINE])
        if HEAD in given and attempt.difference is None:
            position = first_difference(twin.token_ids, given[HEAD].token_ids)
            if position is not None:
                earlier = (attempt.adapted if setup.adapts else attempt.baseline).generations
                before = sum(len(generation.token_ids) for generation in earlier)
                attempt.difference = Difference(prompt_ids, twin.token_ids, given[HEAD].token_ids, before, position)
        for side, generation in given.items():
            getattr(attempt, side).generations.append(generation)
        reply = setup.tokenizer.decode(baseline.token_ids) if baseline.text is None else baseline.text
        messages.append({"role": "assistant", "content": reply.strip()})
    return attempt


def compare_texts(original: Stretch, adapted: Stretch) -> AdaptedText:
    """How far each turn of the adapted backbone's text is the original's.

    Worked example: turns of 3 and 2 tokens, the adapted ones equal and different in the first token: 3 tokens agree.
    """
    agreeing = 0
    for ours, theirs in zip(original.generations, adapted.generations, strict=True):
        position = first_difference(ours.token_ids, theirs.token_ids)
        agreeing += len(ours.token_ids) if position is None else position
    return AdaptedText(tokens=adapted.tokens, agreeing_tokens=agreeing)


def middle(stretches: Sequence[Stretch]) -> Stretch:
    """The one with the median decoding time; of an even number, the lower of the middle two."""
    return sorted(stretches, key=lambda stretch: stretch.time_s)[(len(stretches) - 1) // 2]


def explain(backbone: Backbone, prompt: Prompt, difference: Difference) -> FirstDifference:
    """The difference as a record holds it, with the gap between the twin's two best logits there. backbone: its."""

    def token(ids: list[int]) -> int | None:
        return ids[difference.position] if difference.position < len(ids) else None

    return FirstDifference(
        prompt_id=prompt.prompt_id,
        position=difference.before + difference.position,
        baseline_token=token(difference.twin_ids),
        head_token=token(difference.head_ids),
        logit_gap=logit_gap(backbone, difference.prompt_ids, difference.twin_ids, difference.position),
    )


def make_row(
    prompt: Prompt,
    stretch: Stretch,
    dropped_turns: int,
    baseline: Stretch | None = None,
    identical: bool | None = None,
    adapted: AdaptedText | None = None,
) -> PromptRow:
    """One line of ``per_prompt``. baseline: None in the baseline's own record."""
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
        baseline_tokens=baseline.tokens if baseline else None,
        baseline_passes=baseline.passes if baseline else None,
        baseline_time_s=baseline.time_s if baseline else None,
        draft_s=timers.draft_s,
        verify_s=timers.verify_s,
        identical=identical,
        finish_reason="cache" if dropped_turns else stretch.generations[-1].finish_reason,
        adapted=adapted,
    )


def warm_up(setup: Setup) -> None:
    """Run every shape that a measurement meets, so that no kernel is compiled on the clock."""
    short = dataclasses.replace(setup, max_new_tokens=min(WARM_TOKENS, setup.max_new_tokens))
    for length in WARM_LENGTHS:
        prompt_ids = np.arange(min(length, setup.cache.max_length)) % setup.backbone.config.vocab_size
        for side in setup.sides:
            short.decode(prompt_ids, side)
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
        output = setup.decoder.forward(tokens, cache=cache, attend=tree.plan, layers=head.layers)
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
