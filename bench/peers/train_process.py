"""A training, ours or PyTorch's, that runs in a separate process by the number of steps it is asked for.

The first question is the task; every further one is a number of steps, answered once they are done: {"seconds",
"tokens", "losses" (of the last step, per depth), "peak_bytes" (of these steps)}.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from bench.clock.memory import peak_rss, reset_peak
from bench.peers.process import Child, serve
from runtime.interrupt import check_interrupt
from trainer.config import TrainConfig

QUIET_S = 0.05  # after an answer


class Done(Exception):
    """No further steps are asked for."""


class Rounds:
    """Counts the steps of a training, and answers. counts: the numbers of steps asked for; answer: takes each
    answer."""

    def __init__(self, counts: Iterator[int], answer: Callable[[dict], None]):
        self.counts, self.answer = counts, answer

    def wait(self) -> None:
        """Wait until steps are asked for. Raises Done if none will be."""
        count = next(self.counts, None)
        if count is None:
            raise Done
        self.left, self.tokens = count, 0
        self.has_peak = reset_peak()
        self.start = time.perf_counter()

    def step(self, tokens: int, losses: list[float]) -> None:
        """Count a finished step. Raises Done as ``wait`` does."""
        self.left, self.tokens = self.left - 1, self.tokens + tokens
        if self.left:
            return
        seconds, peak = time.perf_counter() - self.start, peak_rss() if self.has_peak else None
        self.answer({"seconds": seconds, "tokens": self.tokens, "losses": losses, "peak_bytes": peak})
        self.wait()


# Ours -----------------------------------------------------------------------------------------------------------------


def train_ours(task: Mapping, rounds: Rounds) -> None:
    """Our trainer's own loop, complete except for scoring and saving.

    task: config, the TrainConfig's fields; out: where the run's log goes.
    """
    import runtime
    from trainer.fit import Run, fit
    from trainer.report.watch import Watch
    from trainer.session import make_objective, open_sources, prepare

    config = TrainConfig(**task["config"])
    setting = prepare(config)
    sources = open_sources(setting, Watch(config.max_steps, quiet=True))
    out = Path(task["out"])
    out.mkdir(parents=True)
    counted = 0

    def progress(step: int, num_steps: int, record: dict) -> None:
        nonlocal counted
        runtime.synchronize()
        rounds.step(record["tokens"] - counted, record.get("loss", []))
        counted = record["tokens"]

    splits = setting.splits
    run = Run(config, setting.head, setting.base, out, setting.identity)
    rounds.answer({"ready": True})
    rounds.wait()
    fit(run, splits.training, splits.held_out, *sources, progress, make_objective(setting))


# PyTorch --------------------------------------------------------------------------------------------------------------


def train_torch(task: Mapping, rounds: Rounds) -> None:
    """PyTorch's training of the same head on the same text.

    task: config, the TrainConfig's fields; head_config: the head's options; directory: of the backbone; data: .npz of
    the text; weights: .safetensors of the initial weights; files: shards of the feature cache, None to run the backbone
    at every step; threads; chunked, compiled: see ``TorchTrainer``.
    """
    import torch
    from safetensors.torch import load_file

    from backbone.config import read_config
    from bench.peers.torch_heads import build_head
    from bench.peers.torch_trainer import (
        CachedFeatures,
        OnlineFeatures,
        TorchTrainer,
        adamw_trials_ms,
        frozen_weights,
    )
    from trainer.data.tokens import TokenizedData

    torch.set_num_threads(task["threads"])
    config, directory = TrainConfig(**task["config"]), Path(task["directory"])
    sizes = read_config(directory)
    with np.load(task["data"]) as stored:
        data = TokenizedData(**stored)
    head = build_head(config.head, task["head_config"], sizes, *frozen_weights(directory))
    head.load_state_dict(load_file(task["weights"]))
    if task["files"] is None:
        source = OnlineFeatures(directory)
    else:
        source = CachedFeatures(task["files"], sizes.hidden_size, data.offsets)
    trials = adamw_trials_ms(config, head)
    form = min(trials, key=trials.get)
    trainer = TorchTrainer(config, head, data, source, form, task["chunked"], task["compiled"])
    rounds.answer({"ready": True, "adamw": form, "adamw_trials_ms": trials})
    rounds.wait()
    while True:
        rounds.step(*trainer.step())


# The process ----------------------------------------------------------------------------------------------------------

SIDES = {"ours": train_ours, "torch": train_torch}


class TrainProcess:
    """A training in a separate process. ``ready``: what the process reported at first; ``answers``: all since."""

    def __init__(self, side: str, task: Mapping, environment: Mapping[str, str]):
        """environment: all of the process's. Raises RuntimeError if it does not reach its first step."""
        self.child = Child("bench.peers.train_process", side, environment=environment, quiet_s=QUIET_S)
        self.ready, self.answers = self.child.ask(task), []

    def steps(self, count: int) -> dict:
        """Train for this many steps; Ctrl-C takes effect when they are done. Raises RuntimeError if the process ends
        meanwhile."""
        answer = self.child.ask(count)
        self.answers.append(answer)
        check_interrupt()
        return answer

    def close(self) -> None:
        """End the process."""
        self.child.close()


if __name__ == "__main__":
    questions, answer = serve()
    task = next(questions)
    with contextlib.suppress(Done):
        SIDES[sys.argv[1]](task, Rounds(questions, answer))
