"""The training loss: labels counted over a step, parts that add up, and the alignment of a teacher's distributions."""

from types import SimpleNamespace

import numpy as np
import pytest

from heads.base import HeadOutput
from heads.registry import build
from runtime import jt
from trainer.data.tokens import TokenizedData
from trainer.features.cache import OnlineFeatures
from trainer.loss import Objective, head_loss, make_batch

DEPTHS = 3
TOLERANCE = 1e-5  # float32 rounding of the same sums in another order


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    return TokenizedData.of([(random.integers(3, 64, n), np.arange(n) > 2) for n in (9, 14, 7, 11)])


def made(backbone, name="mlp", seed=0, **options):
    """A head in training whose parameters are moved off their start."""
    head = build(name, {"num_depths": DEPTHS, **options}, backbone)
    random = np.random.default_rng(seed)
    for _, parameter in sorted(head.trainable().items()):
        noise = random.standard_normal(tuple(parameter.shape)) * 0.1
        parameter.update(jt.array((parameter.numpy() + noise).astype(np.float32)))
    head.train()
    return head


def batch_of(backbone, data, indices, step_indices=None, layers=()):
    return make_batch(data, indices, OnlineFeatures(backbone, data, layers), DEPTHS, step_indices)


def numbers(head, *losses):
    """Totals, depth losses and gradients of each, NumPy."""
    parameters = list(head.trainable().values())
    return [
        [each.numpy() for each in (parts.total, *parts.depth_losses, *jt.grad(parts.total, parameters))]
        for parts in losses
    ]


def farthest(found, expected):
    return max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))


def test_a_batch_counts_the_labels_of_its_step():
    """Two conversations of five tokens, the last three the assistant's. Position 1 scores tokens 3 and 4, position 2
    token 4; the last position has no label, and the root of position 0 is not the assistant's."""
    data = TokenizedData.of([(np.arange(10, 15), np.arange(5) > 1)] * 2)
    source = SimpleNamespace
    full = make_batch(data, [0, 1], lambda indices: source(indices=indices), 2)
    np.testing.assert_array_equal(full.positions, [1, 2, 6, 7])
    np.testing.assert_array_equal(full.labels, [[13, 14, 13, 14], [14, -100, 14, -100]])
    np.testing.assert_array_equal(full.label_counts, [4, 2])
    assert full.share == 1 and full.features.indices == [0, 1]
    part = make_batch(data, [1], lambda indices: source(indices=indices), 2, step_indices=[0, 1])
    np.testing.assert_array_equal(part.labels, [[13, 14], [14, -100]])
    np.testing.assert_array_equal(part.label_counts, [4, 2])
    assert part.share == 0.5 and part.features.indices == [1]


def test_the_loss_weights_the_depths_and_averages_over_labels(backbone, data):
    head = made(backbone)
    batch = batch_of(backbone, data, [0, 1])
    parts = head_loss(head, batch, 0.5)
    means = []
    for logits, labels in zip(head(batch.features, batch.token_ids, batch.positions).logits, batch.labels, strict=True):
        x, labelled = logits.value().numpy().astype(np.float64), labels >= 0
        log_q = x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
        means.append(-log_q[labelled, labels[labelled]].mean())
    np.testing.assert_allclose([float(each.item()) for each in parts.depth_losses], means, rtol=TOLERANCE)
    expected = (means[0] + 0.5 * means[1] + 0.25 * means[2]) / 1.75
    assert abs(float(parts.total.item()) - expected) < TOLERANCE * expected
    assert abs(float(head_loss(head, batch, 0.6).total.item()) - expected) > 1e-3  # control


def with_a_mean(head):
    """The head with an extra loss that is a mean over the positions."""
    execute = head.execute

    def and_more(features, token_ids, positions):
        output = execute(features, token_ids, positions)
        output.aux["mean"] = head.depth_hidden(head.select(features.hidden, positions), 0).sqr().mean()
        return output

    head.execute = and_more
    return head


def test_the_parts_of_a_step_add_up_to_it(backbone, data):
    head = with_a_mean(made(backbone))
    step = [3, 0, 2, 1]
    (full,) = numbers(head, head_loss(head, batch_of(backbone, data, step), 0.8))
    for cut in ([[3, 0], [2, 1]], [[3], [0, 2, 1]], [[0], [1], [2], [3]]):
        pieces = numbers(head, *(head_loss(head, batch_of(backbone, data, part, step), 0.8) for part in cut))
        assert farthest([sum(each) for each in zip(*pieces, strict=True)], full) < TOLERANCE, cut
    # Control: parts that only know of themselves.
    pieces = numbers(head, *(head_loss(head, batch_of(backbone, data, part), 0.8) for part in ([3], [0, 2, 1])))
    assert farthest([sum(each) / 2 for each in zip(*pieces, strict=True)], full) > 100 * TOLERANCE


def certain(features, token_ids, offsets, shift=0):
    """A teacher that is certain of the token that follows, with an empty second entry."""
    tokens = len(token_ids)
    assert offsets[0] == 0 and offsets[-1] == tokens and features.hidden.shape[1] == tokens
    following = np.append(token_ids[1:], 0)
    ids = np.stack([np.roll(following, shift), np.full(tokens, -1)], 1).astype(np.int32)
    return jt.array(ids), jt.array(np.tile(np.array([1, 0], np.float32), (tokens, 1)))


@pytest.mark.parametrize("name", ["mlp", "redrafter"])
def test_a_teacher_that_is_certain_of_the_text_teaches_the_text(backbone, data, name):
    """KL(one-hot || q) is the cross-entropy: equal only if row t + 1 + k of the teacher meets depth k at position t."""
    head = made(backbone, name)
    batch = batch_of(backbone, data, [0, 1, 2])
    objectives = [Objective(), Objective("kl", teacher=certain), Objective("mix", 0.3, certain)]
    hard, *soft = numbers(head, *(head_loss(head, batch, 0.8, objective) for objective in objectives))
    for each in soft:
        assert farthest(each, hard) < TOLERANCE
    for shift in (-1, 1):
        late = Objective("kl", teacher=lambda *given, shift=shift: certain(*given, shift=shift))
        (wrong,) = numbers(head, head_loss(head, batch, 0.8, late))
        assert farthest(wrong, hard) > 0.1
        assert farthest(wrong[1 : 1 + DEPTHS], hard[1 : 1 + DEPTHS]) < TOLERANCE  # the reported losses stay hard


def spread(features, token_ids, offsets):
    """A teacher of three tokens a row, drawn."""
    random = np.random.default_rng(5)
    ids = np.stack([random.permutation(64)[:3] for _ in token_ids]).astype(np.int32)
    p = random.random(ids.shape).astype(np.float32)
    return jt.array(ids), jt.array(p / p.sum(1, keepdims=True))


def with_all_logits(head):
    """The head with its logits computed, as a head without a language-model head gives them."""
    execute = head.execute

    def computed(features, token_ids, positions):
        output = execute(features, token_ids, positions)
        return HeadOutput([each.value() for each in output.logits], output.aux)

    head.execute = computed
    return head


def test_a_mix_is_between_both_losses_and_computed_logits_give_the_same(backbone, data):
    batch = batch_of(backbone, data, [0, 1, 2])
    objectives = [Objective(), Objective("kl", 0.9, spread), Objective("mix", 0.25, spread)]
    chunked, full = made(backbone), with_all_logits(made(backbone))
    found = numbers(chunked, *(head_loss(chunked, batch, 0.8, each) for each in objectives))
    expected = numbers(full, *(head_loss(full, batch, 0.8, each) for each in objectives))
    for one, other in zip(found, expected, strict=True):
        assert farthest(one, other) < TOLERANCE
    hard, soft, mixed = found
    assert farthest([0.75 * a + 0.25 * b for a, b in zip(hard, soft, strict=True)], mixed) < TOLERANCE
    assert farthest(hard, soft) > 0.01


def test_a_draft_vocabulary_learns_its_part_of_the_teachers_distribution(backbone):
    """The head drafts tokens 17, 40 and 60. Of 17: 0.3, 5: 0.5, 60: 0.2 it learns 0.6 and 0.4 of columns 0 and 2; of
    what lists 5 alone, nothing."""
    head = made(backbone, "eagle3", draft_vocab_size=3)
    counts = np.zeros(64, np.int64)
    counts[[17, 40, 60]] = 1
    head.prepare(counts)
    data = TokenizedData.of([(np.array([7, 8, 9, 17, 60, 40, 17, 17]), np.arange(8) > 1)])
    batch = batch_of(backbone, data, [0], layers=head.layers)

    def teacher(ids, p):
        def say(features, token_ids, offsets):
            rows = len(token_ids)
            return jt.array(np.tile(np.array(ids, np.int32), (rows, 1))), jt.array(
                np.tile(np.array(p, np.float32), (rows, 1))
            )

        return Objective("kl", teacher=say)

    total = 0
    output = head(batch.features, batch.token_ids, batch.positions)
    for logits, labels in zip(output.logits, batch.labels, strict=True):
        x = logits.value().numpy().astype(np.float64)
        log_q = x - np.log(np.exp(x).sum(1, keepdims=True))
        rows = 0.6 * (np.log(0.6) - log_q[:, 0]) + 0.4 * (np.log(0.4) - log_q[:, 2])
        total += rows[labels >= 0].mean() / DEPTHS
    found = head_loss(head, batch, 1.0, teacher([17, 5, 60], [0.3, 0.5, 0.2])).total
    assert abs(float(found.item()) - total) < TOLERANCE * total
    nothing = head_loss(head, batch, 1.0, teacher([5, -1, -1], [1, 0, 0]))
    assert float(nothing.total.item()) == 0
    assert not any(grad.numpy().any() for grad in jt.grad(nothing.total, list(head.trainable().values())))


def test_a_label_outside_of_the_vocabulary_is_named(backbone, data):
    head, batch = made(backbone), batch_of(backbone, data, [0])
    batch.labels[1, 0] = 64
    with pytest.raises(ValueError, match="label 64 is outside the vocabulary of 64 tokens"):
        head_loss(head, batch, 1.0)
