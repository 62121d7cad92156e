"""The dry run: hand-worked sums, every verdict, and the plan of a real head."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from heads.registry import build
from trainer.config import TrainConfig
from trainer.data.tokens import TokenizedData
from trainer.dry_run.estimate import Measured, estimate, size, table
from trainer.dry_run.plan import Plan, StagePlan, held_bytes, plan_run
from trainer.session import Setting

GB = 10**9
# A head of 1000 numbers (1040 with its buffers); 100 steps of 200 tokens on average, 1000 tokens held out.
PLAN = Plan(
    head="mlp",
    parameters=1000,
    head_bytes=4160,
    stages=(StagePlan("warm", 400, 800, 60), StagePlan("all", 1000, 2000, 40)),
    optimizer="adamw",
    ema=True,
    accumulate=1,
    ranks=1,
    backbone="tiny",
    backbone_bytes=50_000,
    max_length=64,
    backbone_max_length=128,
    num_sequences=10,
    tokens=2000,
    held_out_tokens=1000,
    num_steps=100,
    run_tokens=20_000,
    score_every=30,
    features="cache",
    cache_bytes=6000,
    cache_dir="cache",
    cache_free=GB,
    out="runs/a",
    out_free=GB,
    same_disk=True,
    save_every=10,
    keep_last=2,
    memory_limit=GB,
)
MEASURED = Measured(
    forward_s=0.25, backward_s=0.5, update_s=0.125, tokens=100, peak_before_bytes=80_000, peak_after_bytes=100_000
)


def changed(**changes):
    return dataclasses.replace(PLAN, **changes)


def test_the_sums_are_those_worked_by_hand():
    found = estimate(PLAN, MEASURED)
    assert (found.gradients_bytes, found.optimizer_bytes, found.average_bytes) == (4000, 8000, 4000)
    assert found.fixed_bytes == 50_000 + 4160 + 4000 + 8000 + 4000
    assert found.state_bytes == 4160 + 8000 + 4000 and found.states_bytes == 2 * 16_160
    assert found.memory_bytes == 100_000 + 4000 + 16_160  # the average, and the copy of a state that is written
    assert found.disk_bytes == 3 * 16_160 + 2 * 4160
    assert found.step_s == 2 * 0.75 + 0.125  # 200 tokens a step, 100 were measured
    assert found.scores_s == 4 * 10 * 0.25  # after steps 30, 60, 90 and 100
    assert found.train_s == 100 * 1.625 + 10
    assert found.can_finish


def test_the_sums_follow_the_stages_the_ranks_and_the_options():
    swapped = estimate(changed(stages=PLAN.stages[::-1]), MEASURED)
    # The measured step trained 400 numbers with 800 moments, another stage trains 1000 with 2000.
    assert swapped.memory_bytes == 100_000 + 4 * (600 + 1200) + 4000 + 16_160
    shared = estimate(changed(ranks=2, accumulate=4), MEASURED)
    assert shared.gradients_bytes == 3 * 4000 and shared.memory_bytes == 120_160 + 2 * 4000
    assert shared.step_s == 0.75 + 0.125 and shared.scores_s == 5.0
    stateless = estimate(changed(save_every=0, ema=False), MEASURED)
    assert (stateless.states_bytes, stateless.average_bytes, stateless.disk_bytes) == (0, 0, 2 * 4160)
    unmeasured = estimate(PLAN, None)
    assert unmeasured.memory_bytes == unmeasured.fixed_bytes + unmeasured.state_bytes and unmeasured.train_s is None
    assert "not measured" in table(unmeasured)


@pytest.mark.parametrize(
    ("plan", "reasons"),
    [
        (PLAN, []),
        (changed(stages=(StagePlan("none", 0, 0, 100),)), ["no stage trains any parameter"]),
        (changed(ranks=11), ["there are 10 sequences for 11 ranks"]),
        (changed(max_length=129), ["--max-length 129 exceeds the 128 positions of the backbone; pass"]),
        # 100,000 measured, 4,000 for the average, 16,160 to write a state; with 2 ranks 4,000 for gradients, each.
        (changed(memory_limit=120_159), ["it needs 120 kB of memory, 120 kB are available"]),
        (changed(memory_limit=120_160), []),
        (changed(memory_limit=200_000, ranks=2), ["2 ranks need 248 kB of memory, 200 kB are available"]),
        # 56,800 for the run and 6,000 for the cache, with 5% to spare.
        (changed(out_free=65_939), ["the disk of runs/a has 65.9 kB free, 62.8 kB are needed (feature cache 6 kB"]),
        (changed(out_free=65_940), []),
        (changed(same_disk=False, cache_free=6_299), ["the disk of cache has 6.3 kB free, 6 kB are needed"]),
        (changed(num_sequences=1, ranks=2, max_length=999), ["there are 1 sequences", "--max-length 999"]),
    ],
)  # fmt: skip
def test_the_verdict_names_the_obstacles(plan, reasons):
    found = estimate(plan, MEASURED)
    assert len(found.reasons) == len(reasons)
    for message, reason in zip(found.reasons, reasons, strict=True):
        assert message.startswith(reason)
    assert found.can_finish == (not reasons)
    last = table(found).splitlines()[-1]
    assert last.split(maxsplit=2)[:2] == ["can", "finish"]
    assert last.endswith("yes") if not reasons else "no, because " + reasons[0] in last
    content = json.loads(found.to_json())
    assert content["can_finish"] == found.can_finish and len(content["reasons"]) == len(reasons)
    assert content["plan"]["num_steps"] == 100 and content["measured"]["update_s"] == 0.125


def test_the_table_is_plain_and_sizes_have_three_figures():
    text = table(estimate(PLAN, MEASURED))
    assert text.isascii() and "\x1b" not in text
    assert "  warm       400 of them trained for 60 steps" in text
    assert "0:02:52: 1.62 s a step, 0:00:10 of it scoring; writing the features not included" in text
    assert "2 x 16.2 kB" in text and "100 kB after one step, 80 kB before it" in text
    assert [size(count) for count in (999, 2e6, 1.234e9, 5e12)] == ["999 B", "2 MB", "1.23 GB", "5,000 GB"]


# The plan of a real head


def small_data(*lengths):
    return TokenizedData.of((np.arange(n) % 60 + 1, np.arange(n) > 2) for n in lengths)


def plan_of(backbone, tmp_path, **options):
    shared = {"max_length": 64, "tokens_per_step": 24, "epochs": 3, "cache_dir": str(tmp_path / "cache")}
    config = TrainConfig(head="mlp", **{**shared, **options})
    head = build("mlp", {"num_depths": 2, "lm_head": "own"}, backbone)
    tokenizer = SimpleNamespace(fingerprint="t")
    splits = SimpleNamespace(training=small_data(12, 12, 12, 12), held_out=small_data(10), tokenizer=tokenizer)
    return head, plan_run(Setting(config, backbone, splits, head, {}), tmp_path / "runs" / "a")


def test_the_plan_counts_the_head_the_data_and_the_cache(backbone, tmp_path):
    head, plan = plan_of(backbone, tmp_path, ema=0.5)
    numbers = sum(int(p.numel()) for p in head.trainable().values())
    assert plan.parameters == numbers and plan.head_bytes >= 4 * numbers and plan.ema
    assert plan.stages == (StagePlan("heads", numbers, 2 * numbers, 6),)
    assert (plan.num_sequences, plan.tokens, plan.held_out_tokens) == (4, 48, 10)
    assert (plan.num_steps, plan.run_tokens) == (6, 144)
    assert plan.cache_bytes == 58 * 32 * 2  # float16, 32 wide, only the last hidden state
    assert plan.same_disk and plan.out_free > 0 and plan.memory_limit > 0
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()
    assert estimate(plan, MEASURED).can_finish
    assert plan_of(backbone, tmp_path, features="online")[1].cache_bytes == 0


def test_the_bytes_of_a_backbone_are_those_of_its_weights(backbone):
    c = backbone.config
    layer = c.hidden_size * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.num_heads * c.head_dim * c.hidden_size
    layer += 3 * c.hidden_size * c.intermediate_size
    weights = 4 * (2 * c.vocab_size * c.hidden_size + c.num_layers * layer)
    # The rest are norms and the padding of packed rows.
    assert weights <= held_bytes(backbone) < 1.4 * weights
    twice = {"a": backbone, "b": [backbone]}
    assert held_bytes(twice) == held_bytes(backbone)
