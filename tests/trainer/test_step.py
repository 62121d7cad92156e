"""The figures of a step: the sums of those of its passes, read once at its end."""

import numpy as np
import pytest

from heads.registry import build
from runtime import jt, set_seed
from tests.small import small_backbone
from trainer.config import TrainConfig
from trainer.data.tokens import TokenizedData
from trainer.features.cache import OnlineFeatures
from trainer.loss import Objective, head_loss, make_batch
from trainer.step import _Sums, gradients, split

DEPTHS = 3


@pytest.fixture(scope="module")
def setting():
    """(head, data, source): a head with a loss of its own besides the cross-entropies."""
    set_seed(0)
    backbone = small_backbone()
    random = np.random.default_rng(0)
    data = TokenizedData.of([(random.integers(3, 64, n), random.integers(0, 2, n)) for n in (14, 9, 17, 12, 11)])
    head = build("eagle", {"num_depths": DEPTHS}, backbone)
    head.train()
    return head, data, OnlineFeatures(backbone, data, head.layers)


def by_hand(setting, parts, indices, places=(1, 5)):
    """(losses, top1, top5), (depths,) each, and the further loss, of passes over these parts of a step."""
    head, data, source = setting
    figures, aux = np.zeros((3, DEPTHS)), 0.0
    for part in parts:
        batch = make_batch(data, part, source, DEPTHS, indices)
        loss_parts = head_loss(head, batch, 1.0, Objective())
        for depth, (loss, rank) in enumerate(zip(loss_parts.depth_losses, loss_parts.ranks, strict=True)):
            found = rank.numpy()
            hits = [np.count_nonzero((found >= 0) & (found < top)) for top in places]
            figures[:, depth] += [float(loss.item()), *(hits / batch.label_counts[depth])]
        aux += batch.share * float(loss_parts.aux["feature"].item())
    return figures, aux


def test_the_figures_of_a_step_are_those_of_its_passes_added_up(setting):
    head, data, source = setting
    indices, parameters = [0, 1, 2, 3, 4], list(head.trainable().values())
    for accumulate in (1, 3):
        config = TrainConfig(accumulate=accumulate, depth_weight=1.0)
        _, metrics, batches = gradients(head, parameters, data, indices, source, config, Objective())
        assert len(batches) == accumulate
        parts = split(indices, data.lengths, accumulate)
        figures, aux = by_hand(setting, parts, indices)
        got = np.array([metrics.losses, metrics.top1, metrics.top5])
        np.testing.assert_allclose(got, figures, rtol=1e-6)
        assert metrics.aux == {"feature": pytest.approx(aux, rel=1e-6)} and aux > 0
        assert (got[2] > 0).any() and (got[0] > 1).all()
    assert np.abs(got - by_hand(setting, parts[:2], indices)[0]).max() > 1e-2  # control: a pass left out
    assert np.abs(got - by_hand(setting, parts, indices, (1, 30))[0]).max() > 1e-1  # control: thirty places for five


def test_a_step_without_labels_has_no_gradients_and_no_figures(setting):
    head, data, source = setting
    unlabelled = TokenizedData(data.token_ids, np.zeros_like(data.mask), data.offsets)
    parameters, config = list(head.trainable().values()), TrainConfig(accumulate=2)
    grads, metrics, batches = gradients(head, parameters, unlabelled, [0, 1], source, config, Objective())
    assert grads is None and metrics.losses == [] and metrics.aux == {} and batches == []


def test_figures_that_are_not_read_yet_hold_no_graph(setting):
    """A pass's activations must be freed before the next pass computes its own."""
    head, data, source = setting

    def alive(detached):
        sums = _Sums(DEPTHS)
        jt.sync_all()
        before = jt.core.number_of_lived_ops()
        batch = make_batch(data, [0, 1], source, DEPTHS)
        loss_parts = head_loss(head, batch, 1.0, Objective())
        loss_parts.total.sync()
        if detached:
            sums.add(batch, loss_parts)
        reference = sums if detached else list(loss_parts.aux.values())
        del loss_parts, batch
        assert reference
        return jt.core.number_of_lived_ops() - before

    assert alive(True) <= 2 * DEPTHS + 1 < alive(False)
