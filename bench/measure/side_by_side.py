"""Times a head and the baseline, autoregressive decoding, on the same prompts, back to back, and counts what both gave.

Both sides share one KV cache and one set of stopping rules, and read the same prompts: the history of a later turn
holds the baseline's replies for both. The side that goes first alternates by prompt, so that a machine that grows
warmer or busier favors neither.

The head's tokens must be those of autoregressive decoding by the backbone that the head decodes with. That is the
baseline, unless the head adapts the backbone: then the adapted backbone alone is a third side, not timed, which also
shows how far its text is from the original's. The baseline is always the original backbone: what a user had before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from backbone.model import Backbone
from bench.measure.attempts import (
    ADAPTED,
    Attempt,
    Difference,
    Setup,
    Stretch,
    attempt_all,
    sum_timers,
    usable_prompts,
)
from bench.measure.warmup import kernels_since, loaded_kernels, warm_up
from bench.record.metrics import agreement, comparable_rows
from bench.record.prompts import Prompt
from bench.record.schema import Adaptation, AdaptedText, Baseline, Failure, FirstDifference, Parity, PromptRow
from decoding.generate import Timers, first_difference, logit_gap
from runtime.interrupt import check_interrupt, deferred_interrupts


@dataclass
class Measurement:
    """What one head and the baseline gave on all prompts. Rows of the two lists belong together; ``rows`` is empty if
    the baseline was measured alone. timers: sums over the rows. adapts: the head changes the backbone."""

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
        """The baseline on the prompts that count for both sides. pass_s is the median over prompts."""
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
        """How many prompts gave the expected tokens, in all turns of all repeats; None if texts are sampled."""
        if self.rows and all(row.identical is None for row in self.rows):
            return None
        identical = sum(bool(row.identical) for row in self.rows)
        return Parity(prompts=len(self.rows), identical=identical, first_difference=self.difference)

    def adaptation(self, stats: dict) -> Adaptation | None:
        """How the head changed the backbone's text; None if it changes no backbone. stats: the checkpoint's."""
        if not self.adapts:
            return None
        greedy, tokens = agreement(self.rows)
        return Adaptation(stats=stats, greedy_agreement=greedy, token_agreement=tokens)


def measure(setup: Setup, prompts: Sequence[Prompt], on_prompt: Callable[[Measurement], None]) -> Measurement:
    """Measure every prompt; one that cannot be measured is added to ``failures``.

    on_prompt: called after each prompt. Ctrl-C ends the run; the finished prompts are returned.
    """
    result = Measurement(adapts=setup.adapts)
    try:
        with deferred_interrupts():
            warm_up(setup)
            kernels = loaded_kernels()
            for first in range(0, len(prompts), setup.batch_size):
                group, failures = usable_prompts(setup, prompts[first : first + setup.batch_size])
                for failure in failures:
                    result.failures.append(failure)
                    on_prompt(result)
                if group:
                    measure_prompts(setup, group, first, result, on_prompt)
                check_interrupt()
            result.late_kernels = kernels_since(kernels)
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
    # From here on nothing is computed: an interrupt must not add only one side of a pair.
    result.baseline_rows.append(make_row(prompt, baseline, dropped))
    result.baseline_timers = sum_timers([result.baseline_timers, baseline.timers])
    result.dropped_turns += dropped
    if row is not None:
        result.rows.append(row)
        result.timers = sum_timers([result.timers, stretch.timers])


def compare_texts(original: Stretch, adapted: Stretch) -> AdaptedText:
    """How far each turn of the adapted backbone's text agrees with the original's.

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
    """The difference as a record holds it, with the gap between the two best logits there. backbone: that of the
    expected text."""

    def token(ids: list[int]) -> int | None:
        return ids[difference.position] if difference.position < len(ids) else None

    return FirstDifference(
        prompt_id=prompt.prompt_id,
        position=difference.before + difference.position,
        baseline_token=token(difference.expected_ids),
        head_token=token(difference.head_ids),
        logit_gap=logit_gap(backbone, difference.prompt_ids, difference.expected_ids, difference.position),
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
