"""What the numbers mean: pure functions from per-prompt rows to metrics, intervals and paired ratios.

With T tokens, P passes and t seconds of decoding, summed over prompts, for the head and its baseline b, which is
autoregressive decoding by the unchanged backbone:

    accept_length = T / P              tokens emitted per decoding pass, the bonus token included
    tokens_per_s  = T / t
    speedup       = (T / t) / (Tb / tb)
    overhead      = (t / P) / (tb / Pb)   seconds per pass with the tree over seconds per pass without

An autoregressive pass emits one token, so Tb = Pb and speedup = accept_length / overhead holds exactly (up to
rounding), whatever the lengths. With greedy decoding both sides emit the same T = Tb tokens, unless the head adapts the
backbone, and with it the text; where texts are drawn, each side draws one of its own for every prompt. Tokens that the
prefill emits, and its seconds, are in none of the sums.
Every ratio is a ratio of sums, never a mean of ratios: a long prompt weighs as much as its tokens.

One rule decides which rows count, on both sides and for every metric: see ``comparable_rows``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.record.schema import CategoryResult, Interval, Metrics, PromptRow

COLUMNS = ("tokens", "passes", "time_s", "baseline_tokens", "baseline_passes", "baseline_time_s", "draft_s")

# A statistic takes the sums of COLUMNS by name, each an array (resamples,), and gives an array (resamples,).
Statistic = Callable[[Mapping[str, np.ndarray]], np.ndarray]

STATISTICS: dict[str, Statistic] = {
    "accept_length": lambda s: s["tokens"] / s["passes"],
    "tokens_per_s": lambda s: s["tokens"] / s["time_s"],
    "speedup": lambda s: (s["tokens"] / s["time_s"]) / (s["baseline_tokens"] / s["baseline_time_s"]),
    "overhead": lambda s: (s["time_s"] / s["passes"]) / (s["baseline_time_s"] / s["baseline_passes"]),
    "draft_ms": lambda s: 1e3 * s["draft_s"] / s["passes"],
}


@dataclass(frozen=True)
class PairedRatio:
    """One head's statistic over another's on the prompts they share. interval: None below two prompts."""

    ratio: float | None
    interval: Interval | None
    num_prompts: int


@dataclass(frozen=True)
class Estimate:
    """A statistic over seeds. value: the mean; interval: None below two prompts; by_run: of each seed alone."""

    value: float | None
    interval: Interval | None
    by_run: list[float | None]
    num_prompts: int


def comparable_rows(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The rows that count: the head decoded what it had to, and the baseline did too.

    Rows whose tokens are not those of the backbone that the head decodes with (``identical`` is False) are left out of
    both sides, and, when any row has a baseline, so are rows without one. Rows of the baseline's own record all
    count. Failed prompts have no row.
    """
    paired = [row for row in rows if _has_baseline(row)]
    return [row for row in (paired or rows) if row.identical is not False]


def accept_length(rows: Sequence[PromptRow]) -> float | None:
    """Tokens per decoding pass; None without a pass."""
    return _evaluate(rows, "accept_length")


def tokens_per_s(rows: Sequence[PromptRow]) -> float | None:
    """Tokens per second of decoding; None without time."""
    return _evaluate(rows, "tokens_per_s")


def speedup(rows: Sequence[PromptRow]) -> float | None:
    """Tokens per second over the baseline's on the same prompts; None without a baseline."""
    return _evaluate(rows, "speedup")


def overhead(rows: Sequence[PromptRow]) -> float | None:
    """Seconds per pass over the baseline's seconds per pass; speedup = accept_length / overhead."""
    return _evaluate(rows, "overhead")


def accept_rate(rows: Sequence[PromptRow]) -> list[float | None]:
    """Per depth, acceptances over trials; entry d is depth d + 1 given that depth d was accepted.

    A depth without a trial is None. Rows may have different depths: a missing one counts no trial.
    """
    rows = comparable_rows(rows)
    depth = max((len(row.reached_by_depth) for row in rows), default=0)
    reached, accepted = np.zeros(depth, dtype=np.int64), np.zeros(depth, dtype=np.int64)
    for row in rows:
        reached[: len(row.reached_by_depth)] += np.asarray(row.reached_by_depth, dtype=np.int64)
        accepted[: len(row.accepted_by_depth)] += np.asarray(row.accepted_by_depth, dtype=np.int64)
    return [int(a) / int(r) if r else None for a, r in zip(accepted, reached, strict=True)]


def total_variation(rows: Sequence[PromptRow]) -> float | None:
    """Mean over the tokens that passes emitted (``decoding.verify.verify_typical``); None for rules that are exact."""
    rows = [row for row in comparable_rows(rows) if row.total_variation is not None]
    emitted = sum(row.passes + sum(row.accepted_by_depth) for row in rows)
    return sum(row.total_variation for row in rows) / emitted if emitted else None


def paired_bootstrap(
    rows: Sequence[PromptRow],
    statistic: str | Statistic,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """Percentile interval of a ratio of sums, resampling prompts with replacement.

    A resampled prompt brings its head and its baseline numbers together: what makes a prompt slow for both cancels.
    statistic: a name in STATISTICS or a function of the summed COLUMNS. None with fewer than two prompts, or
    when the statistic is unknown (no baseline). Raises ValueError for an unknown name, num_resamples < 1 or a
    level outside (0, 1).
    """
    chosen = _statistic(statistic)
    return _bootstrap(_table(comparable_rows(rows)), lambda sums: chosen(_by_name(sums)), num_resamples, seed, level)


def paired_ratio(
    rows: Sequence[PromptRow],
    other_rows: Sequence[PromptRow],
    statistic: str | Statistic,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedRatio:
    """statistic(rows) / statistic(other_rows) over the prompt ids that count in both, with its paired interval.

    Each resample draws prompts and takes both heads' numbers for them. Raises as ``paired_bootstrap`` does.
    """
    chosen = _statistic(statistic)
    mine = {row.prompt_id: row for row in comparable_rows(rows)}
    theirs = {row.prompt_id: row for row in comparable_rows(other_rows)}
    shared = [name for name in mine if name in theirs]
    table = np.hstack([_table([mine[name] for name in shared]), _table([theirs[name] for name in shared])])

    def ratio(sums: np.ndarray) -> np.ndarray:
        return chosen(_by_name(sums[..., : len(COLUMNS)])) / chosen(_by_name(sums[..., len(COLUMNS) :]))

    interval = _bootstrap(table, ratio, num_resamples, seed, level)
    with np.errstate(divide="ignore", invalid="ignore"):
        point = _number(ratio(table.sum(axis=0)))
    return PairedRatio(point, interval, len(shared))


def over_seeds(
    runs: Sequence[Sequence[PromptRow]],
    statistic: str | Statistic,
    others: Sequence[Sequence[PromptRow]] | None = None,
    num_resamples: int = 4000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The mean of a statistic over training seeds, with an interval over seeds and prompts.

    runs: the rows of one seed each. others: the rows of another head, run by run; the statistic is then a run's over
    its partner's. Only prompts that count in all of them count.

    Seeds and prompts are crossed: every seed decodes the same prompts. So a resample draws prompts with replacement,
    once for all runs, and adds to the mean over seeds a draw of its error, Student's t with one degree of freedom less
    than there are seeds, times their standard error. Drawing prompts for each run by itself would average out what all
    runs share; drawing three seeds with replacement cannot tell how far a fourth may lie. Where seeds decide, intervals
    meant to hold 95 % of the truths held 49 % (prompts alone), 79 % (seeds drawn) and 97 % (as here) of 400, with 3
    seeds each: ``coverage`` in tests/bench/record/test_metrics.py.
    One run, or runs that are all alike, leave an interval over
    prompts alone. None below two prompts. Raises as ``paired_bootstrap`` does.
    """
    chosen = _statistic(statistic)
    everyone = [*runs, *(others if others is not None else ())]
    assert runs and (others is None or len(others) == len(runs)), f"{len(everyone)} runs make no pairs"
    by_id = [{row.prompt_id: row for row in comparable_rows(rows)} for rows in everyone]
    shared = [name for name in by_id[0] if all(name in rows for rows in by_id)]
    table = np.stack([_table([rows[name] for name in shared]) for rows in by_id], axis=1)  # (prompts, runs, COLUMNS)

    def values(sums: np.ndarray) -> np.ndarray:
        found = chosen(_by_name(sums))  # (..., runs)
        return found if others is None else found[..., : len(runs)] / found[..., len(runs) :]

    def mean(sums: np.ndarray) -> np.ndarray:
        return values(sums.reshape(-1, *table.shape[1:])).mean(axis=-1)

    with np.errstate(divide="ignore", invalid="ignore"):
        by_run = values(table.sum(axis=0))
    error: np.ndarray | float = 0.0
    if len(runs) > 1:
        draws = np.random.default_rng([seed, 1]).standard_t(len(runs) - 1, max(num_resamples, 0))
        error = draws * float(by_run.std(ddof=1)) / len(runs) ** 0.5
    flat = table.reshape(len(shared), table.shape[1] * table.shape[2])
    interval = _bootstrap(flat, lambda sums: mean(sums) + error, num_resamples, seed, level)
    return Estimate(_number(by_run.mean()), interval, [_number(value) for value in by_run], len(shared))


def aggregate(
    rows: Sequence[PromptRow], num_resamples: int = 2000, seed: int = 0
) -> tuple[Metrics, dict[str, CategoryResult]]:
    """The ``metrics`` and ``categories`` of a result. Categories come in the order of their first row."""
    rows = comparable_rows(rows)
    groups: dict[str, list[PromptRow]] = {}
    for row in rows:
        groups.setdefault(row.category, []).append(row)
    metrics = Metrics(
        accept_length=accept_length(rows),
        accept_rate=accept_rate(rows),
        tokens_per_s=tokens_per_s(rows),
        speedup=speedup(rows),
        speedup_ci=paired_bootstrap(rows, "speedup", num_resamples, seed),
        accept_length_ci=paired_bootstrap(rows, "accept_length", num_resamples, seed),
        overhead=overhead(rows),
        tokens=sum(row.tokens for row in rows),
        passes=sum(row.passes for row in rows),
        total_variation=total_variation(rows),
    )
    categories = {
        name: CategoryResult(
            prompts=len(group),
            tokens=sum(row.tokens for row in group),
            passes=sum(row.passes for row in group),
            accept_length=accept_length(group),
            tokens_per_s=tokens_per_s(group),
            speedup=speedup(group),
        )
        for name, group in groups.items()
    }
    return metrics, categories


def pareto_frontier(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats, cheapest first; of equal points the first.

    One point beats another when it costs no more and is worth no less, and is not the same in both. Worked example:
    costs 1 2 3 and values 2 4 3: the third costs more than the second and is worth less, the frontier is [0, 1].
    """
    frontier: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], -values[index])):
        if not frontier or values[index] > values[frontier[-1]]:
            frontier.append(index)
    return frontier


def agreement(rows: Sequence[PromptRow]) -> tuple[float | None, float | None]:
    """(greedy_agreement, token_agreement) of an adapted backbone's greedy text with the original's.

    The first is the share of prompts whose texts are equal, all turns; the second the tokens before the first
    difference of each turn, summed, over all of the original's tokens. Here a turn's first token, its prefill's,
    counts as well, and so do prompts in which the head itself left the adapted text. None without a prompt.
    Worked example: originals of 4 and 6 tokens, adapted texts that are equal and that differ from the third token on:
    1 / 2 and (4 + 2) / 10.
    """
    rows = [row for row in rows if row.adapted is not None and row.baseline_tokens is not None]
    total = sum(row.baseline_tokens + row.turns for row in rows)
    if not total:
        return None, None
    equal = [row.baseline_tokens == row.adapted.tokens == row.adapted.agreeing_tokens - row.turns for row in rows]
    return sum(equal) / len(rows), sum(row.adapted.agreeing_tokens for row in rows) / total


def _has_baseline(row: PromptRow) -> bool:
    return None not in (row.baseline_tokens, row.baseline_passes, row.baseline_time_s)


def _table(rows: Sequence[PromptRow]) -> np.ndarray:
    """(prompts, COLUMNS) float64; an unknown number is nan and makes its sums nan."""
    values = [[np.nan if getattr(row, name) is None else getattr(row, name) for name in COLUMNS] for row in rows]
    return np.asarray(values, dtype=np.float64).reshape(len(rows), len(COLUMNS))


def _by_name(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {name: sums[..., index] for index, name in enumerate(COLUMNS)}


def _statistic(statistic: str | Statistic) -> Statistic:
    if callable(statistic):
        return statistic
    if statistic not in STATISTICS:
        raise ValueError(f"Unknown statistic {statistic!r}. Available: {', '.join(STATISTICS)}")
    return STATISTICS[statistic]


def _evaluate(rows: Sequence[PromptRow], name: str) -> float | None:
    with np.errstate(divide="ignore", invalid="ignore"):
        return _number(STATISTICS[name](_by_name(_table(comparable_rows(rows)).sum(axis=0))))


def _number(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None


def _bootstrap(
    table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], num_resamples: int, seed: int, level: float
) -> Interval | None:
    """table: (prompts, columns); statistic: sums (resamples, columns) -> (resamples,)."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    num_prompts = len(table)
    if num_prompts < 2:
        return None
    # How often each prompt is drawn, (resamples, prompts): the same as drawing prompts one by one.
    counts = np.random.default_rng(seed).multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), num_resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(counts @ table)
    values = values[np.isfinite(values)]  # a draw of prompts without a pass has no ratio
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
