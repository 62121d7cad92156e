"""The moving average of the weights: its values, and the exchange with the parameters."""

import numpy as np

from heads.base import Head
from heads.layers import Linear
from runtime import jt
from trainer.optim.average import Average


class TwoLayers(jt.Module):
    """As much of a head as an average needs."""

    def __init__(self):
        super().__init__()
        self.derived = {}
        random = np.random.default_rng(0)
        self.first = Linear(16, 16, weight=random.standard_normal((16, 16)))
        self.second = Linear(16, 3, weight=random.standard_normal((3, 16)))

    def execute(self, x):
        return self.second(self.first(x))

    forget_packed = Head.forget_packed


class Forgetful(TwoLayers):
    """The defect: it keeps packed copies of old weights."""

    def forget_packed(self):
        pass


def draw(step, shape):
    return np.random.default_rng([step, *shape]).standard_normal(shape).astype(np.float32)


def move(head, step):
    """New weights, in the place of the old ones."""
    for parameter in head.parameters():
        parameter.update(jt.array(draw(step, tuple(parameter.shape))))


def begin(decay=0.9, kind=TwoLayers):
    head = kind()
    return head, Average(dict(head.named_parameters()), decay, head)


def values(head):
    return {name: p.numpy().copy() for name, p in head.named_parameters()}


def averaged(average):
    with average.swapped():
        return values(average.head)


def test_the_average_is_that_of_numpy_with_its_correction_of_the_first_updates():
    head, average = begin(decay=0.25)
    want = {name: value.astype(np.float64) for name, value in values(head).items()}
    for step in range(1, 6):
        move(head, step)
        average.update()
        # (1 + n) / (10 + n) is 2/11, 3/12 and from then on more than 0.25
        decay = {1: 2 / 11}.get(step, 0.25)
        for name in want:
            want[name] = decay * want[name] + (1 - decay) * draw(step, want[name].shape)
    got = averaged(average)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-6)
        assert np.abs(got[name] - draw(5, want[name].shape)).max() > 1e-2


def test_the_weights_are_restored_exactly_even_after_an_exception():
    head, average = begin()
    move(head, 1)
    average.update()
    weights, averages = values(head), averaged(average)
    for fails in (False, True):
        try:
            with average.swapped():
                for name, value in values(head).items():
                    np.testing.assert_array_equal(value, averages[name])
                    assert not np.array_equal(value, weights[name])
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        for name, value in values(head).items():
            np.testing.assert_array_equal(value, weights[name])
        for name, value in averaged(average).items():
            np.testing.assert_array_equal(value, averages[name])


def scores_change(kind):
    """Whether a head in evaluation computes with the averages inside and with its own weights again outside."""
    head, average = begin(kind=kind)
    move(head, 1)
    average.update()
    head.eval()
    x = draw(9, (4, 16))

    def by_numpy():
        now = values(head)
        inner = x @ now["first.weight"].T + now["first.bias"]
        return inner @ now["second.weight"].T + now["second.bias"]

    def right():
        return np.allclose(head(jt.array(x)).numpy(), by_numpy(), atol=1e-4)

    before = right()
    with average.swapped():
        inside = right()
    return before, inside, right()


def test_packed_copies_follow_the_weights_in_and_out():
    assert scores_change(TwoLayers) == (True, True, True)
    assert scores_change(Forgetful) == (True, False, True)  # control


def test_values_computed_before_the_exchange_do_not_change():
    head, average = begin()
    move(head, 1)
    weights = values(head)
    waiting = {name: p * 2 for name, p in head.named_parameters()}  # not computed yet
    with average.swapped():
        inside = {name: p * 2 for name, p in head.named_parameters()}
        averages = values(head)
    for name in weights:
        np.testing.assert_array_equal(waiting[name].numpy(), weights[name] * 2)
        np.testing.assert_array_equal(inside[name].numpy(), averages[name] * 2)
        assert not np.array_equal(averages[name], weights[name])


def test_parameters_still_have_gradients_and_no_graph_is_left_behind():
    head, average = begin()
    counts = []
    for step in range(1, 4):
        move(head, step)
        average.update()
        with average.swapped():
            pass
        jt.sync_all()
        counts.append((jt.core.number_of_lived_vars(), jt.core.number_of_lived_ops()))
    assert counts[0] == counts[1] == counts[2]
    weight = head.first.weight
    np.testing.assert_allclose(jt.grad((weight * weight).sum(), weight).numpy(), 2 * weight.numpy(), rtol=1e-6)
