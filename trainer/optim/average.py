"""A moving average of the weights, which often scores better than the weights of a single step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np

from ops.optimizer import exchange, move_average
from runtime import jt
from runtime.types import Var
from trainer.optim.optimizer import check_state

UPDATES = "updates"  # of Average.state


class Average:
    """Exponential moving average: average = d average + (1 - d) weight after every optimizer step.

    d = min(decay, (1 + n) / (10 + n)) at the n-th update, counted from 1, so that the initial weights soon fade
    (``num_updates`` of TensorFlow's ``tf.train.ExponentialMovingAverage``). It starts as the weights.

    parameters: float32 Vars by name; head: whose packed copies of its weights are dropped when the weights change.
    """

    def __init__(self, parameters: Mapping[str, Var], decay: float, head):
        assert 0 <= decay < 1, decay
        self.parameters, self.decay, self.head = dict(parameters), decay, head
        self.updates, self._swapped = 0, False
        # Copies, on the device: the parameters are updated in place.
        self.averages = {name: p.copy().stop_grad() for name, p in self.parameters.items()}
        jt.sync_all()

    def update(self) -> None:
        """Average in the current weights; called after every optimizer step."""
        assert not self._swapped, "the averages are in the parameters"
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.parameters.items():
            move_average(self.averages[name], parameter, decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the parameters hold the averages, to be scored and saved; afterwards, even after an exception, their
        own values exactly."""
        assert not self._swapped, "the averages are already in the parameters"
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        jt.sync_all()  # operations that have yet to read the old values
        for name, parameter in self.parameters.items():
            exchange(parameter, self.averages[name])
        self.head.forget_packed()
        self._swapped = not self._swapped

    def state(self) -> dict[str, np.ndarray]:
        """All that an exact resumption needs: the averages by parameter and the number of updates."""
        assert not self._swapped, "the averages are in the parameters"
        averages = {f"average.{name}": average.numpy() for name, average in self.averages.items()}
        return {UPDATES: np.array(self.updates, np.int64), **averages}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state`` gave. Raises ValueError for other names or shapes, and has then changed nothing."""
        assert not self._swapped, "the averages are in the parameters"
        shapes = {f"average.{name}": tuple(p.shape) for name, p in self.parameters.items()}
        check_state("the average of the weights", state, shapes, UPDATES)
        self.updates = int(state[UPDATES])
        self.averages = {name: jt.array(state[f"average.{name}"]).stop_grad() for name in self.parameters}
        jt.sync_all()
