"""The optimizers: AdamW, Lion and Muon, with clipping by the norm of all gradients.

Each takes gradients that are already accumulated and reduced, so that an update is an update: bias correction counts
those, however many passes or ranks the gradients came from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import numpy as np

from ops.optimizer import adamw, lion, muon, squared_norm
from runtime import jt
from trainer.config import TrainConfig

STEPS = "steps"  # of Optimizer.state


class NonFinite(FloatingPointError):
    """A gradient holds a NaN or an infinity; nothing was changed."""


def gradient_norm(grads: Sequence) -> float:
    """The norm of all gradients together, float32 Vars, in double precision; NaN or infinite where one of their numbers
    is. The kernels cannot be asked for that: they are compiled for numbers that are finite."""
    return math.sqrt(squared_norm(grads))


def check_state(owner: str, state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple], counter: str) -> None:
    """Raises ValueError, naming every entry, unless ``state`` holds float32 arrays of exactly these names and shapes
    and an int64 scalar ``counter``."""
    wrong = [f"missing {name}" for name in (*shapes, counter) if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in shapes and name != counter]
    for name, shape in shapes.items():
        if name in state and (state[name].shape != shape or state[name].dtype != np.float32):
            wrong.append(f"{name} is {state[name].dtype} {state[name].shape}, expected float32 {shape}")
    if counter in state:
        steps = state[counter]
        if steps.shape != () or steps.dtype != np.int64 or steps < 0:
            wrong.append(f"{counter} is {steps.dtype} {steps!r}, expected one int64 of at least 0")
    if wrong:
        raise ValueError(
            f"the state does not fit {owner}: {'; '.join(wrong)}. Go on with the options that the state was made with, "
            "or start anew"
        )


class Optimizer:
    """What the optimizers share: clipping, the test for gradients that are not finite, and the state.

    parameters: float32 Vars by name, updated in place; rates: what the learning rate is multiplied with, by the same
    names. Matrices decay (``config.weight_decay``), vectors do not. ``steps`` counts updates.
    """

    slots: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: TrainConfig, parameters: Mapping[str, object], rates: Mapping[str, float]):
        assert parameters.keys() == rates.keys(), set(parameters) ^ set(rates)
        assert all(p.dtype == "float32" for p in parameters.values()), {n: str(p.dtype) for n, p in parameters.items()}
        self.config, self.parameters, self.rates, self.steps = config, dict(parameters), dict(rates), 0
        self.moments = {
            f"{slot}.{name}": jt.zeros(tuple(p.shape)).stop_grad()
            for name, p in self.parameters.items()
            for slot in self.slots_of(p)
        }
        jt.sync_all()

    def slots_of(self, parameter) -> tuple[str, ...]:
        """What is kept of a parameter from update to update, each of the parameter's shape."""
        return self.slots

    def update(self, grads: list, rate: float) -> float:
        """One update; returns the norm of all gradients before clipping.

        grads: float32 Vars in the order of the parameters. Raises NonFinite, and has changed nothing then, where one
        of them is not finite.
        """
        shapes = [tuple(p.shape) for p in self.parameters.values()]
        assert [tuple(g.shape) for g in grads] == shapes, ([tuple(g.shape) for g in grads], shapes)
        norm = gradient_norm(grads)
        if not math.isfinite(norm):
            pairs = zip(self.parameters, grads, strict=True)
            bad = [name for name, grad in pairs if not math.isfinite(gradient_norm([grad]))]
            shown = ", ".join(bad[:3]) + (" .." if len(bad) > 3 else "")
            raise NonFinite(f"the gradient is not finite ({shown})")
        clip = self.config.clip
        scale = clip / norm if clip and norm > clip else 1.0
        jt.sync_all()  # whatever still waits to read the old weights
        self.steps += 1
        for (name, weight), grad in zip(self.parameters.items(), grads, strict=True):
            decay = self.config.weight_decay if len(weight.shape) > 1 else 0.0
            moments = [self.moments[f"{slot}.{name}"] for slot in self.slots_of(weight)]
            self.apply(weight, grad, moments, rate=rate * self.rates[name], weight_decay=decay, scale=scale)
        return norm

    def apply(self, weight, grad, moments: list, *, rate: float, weight_decay: float, scale: float) -> None:
        """Update one parameter and its moments in place; the gradient counts ``scale`` times."""
        raise TypeError(f"{type(self).__name__} does not define apply")

    def state(self) -> dict[str, np.ndarray]:
        """Everything that going on bit for bit needs: moments as ``slot.parameter`` and the number of updates."""
        moments = {name: moment.numpy() for name, moment in self.moments.items()}
        return {STEPS: np.array(self.steps, np.int64), **moments}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what ``state`` gave. Raises ValueError, and has changed nothing then, for other names or shapes."""
        shapes = {name: tuple(moment.shape) for name, moment in self.moments.items()}
        check_state(f"the {self.config.optimizer} optimizer", state, shapes, STEPS)
        self.steps = int(state[STEPS])
        self.moments = {name: jt.array(state[name]).stop_grad() for name in self.moments}
        jt.sync_all()


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101)."""

    slots = ("mean", "square")

    def apply(self, weight, grad, moments, *, rate, weight_decay, scale):
        config = self.config
        options = dict(beta1=config.beta1, beta2=config.beta2, eps=1e-8, step=self.steps)
        adamw(weight, grad, *moments, rate=rate, weight_decay=weight_decay, scale=scale, **options)


class Lion(Optimizer):
    """Lion (arXiv 2302.06675): steps by the sign of a mix of momentum and gradient. Its authors take a tenth to a third
    of AdamW's learning rate, and a weight decay as many times larger."""

    slots = ("momentum",)

    def apply(self, weight, grad, moments, *, rate, weight_decay, scale):
        betas = dict(beta1=self.config.beta1, beta2=self.config.beta2)
        lion(weight, grad, *moments, rate=rate, weight_decay=weight_decay, scale=scale, **betas)


class Muon(AdamW):
    """Muon (K. Jordan et al., 2024; arXiv 2502.16982) for hidden matrices, AdamW for everything else.

    Which is told by shape: a parameter of two dimensions, neither of which is a vocabulary, is a hidden matrix;
    embeddings and language-model heads, vectors and anything of three dimensions go by AdamW. Muon's updates are
    scaled to the size of AdamW's, so one learning rate serves both. ``config.beta1`` is the momentum.

    vocab_sizes: the sizes of the vocabularies that a parameter may range over, the backbone's and a head's own.
    """

    def __init__(self, config, parameters, rates, vocab_sizes: Collection[int]):
        self.vocab_sizes = frozenset(vocab_sizes)
        super().__init__(config, parameters, rates)

    def is_hidden(self, parameter) -> bool:
        """Whether a parameter goes by Muon."""
        return len(parameter.shape) == 2 and not self.vocab_sizes.intersection(parameter.shape)

    def slots_of(self, parameter):
        return ("momentum",) if self.is_hidden(parameter) else self.slots

    def apply(self, weight, grad, moments, *, rate, weight_decay, scale):
        if not self.is_hidden(weight):
            super().apply(weight, grad, moments, rate=rate, weight_decay=weight_decay, scale=scale)
            return
        muon(weight, grad, *moments, rate=rate, beta=self.config.beta1, weight_decay=weight_decay, scale=scale)


def make_optimizer(
    config: TrainConfig,
    parameters: Mapping[str, object],
    rates: Mapping[str, float],
    vocab_sizes: Collection[int] = (),
) -> Optimizer:
    """The optimizer that ``config.optimizer`` names, over these parameters by name.

    rates: what the learning rate is multiplied with, by parameter; vocab_sizes: see ``Muon``, which needs them.
    """
    if config.optimizer == "muon":
        assert vocab_sizes, "muon tells hidden matrices from language-model heads by the sizes of the vocabularies"
        return Muon(config, parameters, rates, vocab_sizes)
    return {"adamw": AdamW, "lion": Lion}[config.optimizer](config, parameters, rates)
