"""The optimizers: AdamW, Lion and Muon, with clipping by the norm of all gradients.

They are given gradients that are already accumulated and reduced, so that bias correction counts updates, however many
passes or ranks the gradients come from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import numpy as np

from ops.optimizer import adamw, lion, muon, squared_norm
from runtime import jt
from runtime.types import Var
from trainer.config import TrainConfig

STEPS = "steps"  # of Optimizer.state


class NonFinite(FloatingPointError):
    """A gradient holds a NaN or an infinity; nothing was changed."""


def gradient_norm(grads: Sequence[Var]) -> float:
    """The norm of all gradients together, float32 Vars, in double precision; NaN or infinite where one of their numbers
    is. The update kernels cannot tell: they are compiled for finite numbers."""
    return math.sqrt(squared_norm(grads))


def check_state(owner: str, state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple], counter: str) -> None:
    """Raises ValueError, naming every entry that differs, unless ``state`` holds float32 arrays of exactly these names
    and shapes and an int64 scalar ``counter``."""
    expected = {counter: "int64 ()", **{name: f"float32 {shape}" for name, shape in shapes.items()}}
    found = {name: f"{array.dtype} {array.shape}" for name, array in state.items()}
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    wrong = [f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}" for name in names]
    if wrong:
        raise ValueError(
            f"the state does not fit {owner}: {'; '.join(wrong)}. Resume with the options that the state was made "
            "with, or start over"
        )


class Optimizer:
    """What the optimizers share: clipping, the check that gradients are finite, and the state.

    parameters: float32 Vars by name, updated in place; rates: multiples of the learning rate, by the same names;
    vocab_sizes: see ``Muon``. Matrices decay (``config.weight_decay``), vectors do not. ``steps`` counts updates.
    """

    slots: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: TrainConfig,
        parameters: Mapping[str, Var],
        rates: Mapping[str, float],
        vocab_sizes: Collection[int],
    ):
        assert parameters.keys() == rates.keys(), set(parameters) ^ set(rates)
        assert all(p.dtype == "float32" for p in parameters.values()), {n: str(p.dtype) for n, p in parameters.items()}
        self.config, self.parameters, self.rates, self.steps = config, dict(parameters), dict(rates), 0
        self.vocab_sizes = frozenset(vocab_sizes)
        self.moments = {
            f"{slot}.{name}": jt.zeros(tuple(p.shape)).stop_grad()
            for name, p in self.parameters.items()
            for slot in self.slots_of(p.shape, self.vocab_sizes)
        }
        jt.sync_all()

    @classmethod
    def slots_of(cls, shape: Sequence[int], vocab_sizes: Collection[int]) -> tuple[str, ...]:
        """The moments of a parameter of this shape; each has the parameter's shape."""
        return cls.slots

    def update(self, grads: list[Var], rate: float) -> float:
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
        jt.sync_all()  # operations that have yet to read the old weights
        self.steps += 1
        for (name, weight), grad in zip(self.parameters.items(), grads, strict=True):
            decay = self.config.weight_decay if len(weight.shape) > 1 else 0.0
            moments = [self.moments[f"{slot}.{name}"] for slot in self.slots_of(weight.shape, self.vocab_sizes)]
            self.apply(weight, grad, moments, rate=rate * self.rates[name], weight_decay=decay, scale=scale)
        return norm

    def apply(self, weight: Var, grad: Var, moments: list[Var], *, rate: float, weight_decay: float, scale: float):
        """Update one parameter and its moments in place, with ``scale`` times the gradient."""
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        """All that an exact resumption needs: moments as ``slot.parameter`` and the number of updates."""
        moments = {name: moment.numpy() for name, moment in self.moments.items()}
        return {STEPS: np.array(self.steps, np.int64), **moments}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state`` gave. Raises ValueError for other names or shapes, and has then changed nothing."""
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
    """Lion (arXiv 2302.06675): steps by the sign of a mix of momentum and gradient. Its authors use a tenth to a third
    of AdamW's learning rate, and a weight decay larger by the same factor."""

    slots = ("momentum",)

    def apply(self, weight, grad, moments, *, rate, weight_decay, scale):
        betas = dict(beta1=self.config.beta1, beta2=self.config.beta2)
        lion(weight, grad, *moments, rate=rate, weight_decay=weight_decay, scale=scale, **betas)


class Muon(AdamW):
    """Muon (K. Jordan et al., 2024; arXiv 2502.16982) for hidden matrices, AdamW for everything else.

    A parameter of two dimensions, neither of which is a vocabulary, is a hidden matrix; embeddings and language-model
    heads, vectors and parameters of three dimensions are updated by AdamW. Muon's updates are scaled to the size of
    AdamW's, so one learning rate serves both. ``config.beta1`` is the momentum.

    vocab_sizes: sizes of the vocabularies that a parameter may range over, the backbone's and a head's own.
    """

    @classmethod
    def slots_of(cls, shape, vocab_sizes):
        hidden = len(shape) == 2 and not set(vocab_sizes).intersection(shape)
        return ("momentum",) if hidden else cls.slots

    def apply(self, weight, grad, moments, *, rate, weight_decay, scale):
        if len(moments) > 1:
            super().apply(weight, grad, moments, rate=rate, weight_decay=weight_decay, scale=scale)
            return
        muon(weight, grad, *moments, rate=rate, beta=self.config.beta1, weight_decay=weight_decay, scale=scale)


OPTIMIZERS = {"adamw": AdamW, "lion": Lion, "muon": Muon}
