"""A training that goes on by as many steps as it is told, in a process of its own: ours or PyTorch's.

Each brings an OpenMP library that all kernels of a process share, and a peak of memory is a process's. The first line
on stdin is the task as JSON; every further one is a number of steps, answered with one line of JSON on stdout once they
are done: {"seconds", "tokens", "losses" (of the last step, per depth), "peak_bytes" (of these steps)}.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from bench.measure.gauges import peak_rss, reset_peak
from runtime.interrupt import check_interrupt
from trainer.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
QUIET_S = 0.05  # after an answer: by then the threads of that process sleep and take nothing from the next


class Done(Exception):
    """Nobody asks for further steps."""


class Rounds:
    """Answers for the steps of a training. lines: what is asked for; answer: takes each answer."""

    def __init__(self, lines: Iterator[str], answer: Callable[[dict], None]):
        self.lines, self.answer = lines, answer

    def wait(self) -> None:
        """Wait until steps are asked for. Raises Done when none will be."""
        line = next(self.lines, None)
        if line is None:
            raise Done
        self.left, self.tokens = int(line), 0
        self.known = reset_peak()
        self.start = time.perf_counter()

    def step(self, tokens: int, losses: list[float]) -> None:
        """A step was done. Raises Done as ``wait`` does."""
        self.left, self.tokens = self.left - 1, self.tokens + tokens
        if self.left:
            return
        seconds, peak = time.perf_counter() - self.start, peak_rss() if self.known else None
        self.answer({"seconds": seconds, "tokens": self.tokens, "losses": losses, "peak_bytes": peak})
        self.wait()


# Ours -----------------------------------------------------------------------------------------------------------------


def train_ours(task: Mapping, rounds: Rounds) -> None:
    """Our trainer's own loop, with all that it does beside the steps but scoring and saving.

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
    told = 0

    def progress(step: int, num_steps: int, record: dict) -> None:
        nonlocal told
        runtime.synchronize()
        rounds.step(record["tokens"] - told, record.get("loss", []))
        told = record["tokens"]

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
    """The asking end. ``ready``: what the process said of itself; ``answers``: every answer since."""

    def __init__(self, side: str, task: Mapping, environment: Mapping[str, str]):
        """environment: of the process, whole. Raises RuntimeError when it does not get as far as the first step."""
        command = [sys.executable, "-m", "bench.peers.train_process", side]
        settings = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        settings["start_new_session"] = True  # Ctrl-C is for who asks, between two turns
        self._process = subprocess.Popen(command, env=dict(environment), **settings)
        self.ready, self.answers = self._ask(json.dumps(task)), []

    def steps(self, count: int) -> dict:
        """Go on by so many steps; Ctrl-C takes effect when they are done. Raises RuntimeError when the process ends
        meanwhile."""
        answer = self._ask(str(count))
        self.answers.append(answer)
        check_interrupt()
        time.sleep(QUIET_S)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, line: str) -> dict:
        try:
            print(line, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.stdout.close()
            raise RuntimeError(f"the training process left with status {self._process.wait()}")
        return json.loads(answer)


def main() -> None:
    """Do the task on stdin for the side in the first argument."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    rounds = Rounds(iter(sys.stdin.readline, ""), lambda answer: print(json.dumps(answer), file=answers, flush=True))
    task = json.loads(next(rounds.lines))
    with contextlib.suppress(Done):
        SIDES[sys.argv[1]](task, rounds)


if __name__ == "__main__":
    main()
