"""What a training loss over large vocabularies takes, for ``bench/losses.py``: all logits of all heads at once, or a
chunk of rows at a time.

Each side runs in a separate process that records its peak memory after inputs and weights are in place:
``beyond_bytes`` is that peak minus what the process held before and minus the gradients of the weights.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import runtime
from bench.clock.memory import available_memory, peak_rss, reset_peak, rss, run_apart
from bench.clock.timing import interleave, spread_ms
from ops.linear_loss import linear_cross_entropy
from ops.training import cross_entropy, trainable_linear
from runtime import jt
from runtime.atomic import check_writable
from runtime.files.documents import parse_json, to_json
from runtime.options import option
from runtime.types import Var

SIDES = ("full", "chunked")
SAMPLE = 4096  # numbers of each gradient that two processes compare
TOLERANCE = 1e-4  # of a gradient's largest number: float32 sums in two orders


@dataclass
class Problem:
    """The sizes of a loss."""

    heads: int = option(5, "language-model heads", metavar="N", least=1)
    vocab: int = option(4096, "tokens that each scores", metavar="N", least=1)
    width: int = option(256, "size of a hidden state", metavar="N", least=1)
    positions: int = option(1000, "rows of each head", metavar="N", least=1)
    shared: bool = option(False, "one weight for all heads, instead of one each")
    frozen: bool = option(False, "the weights get no gradient")


@dataclass
class LossOptions(Problem):
    """The options of bench/losses.py."""

    repeats: int = option(20, "timed turns", metavar="N", least=0)
    out: str | None = option(None, "write the JSON here too", metavar="FILE")

    @property
    def problem(self) -> Problem:
        """The sizes alone."""
        return Problem(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Problem)})

    def check(self) -> None:
        """Raises OSError for an ``out`` that cannot be written."""
        if self.out:
            check_writable(self.out)


class Side:
    """One way to compute the loss and its gradients, on random hidden states, weights and labels of a fixed seed."""

    def __init__(self, name: str, problem: Problem):
        self.name, self.problem = name, problem
        random = np.random.default_rng(0)
        p = problem

        def normal(rows, scale):
            var = jt.array(random.standard_normal((rows, p.width), dtype=np.float32) * np.float32(scale))
            var.sync(True)
            return var

        self.hidden = [normal(p.positions, 1.0) for _ in range(p.heads)]
        self.weights = [normal(p.vocab, p.width**-0.5) for _ in range(1 if p.shared else p.heads)]
        if p.frozen:
            self.weights = [weight.stop_grad() for weight in self.weights]
        labels = random.integers(0, p.vocab, (p.heads, p.positions)).astype(np.int32)
        labels[random.random(labels.shape) < 0.05] = -100  # as ends of replies have none
        self.labels = labels
        self.row_weights = np.full(p.positions, 1 / p.positions / p.heads, np.float32)

    def weight(self, head: int) -> Var:
        return self.weights[0 if self.problem.shared else head]

    def total(self) -> Var:
        """The loss of all heads, a scalar."""
        total = 0
        if self.name == "full":
            for i, (hidden, labels) in enumerate(zip(self.hidden, self.labels, strict=True)):
                product = jt.nn.matmul_transpose if self.problem.frozen else trainable_linear
                losses, _ = cross_entropy(product(hidden, self.weight(i)), jt.array(labels))
                total = total + losses.sum() * float(self.row_weights[0])
            return total
        if self.problem.shared:
            known = jt.array(self.labels.reshape(-1)), jt.array(np.tile(self.row_weights, self.problem.heads))
            return linear_cross_entropy([(list(self.hidden), self.weights[0])], *known)[0]
        for i, (hidden, labels) in enumerate(zip(self.hidden, self.labels, strict=True)):
            known = jt.array(labels), jt.array(self.row_weights)
            total = total + linear_cross_entropy([(hidden, self.weight(i))], *known)[0]
        return total

    def gradients(self) -> list[Var]:
        """Of the hidden states and of the trained weights; waits for them and for the loss."""
        total = self.total()
        grads = jt.grad(total, [*self.hidden, *([] if self.problem.frozen else self.weights)])
        jt.sync([total, *grads])
        return grads


def sample(grad: Var) -> list[float]:
    """Numbers of a gradient at places that depend on its size alone."""
    flat = grad.numpy().reshape(-1)
    return flat[np.random.default_rng(0).integers(0, flat.size, SAMPLE)].tolist()


def weigh(name: str, problem: Problem) -> dict[str, Any]:
    """Memory and time of one loss with gradients, in this process; kernels are compiled at a small size before."""
    small = dataclasses.replace(problem, vocab=128, width=16, positions=16)
    Side(name, small).gradients()
    side = Side(name, problem)
    jt.sync_all()
    jt.gc()
    before, known = rss(), reset_peak()
    start = time.perf_counter()
    grads = side.gradients()
    seconds, peak = time.perf_counter() - start, peak_rss() if known else None
    weight_gradients = sum(4 * int(grad.numel()) for grad in grads[problem.heads :])
    return {
        "before_bytes": before,
        "peak_bytes": peak,
        "weight_gradient_bytes": weight_gradients,
        "beyond_bytes": None if peak is None else max(0, peak - before - weight_gradients),
        "first_call_s": seconds,
        "sample": [sample(grad) for grad in grads],
    }


def times(problem: Problem, repeats: int) -> dict[str, dict]:
    """Milliseconds of a loss with gradients, the sides timed in turns."""
    sides: dict[str, Callable] = {name: Side(name, problem).gradients for name in SIDES}
    seconds = interleave({name: lambda f=f: f() and None for name, f in sides.items()}, repeats)
    return {name: spread_ms(each) for name, each in seconds.items()}


def compare(problem: Problem, repeats: int) -> dict:
    """Both sides' memory and time, and whether their gradients agree. repeats: 0 leaves the time out."""
    free = available_memory()
    task, what = dataclasses.asdict(problem), "measuring the loss {}"
    sides = {name: run_apart("bench.clock.losses", {"name": name, **task}, what.format(name)) for name in SIDES}
    full, chunked = (np.array(sides[name].pop("sample")) for name in SIDES)
    gap = float((np.abs(full - chunked).max(1) / np.abs(full).max(1)).max())
    peaks = [sides[name]["beyond_bytes"] for name in SIDES]
    timed = times(problem, repeats) if repeats else None
    return {
        "schema_version": 1,
        "kind": "losses",
        "provenance": runtime.provenance(0),
        "problem": dataclasses.asdict(problem),
        "available_memory_bytes": free,
        **sides,
        "memory_ratio": None if None in peaks else peaks[0] / max(1, peaks[1]),
        "gradient_gap": gap,
        "gradients_agree": gap < TOLERANCE,
        "loss_and_gradients": timed,
        "time_ratio": timed and timed["chunked"]["ms"] / timed["full"]["ms"],
    }


if __name__ == "__main__":
    task = parse_json(sys.argv[1], "the task")
    print(to_json(weigh(task.pop("name"), Problem(**task))))
