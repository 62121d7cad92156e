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

from backbone.model import Backbone
from bench.measure.attempts import (
    ADAPTED,
    Attempt,
    Difference,
    Setup,
    Stretch,
    attempt_all,
    check_prompt,
    sum_timers,
)
from bench.record.metrics import agreement, comparable_rows
from bench.record.prompts import Prompt
from bench.record.schema import Adaptation, AdaptedText, Baseline, Failure, FirstDifference, Parity, PromptRow, Timing
from decoding.drafter import make_drafter
from decoding.generate import Timers, first_difference, logit_gap
from decoding.tree import Tree
from runtime import jt, synchronize, warm
from runtime.interrupt import check_interrupt, deferred_interrupts

# Prompt lengths of the warm-up: a lone row has kernels of its own, two rows are the shortest text, forty a usual one.
WARM_LENGTHS = (1, 2, 40)
WARM_TOKENS = 8


@dataclass
class Measurement:
    """What one head and the baseline gave on all prompts. Rows of the two lists belong together; ``rows`` is empty when
    the baseline was measured alone. timers: the sums over the rows. adapts: the head changes the backbone."""

    rows: list[PromptRow] = field(default_factory=list)
    baseline_rows: list[PromptRow] = field(default_factory=list)
    timers: Timers = field(default_factory=Timers)
    baseline_timers: Timers = field(default_factory=Timers)
    failures: list[Failure] = field(default_factory=list)
    difference: FirstDifference | None = None
    dropped_turns: int = 0
    late_kernels: int | None = None
    interrupted: bool = False
    adapts: bool = False

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
    def parity(self) -> Parity | None:
        """How many prompts gave the twin's tokens, all turns of all repeats; None where texts are drawn."""
        if self.rows and all(row.identical is None for row in self.rows):
            return None
        identical = sum(bool(row.identical) for row in self.rows)
        return Parity(prompts=len(self.rows), identical=identical, first_difference=self.difference)

    def adaptation(self, stats: dict) -> Adaptation | None:
        """What the head did to the backbone's text; None where it left the backbone alone. stats: the checkpoint's."""
        if not self.adapts:
            return None
        greedy, tokens = agreement(self.rows)
        return Adaptation(stats=stats, greedy_agreement=greedy, token_agreement=tokens)


def timing(timers: Timers) -> Timing:
    """The ``timing`` of a record."""
    return Timing(**dataclasses.asdict(timers))


def measure(setup: Setup, prompts: Sequence[Prompt], on_prompt: Callable[[Measurement], None]) -> Measurement:
    """Measure every prompt; what a prompt cannot be measured for goes to ``failures`` and the run goes on.

    on_prompt: called after each prompt. Ctrl-C ends the run and keeps the prompts that were finished.
    """
    result = Measurement(adapts=setup.adapts)
    try:
        with deferred_interrupts():
            warm_up(setup)
            kernels = loaded_kernels()
            for first in range(0, len(prompts), setup.batch_size):
                group = []
                for prompt in prompts[first : first + setup.batch_size]:
                    try:
                        check_prompt(setup, prompt)
                        group.append(prompt)
                    except ValueError as error:
                        result.failures.append(Failure(prompt_id=prompt.prompt_id, error=str(error)))
                        on_prompt(result)
                if group:
                    measure_prompts(setup, group, first, result, on_prompt)
                check_interrupt()
            result.late_kernels = None if kernels is None else loaded_kernels() - kernels
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def measure_prompts(
    setup: Setup,
    prompts: Sequence[Prompt],
    first: int,
    result: Measurement,
    on_prompt: Callable[[Measurement], None] = lambda measured: None,
) -> None:
    """Decode some prompts ``setup.repeats`` times by every side, in one batch, and add their rows, each of the repeat
    with the median time. first: the number of the first of them."""
    turn = first // setup.batch_size
    repeats = [attempt_all(setup, prompts, first, (turn + repeat) % 2 == 1) for repeat in range(setup.repeats)]
    for place, prompt in enumerate(prompts):
        add_attempts(setup, prompt, [attempts[place] for attempts in repeats], result)
        on_prompt(result)


def add_attempts(setup: Setup, prompt: Prompt, attempts: Sequence[Attempt], result: Measurement) -> None:
    """Add the rows of one prompt, of the repeats with the median time."""
    baseline = middle([attempt.baseline for attempt in attempts])
    differences = [attempt.difference for attempt in attempts if attempt.difference is not None]
    dropped = attempts[0].dropped_turns
    row = None
    if setup.head is not None:
        stretch = middle([attempt.head for attempt in attempts])
        if differences and result.difference is None:
            result.difference = explain(setup.decoder, prompt, differences[0])
        adapted = compare_texts(attempts[0].baseline, attempts[0].adapted) if ADAPTED in setup.sides else None
        identical = not differences if setup.acceptance.exact else None
        row = make_row(prompt, stretch, dropped, baseline, identical=identical, adapted=adapted)
    # From here on nothing is computed: an interrupt must not leave one side of a pair behind.
    result.baseline_rows.append(make_row(prompt, baseline, dropped))
    result.baseline_timers = sum_timers([result.baseline_timers, baseline.timers])
    result.dropped_turns += dropped
    if row is not None:
        result.rows.append(row)
        result.timers = sum_timers([result.timers, stretch.timers])


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
        total_variation=stretch.total_variation,
    )


def warm_up(setup: Setup) -> None:
    """Run every shape that a measurement meets, so that no kernel is compiled on the clock."""
    short = dataclasses.replace(setup, max_new_tokens=min(WARM_TOKENS, setup.max_new_tokens))
    for length in WARM_LENGTHS:
        prompt_ids = np.arange(min(length, setup.cache.max_length)) % setup.backbone.config.vocab_size
        for side in setup.sides:
            short.decode(prompt_ids, side, setup.acceptance.rule())
            if setup.batch_size > 1:
                rules = [setup.acceptance.rule() for _ in range(setup.batch_size)]
                short.decode_all([prompt_ids] * setup.batch_size, side, rules)
    if setup.tree.depth:
        warm_acceptance(setup)
    warm()


def warm_acceptance(setup: Setup) -> None:
    """What follows when drafts are accepted, which the warm-up's prompts may not show: several rows are kept, not
    all of them next to each other, and the head goes on from them."""
    head, cache, num_nodes = setup.head, setup.cache, setup.tree.num_nodes
    cache.rewind(0)
    with jt.no_grad():
        tokens, plan = np.zeros((1, num_nodes), np.int32), Tree.chain(num_nodes - 1).plan
        output = setup.decoder.forward(tokens, cache=cache, attend=plan, layers=head.layers)
        path = np.array([0, num_nodes - 1], np.int32)
        drafter = make_drafter(head, setup.tree, setup.acceptance.rule(), setup.draft_dtype)
        for rows in (path, path, path[:1]):
            drafter.accept(output, rows, [0] * len(rows))
            drafter.draft(0)
        cache.commit(path)
        synchronize()
    cache.rewind(0)


def loaded_kernels() -> int | None:
    """Kernels this process has compiled or read from Jittor's cache; None where the system does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return len({line.split()[-1] for line in maps.splitlines() if "/jit/" in line and line.endswith(".so")})
