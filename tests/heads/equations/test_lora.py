"""The LoRA head: merged adapters equal trained ones, losses equal NumPy's, stages train their parameters."""

import numpy as np
import pytest

from backbone.differentiable import DifferentiableBackbone
from heads.base import Features
from heads.checkpoint import load_head, save_checkpoint
from heads.registry import build
from runtime import jt

LENGTHS, DEPTHS = (6, 5), 2
TOTAL = sum(LENGTHS)
# Two layers in float32 with sums in another order: up to 2e-5 of the size of a hidden state was observed.
TOLERANCE = 2e-4


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def hidden_by_numpy(backbone, token_ids, change=None):
    """Last hidden states of one sequence, float64; change(layer, name) is added to each matrix."""
    c = backbone.config

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * weight.numpy().astype(np.float64)

    def rotate(x):
        half = c.head_dim // 2
        angle = np.arange(len(x))[:, None, None] / c.rope_theta ** (np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x, rows = backbone.embedding.numpy().astype(np.float64)[token_ids], len(token_ids)
    for layer, block in enumerate(backbone.blocks):
        w = {
            name: m.astype(np.float64) + (change(layer, name) if change else 0) for name, m in block.matrices().items()
        }
        u = norm(x, block.norm1)
        q = rotate((u @ w["q"].T).reshape(rows, c.num_heads, c.head_dim))
        k = rotate((u @ w["k"].T).reshape(rows, c.num_kv_heads, c.head_dim))
        v = (u @ w["v"].T).reshape(rows, c.num_kv_heads, c.head_dim)
        mixed = np.zeros_like(q)
        for h in range(c.num_heads):
            kv = h * c.num_kv_heads // c.num_heads
            scores = np.where(np.tri(rows) > 0, q[:, h] @ k[:, kv].T / np.sqrt(c.head_dim), -np.inf)
            mixed[:, h] = np.exp(log_softmax(scores)) @ v[:, kv]
        x = x + mixed.reshape(rows, -1) @ w["o"].T
        u = norm(x, block.norm2)
        gate = u @ w["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (u @ w["up"].T)) @ w["down"].T
    return norm(x, backbone.norm)


def change_of(head):
    def change(layer, name):
        adapter = head.adapter(layer, name)
        return head.scale * adapter.up.weight.numpy().astype(np.float64) @ adapter.down.weight.numpy()

    return change


@pytest.fixture
def head(random_head):
    return random_head("lora", num_depths=DEPTHS, adapter_rank=4, adapter_alpha=2.0, kl_weight=3.0)


@pytest.fixture
def batch(backbone):
    """Two packed sequences: the unadapted features, and token ids (1, total + depths)."""
    ids = np.random.default_rng(5).integers(3, 64, (1, TOTAL + DEPTHS)).astype(np.int32)
    parts = np.split(ids[0, :TOTAL], np.cumsum(LENGTHS)[:-1])
    hidden = np.concatenate([backbone.forward(part[None]).hidden.numpy()[0] for part in parts])
    return Features(jt.array(hidden[None]), {}, LENGTHS), ids, parts


def test_the_differentiable_backbone_equals_numpy_and_the_cached_one(backbone, batch):
    features, ids, parts = batch
    hidden = DifferentiableBackbone(backbone).hidden(ids[0, :TOTAL], LENGTHS).numpy()
    expected = np.concatenate([hidden_by_numpy(backbone, part) for part in parts])
    assert np.abs(hidden - expected).max() < TOLERANCE
    assert np.abs(features.hidden.numpy()[0] - expected).max() < TOLERANCE
    joined = DifferentiableBackbone(backbone).hidden(ids[0, :TOTAL], [TOTAL]).numpy()
    assert np.abs(joined - expected)[LENGTHS[0] :].max() > 100 * TOLERANCE


def test_trained_and_merged_adapters_give_the_hidden_states_of_the_equation(head, backbone, batch):
    _, ids, parts = batch
    expected = np.concatenate([hidden_by_numpy(backbone, part, change_of(head)) for part in parts])
    unadapted = np.concatenate([hidden_by_numpy(backbone, part) for part in parts])
    for training in (True, False):
        head.train() if training else head.eval()
        found = head.adapted_hidden(ids[0, :TOTAL], LENGTHS).numpy()[0]
        assert np.abs(found - expected).max() < TOLERANCE, training
        assert np.abs(found - unadapted).max() > 100 * TOLERANCE


def test_the_losses_are_those_of_the_equation(head, backbone, batch):
    features, ids, parts = batch
    positions = np.array([0, 2, 7, 10], np.int32)
    head.train()
    head.enter("joint", 0.5)
    output = head(features, ids, positions)
    lm = backbone.lm_head_weight.numpy().astype(np.float64)
    adapted = np.concatenate([hidden_by_numpy(backbone, part, change_of(head)) for part in parts])[positions]
    log_p = log_softmax(features.hidden.numpy()[0].astype(np.float64)[positions] @ lm.T)
    log_q = log_softmax(adapted @ lm.T)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    assert abs(float(output.aux["backbone_kl"].item()) - 3 * kl) < 1e-3 * kl
    for depth in range(DEPTHS):
        p = {name: v.numpy().astype(np.float64) for name, v in head.named_parameters()}
        z = adapted @ p[f"blocks.{depth}.0.linear.weight"].T + p[f"blocks.{depth}.0.linear.bias"]
        expected = (adapted + z / (1 + np.exp(-z))) @ p[f"lm_heads.{depth}.weight"].T
        assert np.abs(output.logits[depth].value().numpy() - expected).max() < 10 * TOLERANCE
    head.eval()
    stats = head(features, ids, positions).stats
    following = ids[0, positions + 1]
    for name, log in (("before", log_p), ("after", log_q)):
        np.testing.assert_allclose(stats[name], -log[np.arange(4), following], atol=10 * TOLERANCE)
    described = head.describe({"before": np.log(2.0), "after": np.log(3.0)})
    assert described == pytest.approx({"perplexity_before": 2.0, "perplexity_after": 3.0})


def gradients(head, batch, stage, progress, term):
    features, ids, _ = batch
    head.train()
    head.enter(stage, progress)
    output = head(features, ids, np.arange(4, dtype=np.int32))
    loss = output.logits[1].value().sqr().mean() if term == "heads" else output.aux["backbone_kl"]
    names, parameters = zip(*head.trainable().items(), strict=True)
    return {name: grad.numpy() for name, grad in zip(names, jt.grad(loss, list(parameters)), strict=True)}


def test_the_heads_loss_reaches_the_adapters_along_a_sine(head, batch):
    name = "adapters.0.up.weight"
    half, whole, none = (gradients(head, batch, "joint", at, "heads") for at in (0.5, 1.0, 0.0))
    assert np.abs(whole[name]).max() > 0 and not none[name].any()
    np.testing.assert_allclose(half[name], np.sin(np.pi / 4) * whole[name], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(
        half["blocks.1.0.linear.weight"], whole["blocks.1.0.linear.weight"], rtol=1e-4, atol=1e-7
    )
    kl = gradients(head, batch, "joint", 0.0, "kl")
    assert np.abs(kl[name]).max() > 0 and not kl["blocks.1.0.linear.weight"].any()


def test_the_first_stage_trains_the_heads_on_the_unadapted_features(backbone, head, batch):
    features, ids, _ = batch
    head.config.adapter_rate = 0.3
    first, second = head.stages()
    assert (first.name, second.name) == ("heads", "joint") and first.share + second.share == 1
    assert first.rate("adapters.0.up.weight") is None and first.rate("blocks.0.0.linear.bias") == 1
    assert second.rate("adapters.0.up.weight") == 0.3 and second.rate("lm_heads.0.weight") == 1
    head.train()
    head.enter("heads", 0.3)
    output = head(features, ids, np.arange(4, dtype=np.int32))
    assert output.aux == {}
    plain = build("mlp", {"num_depths": DEPTHS}, backbone)
    own = dict(head.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.update(own[name].copy())
    plain.train()
    for mine, other in zip(output.logits, plain(features, ids, np.arange(4)).logits, strict=True):
        np.testing.assert_array_equal(mine.value().numpy(), other.value().numpy())


def test_an_untrained_head_does_not_change_the_backbone(backbone, batch):
    head = build("lora", {"num_depths": DEPTHS}, backbone)
    ids = batch[1][:, :TOTAL]
    same = head.decoding_backbone
    assert same is not backbone and same.fingerprint != backbone.fingerprint
    np.testing.assert_array_equal(same.forward(ids).hidden.numpy(), backbone.forward(ids).hidden.numpy())


def test_the_merged_backbone_follows_training_and_loading(head, backbone, batch, tmp_path):
    ids = batch[1][:, :TOTAL]
    head.eval()
    before = head.decoding_backbone.forward(ids).hidden.numpy()
    config = {"head": "lora", "head_config": vars(head.config), "backbone": {"fingerprint": backbone.fingerprint}}
    save_checkpoint(tmp_path / "checkpoint", head, config, {})
    loaded, _ = load_head(tmp_path, backbone)
    np.testing.assert_array_equal(loaded.decoding_backbone.forward(ids).hidden.numpy(), before)
    head.train()
    gradients(head, batch, "joint", 1.0, "heads")
    up = dict(head.named_parameters())["adapters.3.up.weight"]
    up.update(up * 2)
    head.eval()
    assert np.abs(head.decoding_backbone.forward(ids).hidden.numpy() - before).max() > 1e-3
