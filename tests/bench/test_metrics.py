"""Metrics on hand-worked rows; intervals against a plain loop; pairing shown by what it cancels."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bench.metrics import (
    accept_length,
    accept_rate,
    aggregate,
    comparable_rows,
    overhead,
    paired_bootstrap,
    paired_ratio,
    speedup,
    tokens_per_s,
)


@pytest.fixture
def two_rows(make_row):
    """Together 40 tokens in 10 passes and 10 s, against 40 passes and 20 s."""
    return [
        make_row("a", tokens=10, passes=8, time_s=4.0, baseline_tokens=10, baseline_passes=10, baseline_time_s=6.0),
        make_row("b", tokens=30, passes=2, time_s=6.0, baseline_tokens=30, baseline_passes=30, baseline_time_s=14.0),
    ]


def test_metrics_are_ratios_of_sums(two_rows):
    assert accept_length(two_rows) == 4.0  # 40 / 10; the mean of 1.25 and 15 would be 8.125
    assert tokens_per_s(two_rows) == 4.0  # 40 / 10 s; the mean of 2.5 and 5 would be 3.75
    assert speedup(two_rows) == 2.0  # 4 / (40 / 20 s)
    assert overhead(two_rows) == 2.0  # (10 / 10) / (20 / 40)


def test_accept_rate_divides_acceptances_by_trials_per_depth(make_row):
    rows = [
        make_row("a", reached_by_depth=[4, 3], accepted_by_depth=[3, 1]),
        make_row("b", reached_by_depth=[6, 2, 1, 0], accepted_by_depth=[2, 1, 0, 0]),
    ]
    assert accept_rate(rows) == [5 / 10, 2 / 5, 0 / 1, None]
    assert accept_rate([]) == []


def test_rows_that_differ_or_lack_a_baseline_are_left_out_of_both_sides(two_rows, make_row):
    unequal = make_row("c", identical=False, tokens=1000, baseline_tokens=500, baseline_time_s=0.001)
    alone = make_row("d", tokens=1000, baseline_tokens=None, baseline_passes=None, baseline_time_s=None)
    rows = [*two_rows, unequal, alone]
    assert comparable_rows(rows) == two_rows
    for metric in (accept_length, tokens_per_s, speedup, overhead, accept_rate):
        assert metric(rows) == metric(two_rows)
    assert aggregate(rows, 50) == aggregate(two_rows, 50)
    assert accept_length([*two_rows, make_row("e", tokens=1000, baseline_tokens=1000)]) != 4.0


def test_sampled_rows_count_although_nothing_can_be_identical(make_row):
    rows = [make_row("a", identical=None, tokens=12, baseline_tokens=9, baseline_passes=9, baseline_time_s=3.0)]
    assert comparable_rows(rows) == rows
    assert speedup(rows) == (12 / 2.0) / (9 / 3.0)


def test_the_baselines_own_record_has_speed_but_no_speedup(make_row):
    nothing = {"baseline_tokens": None, "baseline_passes": None, "baseline_time_s": None, "identical": None}
    rows = [make_row("a", tokens=6, passes=6, **nothing), make_row("b", tokens=4, passes=4, **nothing)]
    metrics, categories = aggregate(rows, 50)
    assert (metrics.accept_length, metrics.accept_length_ci, metrics.tokens_per_s) == (1.0, (1.0, 1.0), 2.5)
    assert (metrics.speedup, metrics.speedup_ci, metrics.overhead) == (None, None, None)
    assert categories["writing"].speedup is None


def test_no_row_or_no_pass_gives_null_not_an_error(make_row):
    idle = make_row("a", tokens=0, passes=0, time_s=0.0, baseline_tokens=0, baseline_passes=0, baseline_time_s=0.0,
                    reached_by_depth=[0], accepted_by_depth=[0])  # fmt: skip
    for rows in ([], [idle], [idle, idle]):
        metrics, _ = aggregate(rows, 50)
        assert (metrics.accept_length, metrics.tokens_per_s, metrics.speedup, metrics.overhead) == (None,) * 4
        assert (metrics.speedup_ci, metrics.accept_length_ci) == (None, None)
        assert (metrics.tokens, metrics.passes) == (0, 0)


def test_aggregate_splits_by_category_in_order_of_appearance(make_row):
    rows = [
        make_row("a", category="math", tokens=12, passes=4, baseline_tokens=12),
        make_row("b", category="chat", tokens=4, passes=4, baseline_tokens=4, time_s=1.0),
        make_row("c", category="math", tokens=8, passes=1, baseline_tokens=8),
    ]
    metrics, categories = aggregate(rows, 50)
    assert list(categories) == ["math", "chat"]
    assert (metrics.tokens, metrics.passes) == (24, 9)
    math = categories["math"]
    assert (math.prompts, math.tokens, math.passes, math.accept_length, math.tokens_per_s) == (2, 20, 5, 4.0, 5.0)
    assert (math.speedup, categories["chat"].speedup) == (2.0, 4.0)


side = st.tuples(st.integers(1, 400), st.integers(1, 300), st.floats(0.01, 50), st.floats(0.01, 50))


@given(st.lists(side, min_size=1, max_size=8))
def test_speedup_is_accept_length_over_overhead(sides):
    from bench.record import PromptRow

    rows = [
        PromptRow(prompt_id=str(number), category="x", turns=1, prompt_tokens=1, tokens=tokens, passes=passes,
                  accepted_by_depth=[], reached_by_depth=[], accept_length=None, time_s=time_s,
                  baseline_tokens=tokens, baseline_passes=tokens, baseline_time_s=twin_s, draft_s=None,
                  verify_s=None, identical=True, finish_reason="stop")
        for number, (tokens, passes, time_s, twin_s) in enumerate(sides)
    ]  # fmt: skip
    assert speedup(rows) == pytest.approx(accept_length(rows) / overhead(rows), rel=1e-12)
    # The control: a baseline that needed two passes a token breaks the identity.
    broken = [row.model_copy(update={"baseline_passes": 2 * row.baseline_passes}) for row in rows]
    assert speedup(broken) != pytest.approx(accept_length(broken) / overhead(broken), rel=1e-3)


def varied_rows(make_row, num_rows=40, seed=3, noise=0.0):
    """Prompts of very different speed; the head is twice as fast on each, up to ``noise``."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        tokens = int(generator.integers(5, 200))
        twin_s = float(tokens * generator.uniform(0.1, 2.0))
        time_s = twin_s / 2 * float(np.exp(generator.normal(0, noise)))
        rows.append(make_row(str(number), tokens=tokens, passes=int(generator.integers(tokens // 4 + 1, tokens + 1)),
                             time_s=time_s, baseline_tokens=tokens, baseline_passes=tokens,
                             baseline_time_s=twin_s))  # fmt: skip
    return rows


def test_pairing_cancels_what_makes_a_prompt_slow_for_both(make_row):
    rows = varied_rows(make_row)
    assert paired_bootstrap(rows, "speedup") == pytest.approx((2.0, 2.0), rel=1e-12)
    low, high = paired_bootstrap(rows, "tokens_per_s")  # the control: one side alone does vary
    assert high / low > 1.2


def test_the_interval_agrees_with_a_plain_loop_over_resampled_prompts(make_row):
    rows = varied_rows(make_row, noise=0.3)
    generator = np.random.default_rng(11)
    draws = [[rows[index] for index in generator.integers(0, len(rows), len(rows))] for _ in range(1500)]
    expected = np.quantile([speedup(draw) for draw in draws], [0.05, 0.95])
    low, high = paired_bootstrap(rows, "speedup", num_resamples=8000, level=0.9)
    width = expected[1] - expected[0]
    # 1500 and 8000 draws: a quantile's own error is about 4% of the width; the 95% interval is 19% wider.
    assert (low, high) == pytest.approx(tuple(expected), abs=0.1 * width)
    assert low < speedup(rows) < high
    wide = paired_bootstrap(rows, "speedup", num_resamples=8000, level=0.99)
    assert wide[0] < low - 0.1 * width and wide[1] > high + 0.1 * width


def test_the_interval_repeats_with_its_seed_and_narrows_with_more_prompts(make_row):
    rows = varied_rows(make_row, noise=0.3)
    assert paired_bootstrap(rows, "speedup", 200, seed=1) == paired_bootstrap(rows, "speedup", 200, seed=1)
    assert paired_bootstrap(rows, "speedup", 200, seed=1) != paired_bootstrap(rows, "speedup", 200, seed=2)
    few, many = paired_bootstrap(rows[:5], "accept_length"), paired_bootstrap(rows, "accept_length")
    assert many[1] - many[0] < few[1] - few[0]


def test_a_statistic_may_be_a_function_of_the_sums(two_rows):
    by_function = paired_bootstrap(two_rows, lambda sums: sums["tokens"] / sums["passes"])
    assert by_function == paired_bootstrap(two_rows, "accept_length") == (1.25, 15.0)


def test_one_prompt_has_no_interval_and_bad_arguments_are_refused(two_rows):
    assert paired_bootstrap(two_rows[:1], "speedup") is None
    with pytest.raises(ValueError, match="Unknown statistic 'speed'"):
        paired_bootstrap(two_rows, "speed")
    with pytest.raises(ValueError, match="num_resamples"):
        paired_bootstrap(two_rows, "speedup", num_resamples=0)
    with pytest.raises(ValueError, match="level"):
        paired_bootstrap(two_rows, "speedup", level=95)


def test_the_ratio_of_two_heads_pairs_prompts_by_id_not_by_place(make_row):
    rows = varied_rows(make_row, num_rows=20)
    slower = [row.model_copy(update={"time_s": row.time_s * 4}) for row in reversed(rows)]
    found = paired_ratio(rows, slower, "tokens_per_s")
    assert found.num_prompts == 20
    assert found.ratio == pytest.approx(4.0)
    assert found.interval == pytest.approx((4.0, 4.0))
    renamed = [row.model_copy(update={"prompt_id": other.prompt_id}) for row, other in zip(slower, rows, strict=True)]
    low, high = paired_ratio(rows, renamed, "tokens_per_s").interval  # the control: wrong partners
    assert high / low > 1.2


def test_the_ratio_of_two_heads_uses_shared_prompts_only(make_row):
    mine = [make_row("a", tokens=8, passes=2, baseline_tokens=8), make_row("mine", tokens=900, baseline_tokens=900)]
    theirs = [make_row("theirs"), make_row("a", tokens=8, passes=4, baseline_tokens=8)]
    found = paired_ratio(mine, theirs, "accept_length")
    assert (found.ratio, found.interval, found.num_prompts) == (2.0, None, 1)
    nothing = paired_ratio(mine[:1], theirs[:1], "accept_length")
    assert (nothing.ratio, nothing.interval, nothing.num_prompts) == (None, None, 0)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=2, max_size=12), st.integers(0, 5))
def test_an_interval_of_accept_length_stays_between_the_extreme_prompts(pairs, seed):
    assume(len(set(pairs)) > 1)
    from bench.record import PromptRow

    rows = [
        PromptRow(prompt_id=str(number), category="x", turns=1, prompt_tokens=1, tokens=tokens, passes=passes,
                  accepted_by_depth=[], reached_by_depth=[], accept_length=None, time_s=1.0, baseline_tokens=None,
                  baseline_passes=None, baseline_time_s=None, draft_s=None, verify_s=None, identical=None,
                  finish_reason="stop")
        for number, (tokens, passes) in enumerate(pairs)
    ]  # fmt: skip
    low, high = paired_bootstrap(rows, "accept_length", 100, seed)
    ratios = [tokens / passes for tokens, passes in pairs]
    assert min(ratios) - 1e-12 <= low <= high <= max(ratios) + 1e-12
