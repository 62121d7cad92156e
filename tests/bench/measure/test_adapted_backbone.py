"""A head that changes the backbone is compared with the changed one, and its speedup is over the original."""

import numpy as np
import pytest

import backbone.model
import bench.measure.attempts
from backbone.tokenizer import load_tokenizer
from bench.record.schema import Record
from decoding.generate import first_difference, generate_autoregressive
from heads.registry import build, head_class
from tests.bench.measure.runs import NEW_TOKENS, TURNS, run


@pytest.fixture(scope="module")
def adapted_backbone():
    """The embedded backbone with noise on one matrix, larger than its weights: enough to change some replies."""
    frozen = backbone.model.load_backbone(None, "float16")
    shape = tuple(frozen.blocks[2].matrices()["down"].shape)
    change = np.random.default_rng(0).normal(0, 0.2, shape).astype(np.float32)
    return frozen.adapted({(2, "down"): change}, "test")


@pytest.fixture
def adapting(monkeypatch, adapted_backbone):
    """While the test runs, gated_rnn is a head that decodes with the adapted backbone."""
    monkeypatch.setattr(head_class("gated_rnn"), "decoding_backbone", property(lambda self: adapted_backbone))
    return adapted_backbone


def replies(backbone, prompts):
    """What autoregressive decoding says to each prompt."""
    rules = {"max_new_tokens": NEW_TOKENS, "stop_ids": load_tokenizer().eos_ids}
    return [generate_autoregressive(backbone, ids, **rules).token_ids for ids in prompts]


def test_a_head_that_changes_the_backbone_is_held_to_the_changed_one(folder, tmp_path, record, adapting):
    status, _, err = run(folder, "--head", "gated_rnn", "--nodes", 5, "--out-dir", tmp_path)
    assert status == 0, err
    found = Record.read(tmp_path / "gated_rnn.json")
    assert (found.parity.prompts, found.parity.identical, found.parity.first_difference) == (3, 3, None)
    # the conversations, with the original's replies for history
    tokenizer, frozen = load_tokenizer(), backbone.model.load_backbone(None, "float16")
    first, two, last = ([{"role": "user", "content": turns[0]}] for turns in TURNS)
    reply = tokenizer.decode(replies(frozen, [tokenizer.encode_chat(two)])[0]).strip()
    second = [*two, {"role": "assistant", "content": reply}, {"role": "user", "content": TURNS[1][1]}]
    prompts = [tokenizer.encode_chat(messages) for messages in (first, two, second, last)]
    original, adapted = replies(frozen, prompts), replies(adapting, prompts)
    same = [first_difference(a, b) for a, b in zip(original, adapted, strict=True)]
    assert {place is None for place in same} == {True, False}  # some replies change, some do not
    agreeing = [len(a) if place is None else place for a, place in zip(original, same, strict=True)]
    texts = [same[0] is None, same[1] is None and same[2] is None, same[3] is None]
    assert found.adaptation.greedy_agreement == sum(texts) / 3
    assert found.adaptation.token_agreement == sum(agreeing) / sum(map(len, original))
    assert found.adaptation.stats == found.head_stats == {"perplexity_before": 3.0}
    assert [row.adapted.agreeing_tokens for row in found.per_prompt] == [
        agreeing[0], agreeing[1] + agreeing[2], agreeing[3],
    ]  # fmt: skip
    assert "note: gated_rnn changes the backbone" in err
    # the head is compared with the original, which is what the run without the change measured too
    for row, plain in zip(found.per_prompt, record.per_prompt, strict=True):
        assert (row.baseline_tokens, row.prompt_tokens) == (plain.baseline_tokens, plain.prompt_tokens)
        assert row.tokens == row.adapted.tokens
    baseline = Record.read(tmp_path / "autoregressive.json")
    assert [row.tokens for row in baseline.per_prompt] == [row.baseline_tokens for row in record.per_prompt]
    assert found.metrics.speedup == pytest.approx(found.metrics.tokens_per_s / found.baseline.tokens_per_s)
    assert found.baseline.total_s == pytest.approx(sum(row.time_s for row in baseline.per_prompt))


@pytest.mark.parametrize("side", ["head", "baseline"])
def test_decoding_with_the_wrong_backbone_is_seen(folder, tmp_path, monkeypatch, adapting, side):
    """The control of the test above: either side on the original backbone breaks parity."""
    frozen = backbone.model.load_backbone(None, "float16")
    name = "generate" if side == "head" else "generate_autoregressive"
    right = getattr(bench.measure.attempts, name)
    monkeypatch.setattr(bench.measure.attempts, name, lambda _, *arguments, **rules: right(frozen, *arguments, **rules))
    status, _, err = run(folder, "--head", "gated_rnn", "--nodes", 5, "--out", tmp_path / "out.json")
    assert status == 0 and "prompts gave the baseline's tokens" in err
    record = Record.read(tmp_path / "out.json")
    assert record.parity.identical < 3 and record.parity.first_difference is not None
    agreement = 1.0 if side == "baseline" else pytest.approx(record.parity.identical / 3)
    assert record.adaptation.greedy_agreement == agreement


def test_an_adapted_backbone_of_another_shape_is_a_defect_of_the_head(monkeypatch):
    frozen = backbone.model.load_backbone(None, "float16")
    head = build("gated_rnn", {"num_depths": 3, "inner_size": 16}, frozen)
    other = backbone.model.load_backbone(None, "float32")
    monkeypatch.setattr(type(head), "decoding_backbone", property(lambda self: other))
    with pytest.raises(AssertionError, match="the original's shape and dtype"):
        bench.measure.attempts.Setup(frozen, load_tokenizer(), None, 8, head=head)
