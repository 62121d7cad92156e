"""EAGLE-1 and EAGLE-3 against their equations in NumPy, which keep no cache and share no code with the heads."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from heads.base import Features
from heads.checkpoint import load_parameters
from heads.decoder import DecoderBlock, HeadCache
from heads.eagle3.head import fused_layers
from heads.registry import build
from runtime import jt
from tests.heads.parity import DEPTHS, array, norm, parameters_of, silu
from trainer.loss import Batch, head_loss, label_columns

LENGTHS = (7, 4)
TOTAL = sum(LENGTHS)
# Of the largest logit after three decoder layers in float32, against float64: up to 2e-5 was observed.
TOLERANCE = 1e-4
BASE, GROUP = 10000.0, 2  # the test backbone's rotary base, and its query heads per key-value head


def rotated(x, position):
    """Rotary embedding, half-split, of one row's heads. x: (heads, d)."""
    half = x.shape[1] // 2
    angle = position / BASE ** (np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)


def last_output(p, pairs, head_dim=8):
    """The decoder layer over a list of (r, u), one after another; the output of the last. Nothing is cached."""
    queries, keys, values = [], [], []
    for position, (_, u) in enumerate(pairs):
        kv = (u @ p["block.kv.weight"].T).reshape(2, -1, head_dim)
        queries.append(rotated((u @ p["block.q.weight"].T).reshape(-1, head_dim), position))
        keys.append(rotated(kv[0], position))
        values.append(kv[1])
    mixed = []
    for head, q in enumerate(queries[-1]):
        k, v = (np.stack([part[head // GROUP] for part in parts]) for parts in (keys, values))
        scores = k @ q / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        mixed.append(weights / weights.sum() @ v)
    h = pairs[-1][0] + np.concatenate(mixed) @ p["block.o.weight"].T
    gate, up = np.split(norm(h, p["block.mlp_norm.weight"]) @ p["block.gate_up.weight"].T, 2)
    return h + (silu(gate) * up) @ p["block.down.weight"].T


def eagle_pair(p, feature, embedding):
    x = np.concatenate([embedding, feature]) @ p["join.weight"].T + p["join.bias"]
    return x, norm(x, p["norm.weight"])


def eagle3_pair(p, feature, embedding):
    u = np.concatenate([norm(embedding, p["token_norm.weight"]), norm(feature, p["feature_norm.weight"])])
    return feature + p["residual.weight"] @ u if "residual.weight" in p else feature, u


def expected_outputs(p, pair, features, embeddings, depths):
    """y of every position and depth of one sequence. features: (seq, dim); embeddings: of tokens 0 .. seq + depths."""
    outputs = np.zeros((depths, *features.shape))
    for t in range(len(features)):
        pairs = [pair(p, features[s], embeddings[s + 1]) for s in range(t + 1)]
        for depth in range(depths):
            outputs[depth, t] = last_output(p, pairs)
            pairs.append(pair(p, outputs[depth, t], embeddings[t + 2 + depth]))
    return outputs


@pytest.fixture
def batch(backbone):
    """Two packed sequences: features, and token ids (1, total + depths)."""
    random = np.random.default_rng(3)
    ids = random.integers(3, 64, (1, TOTAL + DEPTHS)).astype(np.int32)
    layers = {i: jt.array(random.standard_normal((1, TOTAL, 32)).astype(np.float32)) for i in (1,)}
    hidden = jt.array(random.standard_normal((1, TOTAL, 32)).astype(np.float32))
    return Features(hidden, layers, LENGTHS), ids


def sequences(array):
    return np.split(array, np.cumsum(LENGTHS)[:-1])


def outputs_by_hand(head, backbone, batch, name):
    """The outputs of the NumPy equations for the packed batch, (depths, total, dim)."""
    features, ids = batch
    p, embedding = parameters_of(head), array(backbone.embedding)
    if name == "eagle":
        pair, rows = eagle_pair, array(features.hidden)[0]
    else:
        pair = eagle3_pair
        fused = np.concatenate([array(features.layers[1])[0]] * 3, 1)
        rows = fused @ p["fuse.weight"].T
    parts, first = [], 0
    for part in sequences(rows):
        # In a packed batch a sequence is followed by the next one; no label needs it, and both sides read the same.
        embedded = embedding[ids[0, first : first + len(part) + DEPTHS + 1]]
        embedded = np.concatenate([embedded, np.zeros((len(part) + DEPTHS + 1 - len(embedded), 32))])
        parts.append(expected_outputs(p, pair, part, embedded, DEPTHS))
        first += len(part)
    return np.concatenate(parts, 1)


def logits_by_hand(head, backbone, name, outputs):
    p = parameters_of(head)
    if name == "eagle":
        return outputs @ array(backbone.lm_head_weight).T
    return norm(outputs, p["norm.weight"]) @ p["lm_head.weight"].T


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "options"), [("eagle", {}), ("eagle3", {}), ("eagle3", {"token_residual": True})], ids=str
)
def test_the_logits_are_those_of_the_equation(random_head, backbone, batch, name, options, training):
    head = random_head(name, num_depths=DEPTHS, **options)
    head.train() if training else head.eval()
    features, ids = batch
    positions = np.array([0, 3, 6, 7, 9, 10], np.int32)
    logits = np.stack([each.value().numpy() for each in head(features, ids, positions).logits])
    outputs = outputs_by_hand(head, backbone, batch, name)
    expected = logits_by_hand(head, backbone, name, outputs)[:, positions]
    scale = np.abs(expected).max()
    assert np.abs(logits - expected).max() < TOLERANCE * scale
    # Controls: one joined sequence, and the outputs of other depths.
    features.lengths = (TOTAL,)
    joined = np.stack([each.value().numpy() for each in head(features, ids, positions).logits])
    assert np.abs(joined - expected)[:, 3:].max() > 100 * TOLERANCE * scale
    shifted = logits_by_hand(head, backbone, name, np.roll(outputs, 1, 0))[:, positions]
    assert np.abs(shifted - expected).max() > 100 * TOLERANCE * scale


def test_the_feature_loss_is_the_mean_smooth_l1_over_depths(random_head, backbone, batch):
    head = random_head("eagle", num_depths=DEPTHS, trained_depths=2, feature_weight=0.5)
    head.train()
    features, ids = batch
    positions = np.arange(TOTAL, dtype=np.int32)
    output = head(features, ids, positions)
    assert [each is None for each in output.logits] == [False, False, True]
    hidden = features.hidden.numpy()[0].astype(np.float64)
    outputs, total = outputs_by_hand(head, backbone, batch, "eagle"), 0
    for depth in range(2):
        terms = []
        for part, truth in zip(sequences(outputs[depth]), sequences(hidden), strict=True):
            gap = np.abs(part[: -1 - depth] - truth[1 + depth :])
            terms.append(np.where(gap < 1, gap**2 / 2, gap - 0.5))
        total += np.concatenate(terms).mean() / 2
    assert abs(float(output.aux["feature"].item()) - 0.5 * total) < 1e-4 * total
    head.config.feature_weight = 0.0
    assert float(head(features, ids, positions).aux["feature"].item()) == 0


def test_noise_is_added_only_while_training(random_head, batch):
    head = random_head("eagle", num_depths=DEPTHS, noise=0.3)
    features, ids = batch
    positions = np.arange(3, dtype=np.int32)

    def logits():
        return head(features, ids, positions).logits[0].value().numpy()

    head.train()
    assert np.abs(logits() - logits()).max() > 0
    head.eval()
    np.testing.assert_array_equal(logits(), logits())


def test_a_draft_vocabulary_has_the_most_frequent_tokens(backbone, batch, random_head):
    counts = np.zeros(64, np.int64)
    counts[[40, 3, 17, 60]] = [9, 5, 7, 7]
    head = build("eagle3", {"num_depths": DEPTHS, "draft_vocab_size": 3}, backbone)
    whole = build("eagle3", {"num_depths": DEPTHS}, backbone)
    assert whole.draft_vocab is None and whole.num_parameters - head.num_parameters == 61 * 32
    head.prepare(counts)
    assert head.draft_vocab.tolist() == [17, 40, 60] and head.draft_vocab is head.draft_vocab  # read once
    np.testing.assert_array_equal(head.lm_head.weight.numpy(), backbone.lm_head_weight.numpy()[[17, 40, 60]])
    assert "drafted" in dict(head.named_parameters()) and "drafted" not in head.trainable()
    assert [label_columns(head)[t] for t in (16, 17, 40, 60)] == [-100, 0, 1, 2]
    features, ids = batch
    labels = np.array([[17, 5], [60, -100], [5, 5]], np.int32)
    head.eval()
    parts = head_loss(head, Batch(features, ids, np.array([2, 8], np.int32), labels, np.array([2, 1, 2])), 1.0)
    ranks = [rank.numpy().tolist() for rank in parts.ranks]
    assert ranks[0][1] == 64 and ranks[2] == [64, 64] and ranks[1][1] == -1
    assert 0 <= ranks[0][0] < 3 and 0 <= ranks[1][0] < 3
    assert float(parts.depth_losses[2].item()) == 0 and float(parts.depth_losses[0].item()) > 0


def test_a_replaced_draft_vocabulary_is_read_again(backbone, tmp_path):
    head, other = (build("eagle3", {"num_depths": DEPTHS, "draft_vocab_size": 3}, backbone) for _ in range(2))
    assert head.draft_vocab.tolist() == [0, 1, 2]
    head.drafted.update(np.array([5, 9, 11], np.int32))
    assert head.draft_vocab.tolist() == [5, 9, 11]
    save_file({name: parameter.numpy() for name, parameter in head.named_parameters()}, tmp_path / "head.safetensors")
    assert other.draft_vocab.tolist() == [0, 1, 2]
    load_parameters(other, tmp_path / "head.safetensors")
    assert other.draft_vocab.tolist() == [5, 9, 11]


@pytest.mark.parametrize(
    ("layers", "expected"), [(32, (2, 16, 29)), (6, (1, 3, 5)), (2, (1, 1, 1)), (1, (1, 1, 1)), (40, (2, 20, 36))]
)
def test_the_fused_layers_are_a_low_a_middle_and_a_high_one(layers, expected):
    assert fused_layers(layers) == expected


def test_a_cache_grows_and_keeps_its_rows(backbone):
    cache = HeadCache(DecoderBlock(backbone), capacity=4)
    rows = np.random.default_rng(0).standard_normal((2, 11, 2, 8)).astype(np.float32)
    for first, last in ((0, 3), (3, 4), (4, 11)):
        cache.append(*(jt.array(rows[i, first:last]) for i in (0, 1)))
    assert cache.length == 11 and cache.capacity == 11
    np.testing.assert_array_equal(cache.keys.numpy()[:11], rows[0])
    np.testing.assert_array_equal(cache.values.numpy()[:11], rows[1])


def test_rows_written_into_a_cache_change_nothing_else(backbone):
    """Keys and values are written in place, so they must not share memory with each other or with another cache."""
    cache, other = (HeadCache(DecoderBlock(backbone), capacity=4) for _ in range(2))
    rows = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
    cache.append(jt.array(rows), jt.array(2 * rows))
    np.testing.assert_array_equal(cache.keys.numpy()[:3], rows)
    np.testing.assert_array_equal(cache.values.numpy()[:3], 2 * rows)
    assert not other.keys.numpy().any() and not other.values.numpy().any()
    before = cache.keys
    cache.append(jt.array(rows), jt.array(rows))
    np.testing.assert_array_equal(before.numpy()[:3], rows)
    assert not before.numpy()[3:].any() and cache.capacity == 8
