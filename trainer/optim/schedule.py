"""The learning rate of every update."""

from __future__ import annotations

import math

from trainer.config import SCHEDULES, TrainConfig


def rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """The learning rate of update ``step``, 0 to ``num_steps - 1``.

    It rises linearly over ``warmup * num_steps`` updates, at least one, the last of which is the first at the peak,
    ``learning_rate``. Then, by ``schedule``:

    cosine: along half a cosine to ``final_rate`` times the peak (arXiv 1608.03983, without restarts).
    linear: along a line to the same value.
    wsd: stays at the peak and falls along a line to the same value over the last ``decay_share * num_steps`` updates
        ("warm-up, stable, decay", arXiv 2404.06395, with the linear decay of arXiv 2405.18392). A share of 1 is linear.
    constant: stays at the peak.

    Ten updates, peak 1, warm-up 0.2, final rate 0, decay share 0.4:

        step     0    1    2     3     4     5     6     7     8     9
        linear   0.5  1    0.875 0.75  0.625 0.5   0.375 0.25  0.125 0
        wsd      0.5  1    1     1     1     1     0.75  0.5   0.25  0

    """
    kind, peak = config.schedule, config.learning_rate
    assert kind in SCHEDULES, kind
    rising = max(1, round(config.warmup * num_steps))
    if step < rising:
        return peak * (step + 1) / rising
    falling = num_steps - rising
    if kind == "constant" or (kind == "wsd" and not config.decay_share):
        falling = 0
    elif kind == "wsd":
        falling = min(falling, max(1, round(config.decay_share * num_steps)))
    if step < num_steps - falling:
        return peak
    progress = min(1.0, (step - (num_steps - falling) + 1) / max(1, falling))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return peak * (config.final_rate + (1 - config.final_rate) * share)
