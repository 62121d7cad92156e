"""What the numbers mean: pure functions from per-prompt rows to metrics, intervals and paired ratios.

With T tokens, P passes and t seconds of decoding, summed over prompts, for the head and its baseline b, which is
autoregressive decoding by the original backbone:

    accept_length = T / P              tokens per decoding pass, the bonus token included
    tokens_per_s  = T / t
    speedup       = (T / t) / (Tb / tb)
    overhead      = (t / P) / (tb / Pb)   seconds per pass with the tree over seconds per pass without

An autoregressive pass emits one token, so Tb = Pb, and speedup = accept_length / overhead holds exactly (up to
rounding) for texts of any length. With greedy decoding T = Tb, unless the head adapts the backbone. The prefill's
tokens and seconds are in none of the sums. Every ratio is a ratio of sums, never a mean of ratios: a long prompt weighs
as much as its tokens.

One rule decides which rows count, for both sides and every metric: ``comparable_rows``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.record.schema import CategoryResult, Metrics, PromptRow
from runtime.records import Interval

COLUMNS = ("tokens", "passes", "time_s", "baseline_tokens", "baseline_passes", "baseline_time_s", "draft_s")
LEVEL = 0.95  # of every interval

Sums = Mapping[str, np.ndarray]  # the sums of COLUMNS by name, each (resamples,)
STATISTICS: dict[str, Callable[[Sums], np.ndarray]] = {
    "accept_length": lambda s: s["tokens"] / s["passes"],
    "tokens_per_s": lambda s: s["tokens"] / s["time_s"],
    "speedup": lambda s: (s["tokens"] / s["time_s"]) / (s["baseline_tokens"] / s["baseline_time_s"]),
    "overhead": lambda s: (s["time_s"] / s["passes"]) / (s["baseline_time_s"] / s["baseline_passes"]),
    "draft_ms": lambda s: 1e3 * s["draft_s"] / s["passes"],
}


@dataclass(frozen=True)
class Estimate:
    """A statistic over seeds, or its ratio to another head's. value: the mean; interval: None below two prompts;
    by_run: per seed."""

    value: float | None
    interval: Interval | None
    by_run: list[float | None]
    num_prompts: int


def comparable_rows(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The rows that count.

    Rows whose tokens are not those of autoregressive decoding (``identical`` is False) are left out on both sides, and
    so are rows without a baseline if any row has one. In the baseline's own record, all rows count. Failed prompts have
    no row.
    """
    paired = [row for row in rows if None not in (row.baseline_tokens, row.baseline_passes, row.baseline_time_s)]
    return [row for row in (paired or rows) if row.identical is not False]


def evaluate(rows: Sequence[PromptRow], statistic: str) -> float | None:
    """A statistic, by its name in STATISTICS, of the rows that count; None where it is unknown (no pass, no baseline).

    Raises ValueError for an unknown name, as all functions here do.
    """
    return _number(_values(_table(comparable_rows(rows)).sum(axis=0), statistic))


def accept_rate(rows: Sequence[PromptRow]) -> list[float | None]:
    """Per depth, acceptances over trials; entry d is depth d + 1 given that depth d was accepted.

    A depth without a trial is None. Rows may have different depths: a missing one counts no trial.
    """
    rows = comparable_rows(rows)
    depth = max((len(row.reached_by_depth) for row in rows), default=0)
    reached, accepted = np.zeros(depth, int), np.zeros(depth, int)
    for row in rows:
        reached[: len(row.reached_by_depth)] += np.array(row.reached_by_depth, int)
        accepted[: len(row.accepted_by_depth)] += np.array(row.accepted_by_depth, int)
    return [int(a) / int(r) if r else None for a, r in zip(accepted, reached, strict=True)]


def total_variation(rows: Sequence[PromptRow]) -> float | None:
    """Mean over the emitted tokens (``decoding.verify.verify_typical``); None for exact rules."""
    rows = [row for row in comparable_rows(rows) if row.total_variation is not None]
    emitted = sum(row.passes + sum(row.accepted_by_depth) for row in rows)
    return sum(row.total_variation for row in rows) / emitted if emitted else None


def agreement(rows: Sequence[PromptRow]) -> tuple[float | None, float | None]:
    """(greedy_agreement, token_agreement) of an adapted backbone's greedy text with the original's.

    The first is the share of prompts whose texts are equal, all turns; the second the tokens before the first
    difference of each turn, summed, over all of the original's tokens. The first token of a turn, the prefill's, counts
    here, and so do prompts in which the head did not give the adapted text. None without a prompt.
    Worked example: originals of 4 and 6 tokens, adapted texts that are equal and that differ from the third token on:
    1 / 2 and (4 + 2) / 10.
    """
    rows = [row for row in rows if row.adapted is not None and row.baseline_tokens is not None]
    total = sum(row.baseline_tokens + row.turns for row in rows)
    if not total:
        return None, None
    equal = [row.baseline_tokens == row.adapted.tokens == row.adapted.agreeing_tokens - row.turns for row in rows]
    return sum(equal) / len(rows), sum(row.adapted.agreeing_tokens for row in rows) / total


def aggregate(rows: Sequence[PromptRow], num_resamples: int = 2000) -> tuple[Metrics, dict[str, CategoryResult]]:
    """The ``metrics`` and ``categories`` of a result. Categories come in the order of their first row."""
    rows = comparable_rows(rows)
    groups: dict[str, list[PromptRow]] = {}
    for row in rows:
        groups.setdefault(row.category, []).append(row)

    def totals(rows: Sequence[PromptRow]) -> dict:
        ratios = {name: evaluate(rows, name) for name in ("accept_length", "tokens_per_s", "speedup")}
        return {"tokens": sum(row.tokens for row in rows), "passes": sum(row.passes for row in rows), **ratios}

    metrics = Metrics(
        **totals(rows),
        accept_rate=accept_rate(rows),
        overhead=evaluate(rows, "overhead"),
        speedup_ci=paired_bootstrap(rows, "speedup", num_resamples),
        accept_length_ci=paired_bootstrap(rows, "accept_length", num_resamples),
        total_variation=total_variation(rows),
    )
    return metrics, {name: CategoryResult(prompts=len(group), **totals(group)) for name, group in groups.items()}


def pareto_frontier(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats, cheapest first; of equal points the first.

    A point beats another if it costs no more and is worth no less, and differs from it. Worked example: costs 1 2 3 and
    values 2 4 3: the third costs more than the second and is worth less, the frontier is [0, 1].
    """
    frontier: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], -values[index])):
        if not frontier or values[index] > values[frontier[-1]]:
            frontier.append(index)
    return frontier


# Intervals -----------------------------------------------------------------------------------------------------------


def bootstrap(
    table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], num_resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Percentile interval of a function of sums over prompts, resampling prompts with replacement.

    table: (prompts, columns), what is summed. statistic: sums (resamples, columns) -> (resamples,); resamples for which
    it is not finite, as without a pass, are left out. None below two prompts and if no resample is left.

    The draws are counts per prompt, of a multinomial distribution, so that a resample is one matrix product; the
    published figures come from them. ``scipy.stats.bootstrap`` draws indices, and so gives other last digits.
    """
    num_prompts = len(table)
    if num_prompts < 2:
        return None
    counts = np.random.default_rng(seed).multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), num_resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(counts @ table)
    values = values[np.isfinite(values)]
    return tuple(np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()) if len(values) else None


def paired_bootstrap(rows: Sequence[PromptRow], statistic: str, num_resamples: int = 2000) -> Interval | None:
    """The interval of a statistic.

    A resampled prompt brings its head and its baseline numbers together: what makes a prompt slow for both cancels.
    None below two prompts, and if the statistic is unknown (no baseline).
    """
    return bootstrap(_table(comparable_rows(rows)), lambda sums: _values(sums, statistic), num_resamples)


def over_seeds(
    runs: Sequence[Sequence[PromptRow]],
    statistic: str,
    others: Sequence[Sequence[PromptRow]] | None = None,
    num_resamples: int = 4000,
) -> Estimate:
    """The mean of a statistic over training seeds, with an interval over seeds and prompts.

    runs: the rows of one seed each. others: the rows of another head, run by run; the statistic is then a run's over
    its partner's. Only prompts that count in all of them count.

    Seeds and prompts are crossed: every seed decodes the same prompts. A resample draws prompts with replacement, once
    for all runs, and adds to the mean over seeds a draw of its error: Student's t, with one degree of freedom fewer
    than there are seeds, times their standard error. Drawing prompts for each run separately would average out what
    the runs share; drawing three seeds with replacement cannot tell how far a fourth may lie. Where seeds decide, 95%
    intervals covered the truth in 49% (prompts alone), 79% (seeds drawn) and 97% (this method) of 400 trials with 3
    seeds each: ``coverage`` in tests/bench/record/test_intervals.py. One run, or runs that are all alike, give an
    interval over prompts alone. None below two prompts.
    """
    everyone = [*runs, *(others or ())]
    assert runs and (others is None or len(others) == len(runs)), f"{len(everyone)} runs make no pairs"
    by_id = [{row.prompt_id: row for row in comparable_rows(rows)} for rows in everyone]
    shared = [name for name in by_id[0] if all(name in rows for rows in by_id)]
    tables = np.stack([_table([rows[name] for name in shared]) for rows in by_id], axis=1)  # (prompts, runs, COLUMNS)

    def values(sums: np.ndarray) -> np.ndarray:
        found = _values(sums, statistic)  # (..., runs)
        return found if others is None else found[..., : len(runs)] / found[..., len(runs) :]

    with np.errstate(divide="ignore", invalid="ignore"):
        by_run = values(tables.sum(axis=0))
    error: np.ndarray | float = 0.0
    if len(runs) > 1:
        draws = np.random.default_rng([0, 1]).standard_t(len(runs) - 1, num_resamples)
        error = draws * float(by_run.std(ddof=1)) / len(runs) ** 0.5
    interval = bootstrap(
        tables.reshape(len(shared), tables.shape[1] * tables.shape[2]),
        lambda sums: values(sums.reshape(-1, *tables.shape[1:])).mean(axis=-1) + error,
        num_resamples,
    )
    return Estimate(_number(by_run.mean()), interval, [_number(value) for value in by_run], len(shared))


def _table(rows: Sequence[PromptRow]) -> np.ndarray:
    """(prompts, COLUMNS) float64; an unknown number is nan and makes its sums nan."""
    values = [[np.nan if getattr(row, name) is None else getattr(row, name) for name in COLUMNS] for row in rows]
    return np.asarray(values, dtype=np.float64).reshape(len(rows), len(COLUMNS))


def _values(sums: np.ndarray, statistic: str) -> np.ndarray:
    """The statistic of sums (..., COLUMNS)."""
    if statistic not in STATISTICS:
        raise ValueError(f"Unknown statistic {statistic!r}. Available: {', '.join(STATISTICS)}")
    with np.errstate(divide="ignore", invalid="ignore"):
        return STATISTICS[statistic]({name: sums[..., index] for index, name in enumerate(COLUMNS)})


def _number(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None
