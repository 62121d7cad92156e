"""Metrics on hand-worked rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.record.metrics import (
    STATISTICS,
    accept_rate,
    aggregate,
    agreement,
    comparable_rows,
    evaluate,
    pareto_frontier,
    total_variation,
)
from bench.record.schema import AdaptedText, PromptRow


@pytest.fixture
def two_rows(make_row):
    """Together 40 tokens in 10 passes and 10 s, against 40 passes and 20 s."""
    return [
        make_row("a", tokens=10, passes=8, time_s=4.0, baseline_tokens=10, baseline_passes=10, baseline_time_s=6.0),
        make_row("b", tokens=30, passes=2, time_s=6.0, baseline_tokens=30, baseline_passes=30, baseline_time_s=14.0),
    ]


def test_metrics_are_ratios_of_sums(two_rows):
    assert evaluate(two_rows, "accept_length") == 4.0  # 40 / 10; the mean of 1.25 and 15 would be 8.125
    assert evaluate(two_rows, "tokens_per_s") == 4.0  # 40 / 10 s; the mean of 2.5 and 5 would be 3.75
    assert evaluate(two_rows, "speedup") == 2.0  # 4 / (40 / 20 s)
    assert evaluate(two_rows, "overhead") == 2.0  # (10 / 10) / (20 / 40)


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
    for name in STATISTICS:
        assert evaluate(rows, name) == evaluate(two_rows, name)
    assert accept_rate(rows) == accept_rate(two_rows)
    assert aggregate(rows, 50) == aggregate(two_rows, 50)
    assert evaluate([*two_rows, make_row("e", tokens=1000, baseline_tokens=1000)], "accept_length") != 4.0


def test_sampled_rows_count_although_nothing_can_be_identical(make_row):
    rows = [make_row("a", identical=None, tokens=12, baseline_tokens=9, baseline_passes=9, baseline_time_s=3.0)]
    assert comparable_rows(rows) == rows
    assert evaluate(rows, "speedup") == (12 / 2.0) / (9 / 3.0)


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
    rows = [
        PromptRow(prompt_id=str(number), category="x", turns=1, prompt_tokens=1, tokens=tokens, passes=passes,
                  accepted_by_depth=[], reached_by_depth=[], accept_length=None, time_s=time_s,
                  baseline_tokens=tokens, baseline_passes=tokens, baseline_time_s=baseline_s, draft_s=None,
                  verify_s=None, identical=True, finish_reason="stop")
        for number, (tokens, passes, time_s, baseline_s) in enumerate(sides)
    ]  # fmt: skip
    speedup, length, overhead = (evaluate(rows, name) for name in ("speedup", "accept_length", "overhead"))
    assert speedup == pytest.approx(length / overhead, rel=1e-12)
    # The control: a baseline that needed two passes a token breaks the identity.
    broken = [row.model_copy(update={"baseline_passes": 2 * row.baseline_passes}) for row in rows]
    speedup, length, overhead = (evaluate(broken, name) for name in ("speedup", "accept_length", "overhead"))
    assert speedup != pytest.approx(length / overhead, rel=1e-3)


def adapted_row(make_row, original, adapted, agreeing, **changes):
    """A row whose texts have these many tokens after the first; agreeing: the first token counted."""
    text = AdaptedText(tokens=adapted, agreeing_tokens=agreeing)
    return make_row(tokens=adapted, baseline_tokens=original, adapted=text, **changes)


def test_agreement_counts_equal_texts_and_tokens_before_the_first_difference(make_row):
    equal, other = adapted_row(make_row, 3, 3, 4), adapted_row(make_row, 5, 5, 2)
    assert agreement([equal, other]) == (1 / 2, (4 + 2) / 10)
    longer = adapted_row(make_row, 3, 9, 4)  # begins with the complete original, and continues
    assert agreement([longer]) == (0.0, 1.0)
    two_turns = adapted_row(make_row, 6, 6, 8, turns=2)
    assert agreement([two_turns]) == (1.0, 1.0)
    assert agreement([two_turns.model_copy(update={"identical": False})]) == (1.0, 1.0)  # the head has no part in it
    assert agreement([]) == agreement([make_row()]) == (None, None)


def test_the_speedup_of_an_adapted_head_is_over_the_originals_tokens_per_second(make_row):
    row = adapted_row(make_row, 10, 20, 5, turns=1, passes=8, time_s=2.0, baseline_time_s=4.0)
    assert evaluate([row], "speedup") == (20 / 2.0) / (10 / 4.0)
    assert evaluate([row], "speedup") == evaluate([row], "accept_length") / evaluate([row], "overhead")


def test_the_frontier_is_what_no_other_point_beats():
    assert pareto_frontier([1, 2, 3], [2, 4, 3]) == [0, 1]
    assert pareto_frontier([3, 1, 2], [9, 2, 4]) == [1, 2, 0]  # cheapest first
    assert pareto_frontier([1, 1, 1], [2, 3, 3]) == [1]  # equal cost: the best; equal points: the first
    assert pareto_frontier([1, 2], [3, 3]) == [0]
    assert pareto_frontier([], []) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=9))
def test_every_point_is_on_the_frontier_or_beaten_by_one_that_is(points):
    costs, values = zip(*points, strict=True)
    frontier = pareto_frontier(costs, values)
    for index, (cost, value) in enumerate(points):
        beaten = [costs[other] <= cost and values[other] >= value for other in frontier if other != index]
        assert (index in frontier) != any(beaten)


def test_the_mean_distance_is_over_what_was_emitted(make_row):
    rows = [
        make_row("p0", total_variation=1.5, identical=None),  # 4 passes that accepted 4 + 2: 10 tokens
        make_row(
            "p1", total_variation=0.5, identical=None, passes=2, accepted_by_depth=[2, 1], reached_by_depth=[2, 2]
        ),
    ]
    assert total_variation(rows) == aggregate(rows, num_resamples=2)[0].total_variation == 2.0 / 15
    assert total_variation([make_row()]) is None
