"""What a training loss over large vocabularies takes: all logits of all heads at once, or a chunk of rows at a time.

    python bench/losses.py --heads 5 --vocab 32000 --width 4096 --positions 2048 --shared --repeats 0

Each side runs in a process of its own, which notes the largest memory that it held (VmHWM of /proc/self/status, reset
once inputs and weights lie there): ``beyond_bytes`` is that less what the process held before and less the gradients of
the weights. Then both take turns in one process, ``--repeats`` times, where 0 leaves that out. Run it on a quiet
machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from bench.measure.gauges import available_memory, interleave, peak_rss, reset_peak, rss, spread_ms
from bench.record.schema import check_writable, write_atomically
from ops.linear_loss import linear_cross_entropy
from ops.training import cross_entropy, trainable_linear
from runtime import jt
from runtime.entry import Parser, run_entry

SIDES = ("full", "chunked")
SAMPLE = 4096  # numbers of each gradient by which two processes compare theirs
TOLERANCE = 1e-4  # of a gradient's largest number: float32 sums in two orders


@dataclass
class Problem:
    """heads: language-model heads of one head each; shared: one for all of them; frozen: they get no gradient."""

    heads: int
    vocab: int
    width: int
    positions: int
    shared: bool
    frozen: bool


class Side:
    """One way to the loss and its gradients, on random hidden states, weights and labels that the seed fixes."""

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

    def weight(self, head: int):
        return self.weights[0 if self.problem.shared else head]

    def total(self):
        """The loss of all heads, as a graph."""
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

    def gradients(self) -> list:
        """Of the hidden states and of the weights that are trained; waits for them and for the loss."""
        total = self.total()
        grads = jt.grad(total, [*self.hidden, *([] if self.problem.frozen else self.weights)])
        jt.sync([total, *grads])
        return grads


def sample(grad) -> list[float]:
    """Numbers of a gradient at places that its size fixes, without another copy of it."""
    flat = grad.numpy().reshape(-1)
    return flat[np.random.default_rng(0).integers(0, flat.size, SAMPLE)].tolist()


def weigh(name: str, problem: Problem) -> dict:
    """Memory and time of one loss with gradients, of this process; the kernels are compiled at a small size before."""
    small = dataclasses.replace(problem, vocab=128, width=16, positions=16)
    Side(name, small).gradients()
    side = Side(name, problem)
    jt.sync_all()
    jt.gc()
    before, known = rss(), reset_peak()
    start = time.perf_counter()
    grads = side.gradients()
    seconds, peak = time.perf_counter() - start, peak_rss() if known else None
    held = sum(4 * int(grad.numel()) for grad in grads[problem.heads :])
    return {
        "before_bytes": before,
        "peak_bytes": peak,
        "weight_gradient_bytes": held,
        "beyond_bytes": None if peak is None else max(0, peak - before - held),
        "first_call_s": seconds,
        "sample": [sample(grad) for grad in grads],
    }


def weigh_apart(name: str, problem: Problem) -> dict:
    """What ``weigh`` says in a process that holds nothing else. Raises ValueError when that process did not live."""
    command = [sys.executable, __file__, "--weigh", json.dumps({"name": name, **dataclasses.asdict(problem)})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"the process that measures {name} ended with {done.returncode}; is there enough memory?")
    return json.loads(done.stdout.splitlines()[-1])


def times(problem: Problem, repeats: int) -> dict[str, dict]:
    """Milliseconds of a loss with gradients, the sides taking turns."""
    sides: dict[str, Callable] = {name: Side(name, problem).gradients for name in SIDES}
    seconds = interleave({name: lambda f=f: f() and None for name, f in sides.items()}, repeats)
    return {name: spread_ms(each) for name, each in seconds.items()}


def compare(problem: Problem, repeats: int) -> dict:
    """Both sides' memory and time, and whether their gradients agree."""
    free = available_memory()
    sides = {name: weigh_apart(name, problem) for name in SIDES}
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


def main(arguments) -> int:
    """The command line."""
    parser = Parser(prog="bench/losses.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    sizes = {
        "heads": (5, "language-model heads"),
        "vocab": (4096, "tokens that each scores"),
        "width": (256, "numbers of a hidden state"),
        "positions": (1000, "rows of each head"),
    }
    for name, (default, meaning) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    parser.add_argument("--shared", action="store_true", help="one weight for all heads, instead of one each")
    parser.add_argument("--frozen", action="store_true", help="the weights get no gradient")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed turns (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    parser.add_argument("--weigh", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.weigh:
        task = json.loads(options.weigh)
        print(json.dumps(weigh(task.pop("name"), Problem(**task))))
        return 0
    for name in sizes:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.repeats < 0:
        raise ValueError(f"--repeats must be at least 0, got {options.repeats}")
    if options.out:
        check_writable(options.out)
    problem = Problem(**{name: getattr(options, name) for name in (*sizes, "shared", "frozen")})
    result = compare(problem, options.repeats)
    if options.out:
        write_atomically(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
