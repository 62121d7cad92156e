"""The training loop of every head: it scores, saves the best checkpoint, and saves states to resume from."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

import runtime
from heads.base import Stage
from heads.checkpoint import save_checkpoint, update_config
from runtime.atomic import naming, write_file
from runtime.files.documents import parse_json, to_json
from runtime.interrupt import acknowledge_interrupt, check_interrupt, deferred_interrupts
from trainer.config import TrainConfig
from trainer.data.tokens import TokenizedData, batches
from trainer.guard import save_bad_step
from trainer.loss import Objective
from trainer.optim.average import Average
from trainer.optim.optimizer import OPTIMIZERS, NonFinite, Optimizer
from trainer.optim.schedule import rate
from trainer.scoring import Score, own_tokens, score_head
from trainer.state import AVERAGE, OPTIMIZER, State, save_state
from trainer.step import gradients

LOG, CHECKPOINT = "log.jsonl", "checkpoint"
LOG_EVERY = 10  # steps between lines of the log
# Attributes of a run that a state stores, besides its best score and its seconds.
COUNTERS = ("step", "tokens", "skipped", "skipped_in_row", "best_step", "history", "sessions")


class _Pruned(Exception):
    """``on_score`` ended an unpromising run."""


@dataclass
class FitResult:
    """The result of a run. interrupted: Ctrl-C or a pruner ended it; skipped: updates; history, sessions: see
    ``trainer.report.record``."""

    best: Score
    best_step: int
    steps: int
    tokens: int
    train_s: float
    interrupted: bool
    skipped: int
    history: list[dict]
    sessions: list[dict]


class Run:
    """One training run: its counters, its log, its best score, and where checkpoints and states go.

    base_config: what a checkpoint stores besides the trainer's options and metrics; identity: what a state must have
    in common with the run that resumes it, see ``trainer.state.check_identity``; on_score(step, score) is called after
    every score and returns whether the run should end there.
    """

    def __init__(
        self,
        config: TrainConfig,
        head,
        base_config: dict,
        out: Path,
        identity: dict | None = None,
        on_score: Callable[[int, Score], bool] = lambda step, score: False,
    ):
        self.config, self.head, self.base_config, self.out = config, head, base_config, Path(out)
        self.identity = {} if identity is None else identity
        self.on_score = on_score
        self.best: Score | None = None
        self.best_step = self.step = self.tokens = self.skipped = self.skipped_in_row = 0
        self.history: list[dict] = []
        self.own: np.ndarray | None = None  # of the held-out text, see ``trainer.scoring.own_tokens``
        self.sessions = [{"first_step": 0, "last_step": 0, "provenance": runtime.provenance(config.seed)}]
        self.earlier_s, self.started = 0.0, time.perf_counter()
        self.average = Average(head.trainable(), config.ema, head) if config.ema and head.trained else None

    @property
    def train_s(self) -> float:
        """Seconds of training, those of earlier sessions included."""
        return self.earlier_s + time.perf_counter() - self.started

    def counters(self) -> dict:
        """What a state stores of the run, JSON-ready."""
        best = dataclasses.asdict(self.best) if self.best else None
        self.sessions[-1]["last_step"] = self.step
        return {name: getattr(self, name) for name in COUNTERS} | {"train_s": self.train_s, "best": best}

    def resume(self, state: State) -> None:
        """Restore a state, and remove later steps from the log."""
        counters = state.meta["progress"]
        state.restore_head(self.head)
        self.best = Score.restore(counters["best"]) if counters["best"] else None
        session = {**self.sessions[0], "first_step": counters["step"], "last_step": counters["step"]}
        for name in COUNTERS:
            setattr(self, name, counters[name])
        self.sessions.append(session)
        self.earlier_s, self.started = counters["train_s"], time.perf_counter()
        if self.average:
            self.average.load_state(state.arrays(AVERAGE))
        if runtime.is_main():
            self._drop_log_after_this_step()

    def _drop_log_after_this_step(self) -> None:
        path, earlier = self.out / LOG, []
        for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # an incomplete line, which a kill leaves
                if parse_json(line, path).get("step", self.step + 1) <= self.step:
                    earlier.append(line)
        write_file(path, "".join(f"{line}\n" for line in earlier))

    def log(self, record: dict) -> None:
        """Append one JSON line to log.jsonl."""
        if runtime.is_main():
            with naming(self.out / LOG), open(self.out / LOG, "a", encoding="utf-8") as file:
                file.write(to_json(record) + "\n")

    def score(self, data: TokenizedData, source) -> Score:
        """Score the head, with the averaged weights if there are any; save it when it has the best score so far."""
        with self.average.swapped() if self.average else contextlib.nullcontext():
            if self.own is None:
                self.own = own_tokens(self.head.borrowed, data, source)
            score = score_head(self.head, data, source, self.config.tree_nodes, self.own)
            metrics = {**dataclasses.asdict(score), "tree_nodes": self.config.tree_nodes}
            self.log({"step": self.step, "held_out": {k: v for k, v in metrics.items() if k != "tree"}})
            if not self.best or score.expected_accept_length > self.best.expected_accept_length:
                self.best, self.best_step = score, self.step
                self._save_checkpoint(metrics)
        short = {"expected_accept_length": score.expected_accept_length, "loss": score.loss}
        self.history.append({"step": self.step, **short})
        return score

    def _save_checkpoint(self, metrics: dict) -> None:
        if not runtime.is_main():
            return
        config = {
            **self.base_config,
            "trainer": dataclasses.asdict(self.config),
            "metrics": metrics,
            "progress": {"step": self.step, "tokens": self.tokens, "train_s": self.train_s},
        }
        save_checkpoint(self.out / CHECKPOINT, self.head, config, runtime.provenance(self.config.seed))

    def save_state(self, optimizer: Optimizer) -> None:
        """Write a state, if the run has any."""
        if self.config.save_every and runtime.is_main():
            arrays, average = optimizer.state(), self.average.state() if self.average else None
            save_state(self.out, self.head, arrays, average, self.counters(), self.identity, self.config.keep_last)

    def finish(self, interrupted: bool) -> FitResult:
        """Write the totals of the run, which may have continued after its best step, to the checkpoint and the log."""
        self.sessions[-1]["last_step"] = self.step
        totals = {"steps": self.step, "tokens": self.tokens, "train_s": self.train_s}
        if runtime.is_main():
            update_config(self.out / CHECKPOINT, {"run": {**totals, "interrupted": interrupted}})
        self.log({"finished": not interrupted, **totals})
        flags = {"interrupted": interrupted, "skipped": self.skipped}
        return FitResult(self.best, self.best_step, **totals, **flags, history=self.history, sessions=self.sessions)


def count_steps(config: TrainConfig, data: TokenizedData, head) -> int:
    """Optimizer steps of the run, at least one; none for a head that has nothing to train."""
    if not head.trained:
        return 0
    steps = 0
    for epoch in range(math.ceil(config.epochs)):
        share = min(1.0, config.epochs - epoch)
        steps += math.floor(share * len(batches(data, config.tokens_per_step, seed=config.seed, epoch=epoch)))
    return min(max(1, steps), config.max_steps) if config.max_steps else max(1, steps)


@dataclass
class Stretch:
    """A stage of the head's training as steps of this run, from ``first`` up to but not including ``last``."""

    stage: Stage
    first: int
    last: int


def stretches(stages: Sequence[Stage], num_steps: int) -> list[Stretch]:
    """The stages as steps; a stage without a step is left out.

    Worked example: shares 0.6 and 0.4 of 5 steps are the steps 0 to 2 and 3 to 4.
    """
    shares = np.array([stage.share for stage in stages])
    assert (shares >= 0).all() and abs(shares.sum() - 1) < 1e-6, [stage.share for stage in stages]
    edges = np.round(np.cumsum([0.0, *shares]) * num_steps).astype(int).tolist()
    found = [Stretch(stage, a, b) for stage, a, b in zip(stages, edges, edges[1:], strict=False)]
    return [stretch for stretch in found if stretch.last > stretch.first]


def vocab_sizes(head) -> set[int]:
    """The sizes of the vocabularies that a parameter of the head may range over."""
    return {head.vocab_size, head.num_draftable}


def stage_optimizer(config: TrainConfig, head, stage: Stage) -> Optimizer:
    """The optimizer over the parameters that this stage trains."""
    rates = {name: multiple for name in head.trainable() if (multiple := stage.rate(name)) is not None}
    chosen = {name: p for name, p in head.trainable().items() if name in rates}
    return OPTIMIZERS[config.optimizer](config, chosen, rates, vocab_sizes(head))


def fit(
    run: Run,
    data: TokenizedData,
    held_out: TokenizedData,
    source,
    held_out_source,
    progress,
    objective: Objective | None = None,
    state: State | None = None,
) -> FitResult:
    """Train ``run.head``, save its best checkpoint in ``run.out / "checkpoint"`` and states in ``run.out / "states"``.

    source(indices), held_out_source(indices) -> Features of those conversations. progress(step, num_steps, record) is
    called after every step. objective: what the depths learn, by default the text's tokens. state: to resume from. The
    head's stages follow one another, each with its own optimizer and rate schedule. Ctrl-C takes effect after the
    current step: the head is scored, saved if best, a state is written, and the call returns. Raises
    FloatingPointError when more than ``skip_limit`` updates in a row are not finite; the best checkpoint stays.
    """
    with deferred_interrupts():
        return _Loop(run, data, held_out, source, held_out_source, progress, objective or Objective()).go(state)


class _Loop:
    def __init__(self, run, data, held_out, source, held_out_source, progress, objective):
        self.run, self.data, self.source, self.progress, self.objective = run, data, source, progress, objective
        self.held_out = held_out, held_out_source
        self.config = run.config
        self.num_steps = count_steps(self.config, data, run.head)
        self.clock = time.perf_counter(), 0
        self.process = psutil.Process()

    def go(self, state: State | None) -> FitResult:
        run, config = self.run, self.config
        run.head.train()
        if state:
            run.resume(state)
        epochs = (batches(self.data, config.tokens_per_step, seed=config.seed, epoch=n) for n in itertools.count())
        order = itertools.islice(itertools.chain.from_iterable(epochs), run.step, None)
        optimizer, interrupted = None, False
        try:
            for stretch in stretches(run.head.stages(), self.num_steps):
                if run.step >= stretch.last:
                    continue
                optimizer = stage_optimizer(config, run.head, stretch.stage)
                if state and run.step > stretch.first:
                    optimizer.load_state(state.arrays(OPTIMIZER))
                    state = None
                while run.step < stretch.last:
                    self.step(optimizer, stretch, next(order))
                    if run.step == self.num_steps:
                        break  # scored and saved below
                    if run.step % config.score_every == 0 and run.on_score(run.step, run.score(*self.held_out)):
                        raise _Pruned
                    if config.save_every and run.step % config.save_every == 0:
                        run.save_state(optimizer)
        except (KeyboardInterrupt, _Pruned):
            interrupted = True
        if not (run.history and run.history[-1]["step"] == run.step):
            run.on_score(run.step, run.score(*self.held_out))
        if optimizer is not None:
            run.save_state(optimizer)
        return run.finish(interrupted)

    def step(self, optimizer: Optimizer, stretch: Stretch, indices: list[int]) -> None:
        run, config, length = self.run, self.config, stretch.last - stretch.first
        done = run.step - stretch.first
        # A head's random draws depend on the seed and the step only, so that a resumed run draws the same.
        runtime.set_seed(int(np.random.SeedSequence([config.seed, run.step]).generate_state(1)[0]))
        run.head.enter(stretch.stage.name, done / length)
        planned = rate(config, done, length)
        record = {"step": run.step + 1, "stage": stretch.stage.name, "rate": planned}
        parameters = list(optimizer.parameters.values())
        grads, metrics, batches = gradients(
            run.head, parameters, self.data, indices, self.source, config, self.objective
        )
        if grads is not None:
            try:
                record["grad_norm"] = optimizer.update(grads, planned)
                run.skipped_in_row = 0
            except NonFinite as error:
                run.skipped += 1
                run.skipped_in_row += 1
                if run.skipped_in_row > config.skip_limit:
                    found = save_bad_step(run.out, run.step + 1, batches, self.data, indices)
                    which = f"step {run.step + 1}, the {run.skipped_in_row}th update in a row"
                    raise FloatingPointError(f"{error}, {which}; {found}") from error
            else:
                if run.average:
                    run.average.update()
            record["loss"] = [round(x, 4) for x in metrics.losses]
            record |= {"top1": metrics.top1, "top5": metrics.top5, "aux": metrics.aux}
        run.step += 1
        run.tokens += int(self.data.lengths[indices].sum())
        self.report(record)
        if metrics.interrupted:
            acknowledge_interrupt()
            raise KeyboardInterrupt
        if runtime.world_size() == 1:
            check_interrupt()

    def report(self, record: dict) -> None:
        run = self.run
        record |= {"tokens": run.tokens, "skipped": run.skipped}
        if run.step % LOG_EVERY == 0:
            now, (then, tokens) = time.perf_counter(), self.clock
            self.clock = now, run.tokens
            record["tokens_per_s"] = (run.tokens - tokens) / (now - then)
            record["memory_bytes"] = self.process.memory_info().rss
            run.log(record)
        self.progress(run.step, self.num_steps, record)
