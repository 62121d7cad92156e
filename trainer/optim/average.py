"""A moving average of the weights, which often scores better than the weights of any one step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np

from ops.optimizer import exchange, move_average
from runtime import jt
from trainer.optim.optimizer import check_state

UPDATES = "updates"  # of Average.state


class Average:
    """Exponential moving average: average = d average + (1 - d) weight after every optimizer step.

    d = min(decay, (1 + n) / (10 + n)) at the n-th update, counted from 1, so that the first weights are soon forgotten
    (``num_updates`` of TensorFlow's ``tf.train.ExponentialMovingAverage``). It begins as the weights themselves.

    parameters: float32 Vars by name; head: whose packed copies of its weights are dropped when others move in.
    """

    def __init__(self, parameters: Mapping[str, object], decay: float, head):
        assert 0 <= decay < 1, decay
        self.parameters, self.decay, self.head = dict(parameters), decay, head
        self.updates, self._swapped = 0, False
        # Copies, on the device: the parameters are updated in place.
        self.averages = {name: p.copy().stop_grad() for name, p in self.parameters.items()}
        jt.sync_all()

    def update(self) -> None:
        """Take in the weights as they are now; called after every optimizer step."""
        assert not self._swapped, "the averages are in the parameters' place"
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.parameters.items():
            move_average(self.averages[name], parameter, decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the parameters hold the averages, to be scored and saved; afterwards their own values again, bit for
        bit, also behind an exception."""
        assert not self._swapped, "the averages are in the parameters' place already"
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        jt.sync_all()  # whatever still waits to read the values that leave
        for name, parameter in self.parameters.items():
            exchange(parameter, self.averages[name])
        self.head.forget_packed()
        self._swapped = not self._swapped

    def state(self) -> dict[str, np.ndarray]:
        """Everything that going on bit for bit needs: the averages by parameter and the number of updates."""
        assert not self._swapped, "the averages are in the parameters' place"
        averages = {f"average.{name}": average.numpy() for name, average in self.averages.items()}
        return {UPDATES: np.array(self.updates, np.int64), **averages}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what ``state`` gave. Raises ValueError, and has changed nothing then, for other names or shapes."""
        assert not self._swapped, "the averages are in the parameters' place"
        shapes = {f"average.{name}": tuple(p.shape) for name, p in self.parameters.items()}
        check_state("the average of the weights", state, shapes, UPDATES)
        self.updates = int(state[UPDATES])
        self.averages = {name: jt.array(state[f"average.{name}"]).stop_grad() for name in self.parameters}
        jt.sync_all()
