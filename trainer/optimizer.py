"""AdamW with a warm-up and cosine schedule, and clipping by the norm of all gradients."""

from __future__ import annotations

import math

from ops.training import adamw, squared_norm
from runtime import jt


def learning_rate(step: int, num_steps: int, peak: float, warmup: float, final: float) -> float:
    """Rate of update ``step`` (0-based): rises linearly over ``warmup * num_steps`` updates, then falls along half a
    cosine to ``final * peak`` at the last."""
    rising = max(1, round(warmup * num_steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising + 1) / max(1, num_steps - rising)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class AdamW:
    """AdamW (arXiv 1711.05101) over float32 parameters, updated in place. Matrices decay, vectors do not.

    rates: what the learning rate is multiplied with, one number per parameter; default: 1.
    """

    def __init__(
        self,
        parameters: list,
        *,
        beta1: float,
        beta2: float,
        weight_decay: float,
        clip: float,
        rates: list[float] | None = None,
    ):
        self.parameters, self.steps = parameters, 0
        self.rates = rates or [1.0] * len(parameters)
        self.beta1, self.beta2, self.weight_decay, self.clip = beta1, beta2, weight_decay, clip
        self.means = [jt.zeros(tuple(p.shape)) for p in parameters]
        self.squares = [jt.zeros(tuple(p.shape)) for p in parameters]
        jt.sync_all()

    def update(self, loss, rate: float) -> float:
        """One update from the gradients of ``loss``; returns their norm before clipping.

        Raises FloatingPointError for a gradient that is not finite, and changes nothing then.
        """
        grads = jt.grad(loss, self.parameters)
        norm = math.sqrt(squared_norm(grads))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {self.steps}; lower the learning rate")
        scale = self.clip / norm if self.clip and norm > self.clip else 1.0
        self.steps += 1
        states = zip(self.parameters, grads, self.means, self.squares, self.rates, strict=True)
        for weight, grad, mean, square, multiple in states:
            adamw(
                weight,
                grad,
                mean,
                square,
                rate=rate * multiple,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=1e-8,
                weight_decay=self.weight_decay if len(weight.shape) > 1 else 0.0,
                scale=scale,
                step=self.steps,
            )
        return norm
