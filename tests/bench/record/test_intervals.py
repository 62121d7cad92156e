"""Intervals against scipy, by what pairing cancels, and by how often they cover the truth."""

import numpy as np
import pytest
import scipy.stats

from bench.record.metrics import evaluate, over_seeds, paired_bootstrap


def varied_rows(make_row, num_rows=40, seed=3, noise=0.0):
    """Prompts of very different speed; the head is twice as fast on each, up to ``noise``."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        tokens = int(generator.integers(5, 200))
        baseline_s = float(tokens * generator.uniform(0.1, 2.0))
        time_s = baseline_s / 2 * float(np.exp(generator.normal(0, noise)))
        rows.append(make_row(str(number), tokens=tokens, passes=int(generator.integers(tokens // 4 + 1, tokens + 1)),
                             time_s=time_s, baseline_tokens=tokens, baseline_passes=tokens,
                             baseline_time_s=baseline_s))  # fmt: skip
    return rows


def test_pairing_cancels_what_makes_a_prompt_slow_for_both(make_row):
    rows = varied_rows(make_row)
    assert paired_bootstrap(rows, "speedup") == pytest.approx((2.0, 2.0), rel=1e-12)
    low, high = paired_bootstrap(rows, "tokens_per_s")  # the control: one side alone does vary
    assert high / low > 1.2


def test_the_interval_agrees_with_scipys_bootstrap_of_prompts(make_row):
    rows = varied_rows(make_row, noise=0.3)

    def theirs(level):
        def speedup(indices):
            return evaluate([rows[index] for index in indices], "speedup")

        return scipy.stats.bootstrap(
            [np.arange(len(rows))], speedup, vectorized=False, n_resamples=1500, method="percentile",
            confidence_level=level, random_state=np.random.default_rng(11),
        ).confidence_interval  # fmt: skip

    expected, narrow = theirs(0.95), theirs(0.90)
    low, high = paired_bootstrap(rows, "speedup", num_resamples=8000)
    # 1500 and 8000 draws: a quantile's own error is about 4% of the width; the 90% interval is 16% narrower.
    assert (low, high) == pytest.approx(tuple(expected), abs=0.1 * (expected.high - expected.low))
    assert low < evaluate(rows, "speedup") < high
    assert high - low > 1.1 * (narrow.high - narrow.low)  # the control: another level would be seen


def test_the_interval_repeats_narrows_with_more_prompts_and_needs_two(make_row):
    rows = varied_rows(make_row, noise=0.3)
    assert paired_bootstrap(rows, "speedup", 200) == paired_bootstrap(rows, "speedup", 200)
    few, many = paired_bootstrap(rows[:5], "accept_length"), paired_bootstrap(rows, "accept_length")
    assert many[1] - many[0] < few[1] - few[0]
    assert paired_bootstrap(rows[:1], "speedup") is None
    with pytest.raises(ValueError, match="Unknown statistic 'speed'"):
        paired_bootstrap(rows, "speed")


def test_draft_milliseconds_are_per_pass_and_null_when_a_row_does_not_tell(make_row):
    rows = [make_row("a", draft_s=0.5, passes=4), make_row("b", draft_s=1.0, passes=8, tokens=20, baseline_tokens=20)]
    assert paired_bootstrap(rows, "draft_ms") == (125.0, 125.0)
    assert paired_bootstrap([make_row("a", draft_s=None), rows[1]], "draft_ms") is None
    assert paired_bootstrap([make_row("a", draft_s=None), rows[1]], "accept_length") is not None


def seed_rows(make_row, generator, num_seeds, num_prompts, seed_sd, prompt_sd, noise_sd, shift=None):
    """Rows by seed of heads that accept 3 tokens a pass: times e to the seed's effect, the prompt's, and noise.

    shift: effects of the prompts, (prompts,), to give two heads the same ones.
    """
    lengths = 3 * np.exp(
        generator.normal(0, seed_sd, (num_seeds, 1))
        + (generator.normal(0, prompt_sd, num_prompts) if shift is None else shift)
        + generator.normal(0, noise_sd, (num_seeds, num_prompts))
    )
    base = make_row()
    return [
        [base.model_copy(update={"prompt_id": str(p), "tokens": 100000, "passes": int(100000 / length)})
         for p, length in enumerate(run)]
        for run in lengths
    ]  # fmt: skip


def coverage(make_row, interval_of, seed_sd, prompt_sd, noise_sd, num_seeds=3, num_prompts=30, trials=120):
    """Share of the trials in which the interval holds the accept length of all seeds and prompts there could be."""
    # every prompt has as many tokens: the sum's ratio is 1 / E[1 / length], averaged over seeds
    truth = 3 * np.exp(seed_sd**2 / 2 - prompt_sd**2 / 2 - noise_sd**2 / 2)
    generator, held = np.random.default_rng(5), 0
    for _ in range(trials):
        low, high = interval_of(seed_rows(make_row, generator, num_seeds, num_prompts, seed_sd, prompt_sd, noise_sd))
        held += low <= truth <= high
    return held / trials


def mean_interval(runs):
    return over_seeds(runs, "accept_length", num_resamples=600).interval


def prompts_alone(runs):
    """The defect of forgetting that another seed would give another head."""
    pooled = [
        rows[0].model_copy(update={"tokens": sum(r.tokens for r in rows), "passes": sum(r.passes for r in rows)})
        for rows in zip(*runs, strict=True)
    ]
    return paired_bootstrap([row.model_copy(update={"baseline_tokens": row.tokens}) for row in pooled],
                            "accept_length", 600)  # fmt: skip


def drawn_seeds(runs):
    """The defect of drawing the few seeds there are with replacement."""
    generator = np.random.default_rng(0)
    table = np.array([[row.passes for row in run] for run in runs], float)
    counts = generator.multinomial(table.shape[1], np.full(table.shape[1], 1 / table.shape[1]), 600)
    by_run = 100000 * table.shape[1] / (counts @ table.T)
    chosen = generator.integers(0, len(runs), (600, len(runs)))
    return np.quantile(np.take_along_axis(by_run, chosen, 1).mean(1), [0.025, 0.975])


def nested_prompts(runs):
    """The defect of drawing prompts for each seed by itself."""
    generator = np.random.default_rng(0)
    table = np.array([[row.passes for row in run] for run in runs], float)
    total = np.zeros(600)
    for passes in table:
        counts = generator.multinomial(len(passes), np.full(len(passes), 1 / len(passes)), 600)
        total += 100000 * len(passes) / (counts @ passes) / len(table)
    return np.quantile(total, [0.025, 0.975])


def test_the_interval_over_three_seeds_covers_the_truth_where_seeds_decide(make_row):
    """The level is 95%; 120 trials have a standard error of 2 %."""
    seeds_decide = {"seed_sd": 0.05, "prompt_sd": 0.05, "noise_sd": 0.05}
    assert coverage(make_row, mean_interval, **seeds_decide) >= 0.91
    assert coverage(make_row, prompts_alone, **seeds_decide) < 0.7  # the controls
    assert coverage(make_row, drawn_seeds, **seeds_decide) < 0.9


def test_the_interval_over_three_seeds_covers_the_truth_where_prompts_decide(make_row):
    prompts_decide = {"seed_sd": 0.005, "prompt_sd": 0.4, "noise_sd": 0.05}
    assert 0.89 <= coverage(make_row, mean_interval, **prompts_decide) <= 0.99
    assert coverage(make_row, nested_prompts, **prompts_decide) < 0.85  # the control


def test_over_seeds_is_the_mean_of_the_runs_and_with_one_run_the_interval_over_prompts(make_row):
    generator = np.random.default_rng(1)
    runs = seed_rows(make_row, generator, 3, 20, 0.1, 0.3, 0.1)
    found = over_seeds(runs, "accept_length")
    assert found.by_run == pytest.approx([evaluate([r.model_copy(update={"baseline_tokens": r.tokens})
                                                         for r in run], "accept_length") for run in runs])  # fmt: skip
    assert found.value == pytest.approx(np.mean(found.by_run)) and found.num_prompts == 20
    alone = over_seeds(runs[:1], "accept_length", num_resamples=700)
    assert alone.interval == pytest.approx(paired_bootstrap(runs[0], "accept_length", 700))
    alike = over_seeds([runs[0]] * 3, "accept_length", num_resamples=700)  # no seed differs: prompts alone again
    assert alike.interval == pytest.approx(alone.interval)
    assert found.interval[0] < alone.interval[0] or found.interval[1] > alone.interval[1]


def test_a_ratio_over_seeds_pairs_prompts_and_seeds(make_row):
    generator = np.random.default_rng(3)
    runs = seed_rows(make_row, generator, 3, 25, 0.1, 0.4, 0.1)
    twice = [[row.model_copy(update={"passes": 2 * row.passes}) for row in reversed(run)] for run in runs]
    found = over_seeds(runs, "accept_length", twice)
    assert found.value == pytest.approx(2.0) and found.interval == pytest.approx((2.0, 2.0))
    shifted = over_seeds(runs, "accept_length", [*twice[1:], twice[0]])  # the control: other seeds as partners
    assert shifted.interval[1] - shifted.interval[0] > 0.1
    renamed = [[row.model_copy(update={"prompt_id": str(24 - int(row.prompt_id))}) for row in run] for run in twice]
    unpaired = over_seeds(runs, "accept_length", renamed)  # the control: other prompts as partners
    assert unpaired.interval[1] - unpaired.interval[0] > 0.1


def test_over_seeds_takes_the_prompts_that_count_everywhere(make_row):
    rows = [make_row("a"), make_row("b", tokens=20, baseline_tokens=20), make_row("c", tokens=8, baseline_tokens=8)]
    wrong = [rows[0], rows[1].model_copy(update={"identical": False}), rows[2]]
    found = over_seeds([rows, wrong], "accept_length")
    assert found.num_prompts == 2 and found.by_run == [18 / 8, 18 / 8]
    assert over_seeds([rows], "accept_length", [wrong]).value == 1.0
    one = over_seeds([rows[:1], rows], "accept_length")
    assert (one.value, one.interval, one.num_prompts) == (2.5, None, 1)
    nothing = over_seeds([rows[:1], rows[1:]], "accept_length")
    assert (nothing.value, nothing.interval, nothing.by_run) == (None, None, [None, None])
    ratio = over_seeds([[rows[2], rows[0]]], "accept_length", [[rows[1], rows[2].model_copy(update={"passes": 8})]])
    assert (ratio.value, ratio.interval, ratio.num_prompts) == (2.0, None, 1)
