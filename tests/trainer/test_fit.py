"""The training loop on a small random backbone: losses fall, the best checkpoint and the log are complete."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from heads import checkpoint
from heads.base import Features
from heads.checkpoint import load_head
from tests.trainer.runs import NUM_STEPS, start, training_data
from trainer.config import TrainConfig
from trainer.features.cache import OnlineFeatures, open_cache
from trainer.fit import count_steps
from trainer.guard import bad_features
from trainer.loss import make_batch

TRAINED = SimpleNamespace(trained=True)


@pytest.fixture(scope="module")
def data():
    training, held_out = training_data()
    return SimpleNamespace(training=training, held_out=held_out)


@pytest.fixture
def train(backbone, tmp_path):
    """train(out=..., source=..., progress=..., **options): one run; returns (result, head, records, out)."""

    def go(out="run", **options):
        result, head, records, _ = start(backbone, tmp_path / out, **options)
        return result, head, records, tmp_path / out

    return go


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_epochs_decide_the_steps_unless_there_is_a_limit(data):
    def steps(**options):
        return count_steps(TrainConfig(head="mlp", tokens_per_step=160, **options), data.training, TRAINED)

    assert steps() > 2 and steps(epochs=2.0) == 2 * steps()
    assert (steps(epochs=2.0, max_steps=3), steps(epochs=0.001)) == (3, 1)


def test_a_run_lowers_the_loss_and_saves_its_best_checkpoint(train, backbone, data):
    result, _, records, out = train()
    losses = [np.mean(record["loss"]) for record in records]
    assert len(losses) == NUM_STEPS == result.steps and np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3]), losses
    assert not result.interrupted and result.train_s > 0
    assert 1 <= result.best.expected_accept_length <= 3 and result.best_step in (5, 10, 12)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "log.jsonl", "states"]
    assert [path.name for path in (out / "states").iterdir()] == [f"step-{NUM_STEPS:08d}"]
    head, config = load_head(out, backbone)
    assert config["metrics"]["expected_accept_length"] == result.best.expected_accept_length
    assert config["progress"]["step"] == result.best_step and config["trainer"]["max_steps"] == NUM_STEPS
    totals = {"steps": NUM_STEPS, "tokens": result.tokens, "train_s": result.train_s, "interrupted": False}
    assert config["run"] == totals
    assert config["metrics"]["tree"] == result.best.tree and head.num_depths == 2
    assert json.loads((out / "checkpoint" / "provenance.json").read_text())["seed"] == 0
    *log, end = read_log(out)
    (step,) = (line for line in log if "rate" in line)
    assert step == records[9] and step["step"] == 10
    keys = {"step", "stage", "rate", "grad_norm", "loss", "top1", "top5", "aux", "tokens", "skipped"}
    assert keys | {"tokens_per_s", "memory_bytes"} == set(step)
    assert all(a <= b <= 1 for a, b in zip(step["top1"], step["top5"], strict=True))
    scores = [line for line in log if "held_out" in line]
    assert [line["step"] for line in scores] == [5, 10, 12]
    best = max(line["held_out"]["expected_accept_length"] for line in scores)
    assert best == result.best.expected_accept_length
    assert end["finished"] is True and end["steps"] == NUM_STEPS and end["tokens"] == result.tokens


def test_the_same_seed_gives_the_same_run_and_another_seed_another(train):
    first, again, other = (train(out, seed=seed)[2] for out, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert [r["loss"] for r in first] == [r["loss"] for r in again]
    assert [r["loss"] for r in first] != [r["loss"] for r in other]


def broken_from(backbone, data, first, last):
    """Features that are not numbers in the steps from ``first`` up to but not including ``last``, counted from 0."""
    online, calls = OnlineFeatures(backbone, data.training, ()), []

    def source(indices):
        features = online(indices)
        calls.append(1)
        return Features(features.hidden * float("nan")) if first <= len(calls) - 1 < last else features

    return source


def test_an_update_that_is_not_finite_is_skipped_and_counted(train, backbone, data):
    result, head, records, out = train(source=broken_from(backbone, data, 6, 8))
    assert result.steps == NUM_STEPS and result.skipped == 2
    assert ["grad_norm" in record for record in records] == [True] * 6 + [False] * 2 + [True] * 4
    assert all(np.isfinite(p.numpy()).all() for _, p in head.named_parameters())
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_several_skipped_updates_in_a_row_stop_the_run_and_save_its_step(train, backbone, data, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 9, .*hidden state is not finite at .*first at 0; see .*step-9"):
        train(source=broken_from(backbone, data, 5, 12))  # three are skipped, the fourth is one too many
    out = tmp_path / "run"
    assert load_head(out, backbone)[1]["progress"]["step"] == 5
    assert sorted(path.name for path in out.iterdir()) == ["bad-step-9.npz", "checkpoint", "log.jsonl", "states"]
    saved = np.load(out / "bad-step-9.npz")
    part = data.training.select(saved["sequences"])
    np.testing.assert_array_equal(saved["token_ids"], part.token_ids)
    assert np.isnan(saved["hidden0"]).all() and len(saved["hidden0"]) == len(part.token_ids)
    fine = make_batch(data.training, [0], OnlineFeatures(backbone, data.training, ()), 2)
    assert bad_features([fine]) == ""


def test_a_pruned_run_ends_with_its_best_score(backbone, tmp_path):
    seen = []

    def stop(step, score):
        seen.append((step, score.expected_accept_length))
        return True

    result, _, _, _ = start(backbone, tmp_path / "run", on_score=stop)
    assert [step for step, _ in seen] == [5] and result.steps == 5 and result.interrupted
    assert result.best.expected_accept_length == seen[0][1]


def test_accumulated_passes_give_the_weights_of_one(train):
    """Float32 sums in another order, 12 updates of AdamW: 2e-4 of the weights' own size at most, as measured 2e-5."""
    one, parts, other = (
        {name: p.numpy() for name, p in train(f"a{n}-{rate}", accumulate=n, learning_rate=rate)[1].named_parameters()}
        for n, rate in ((1, 2e-2), (3, 2e-2), (3, 1e-2))
    )
    gaps = [[np.abs(one[k] - w[k]).max() / np.abs(one[k]).max() for k in one] for w in (parts, other)]
    assert max(gaps[0]) < 2e-4 < min(g for g in gaps[1] if g > 0) * 100, (max(gaps[0]), max(gaps[1]))


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(train, backbone, tmp_path, monkeypatch):
    hashes = []

    def fail_later(*arguments):
        if hashes:
            raise OSError("no space left")
        hashes.append(1)
        return real(*arguments)

    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", fail_later)
    with pytest.raises(OSError, match="no space left"):
        train(score_every=1)
    out = tmp_path / "run"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "log.jsonl"]  # no leftovers
    assert load_head(out, backbone)[1]["progress"]["step"] == 1


def test_conversations_of_a_batch_do_not_see_each_other(backbone, data):
    online = OnlineFeatures(backbone, data.training, ())
    together, alone = online([3, 1, 2]), [online([i]) for i in (3, 1, 2)]
    assert together.lengths == tuple(int(data.training.lengths[i]) for i in (3, 1, 2))
    joined = np.concatenate([features.hidden.numpy() for features in alone], 1)
    np.testing.assert_array_equal(together.hidden.numpy(), joined)


def test_a_run_on_cached_features_lowers_the_loss_as_online_ones_do(train, backbone, data, tmp_path):
    cached = open_cache(backbone, "tok", data.training, (), tmp_path / "cache")
    by_cache, online = (
        [record["loss"] for record in train(name, source=source)[2]] for name, source in (("a", cached), ("b", None))
    )
    # Features rounded to 11 bits: the first losses moved by 3e-4 as measured, later ones drift apart slowly.
    np.testing.assert_allclose(by_cache[:3], online[:3], atol=2e-3)
    assert np.mean(by_cache[-3:]) < 0.7 * np.mean(by_cache[:3])
