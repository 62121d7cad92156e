"""The one training loop, for every head: features in, losses of all depths down, the best checkpoint kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import runtime
from heads.base import Stage
from heads.checkpoint import save_checkpoint, update_config
from runtime import jt
from runtime.interrupt import check_interrupt, deferred_interrupts
from trainer.config import TrainConfig
from trainer.data import TokenizedData, batches
from trainer.loss import head_loss, make_batch
from trainer.optimizer import AdamW, learning_rate
from trainer.score import accuracy, count_paths, expected_accept_length, fitted_paths

STORED_NODES = 64  # paths kept with a checkpoint: the largest tree in the literature has 64 nodes
HELD_OUT_TOKENS = 4096  # tokens of a scoring pass


@dataclass
class Score:
    """What held-out text says. expected_accept_length: tokens per pass; top1, top5: per depth; loss: nats per depth;
    tree: the paths that give it; stats: what the head says of itself, see ``Head.describe``."""

    expected_accept_length: float
    top1: list[float]
    top5: list[float]
    loss: list[float]
    tree: list[list[int]]
    stats: dict


def score_head(head, data: TokenizedData, source, num_nodes: int) -> Score:
    """Teacher-forced ranks over all held-out conversations. Leaves the head in training mode."""
    ranks, losses, counts = [], np.zeros(head.num_depths), np.zeros(head.num_depths)
    sums, positions = {}, 0
    head.eval()
    with jt.no_grad():
        for indices in batches(data, HELD_OUT_TOKENS):
            batch = make_batch(data, indices, source, head.num_depths)
            if len(batch.positions) == 0:
                continue
            parts = head_loss(head, batch, 1.0)
            rank = np.stack([r.numpy() for r in parts.ranks])
            labelled = (rank >= 0).sum(1)
            losses += np.array([float(x.item()) for x in parts.depth_losses]) * labelled
            counts += labelled
            ranks.append(rank)
            positions += len(batch.positions)
            for name, values in parts.stats.items():
                sums[name] = sums.get(name, 0) + np.asarray(values, np.float64).sum(0)
    head.train()
    if not ranks:
        raise ValueError("the held-out text is too short to score on; hold out more conversations")
    ranks = np.concatenate(ranks, 1)
    tree = fitted_paths(count_paths(ranks), STORED_NODES)
    return Score(
        expected_accept_length(ranks, num_nodes),
        accuracy(ranks, 1),
        accuracy(ranks, 5),
        (losses / np.maximum(counts, 1)).tolist(),
        [list(path) for path in tree],
        head.describe({name: total / positions for name, total in sums.items()}),
    )


@dataclass
class FitResult:
    """What a run came to. ``interrupted``: Ctrl-C ended it; the best checkpoint until then was kept."""

    best: Score
    best_step: int
    steps: int
    tokens: int
    train_s: float
    interrupted: bool


class Run:
    """One training run: owns the log, the best score and where checkpoints go."""

    def __init__(self, config: TrainConfig, head, base_config: dict, out: Path):
        self.config, self.head, self.base_config, self.out = config, head, base_config, out
        self.best: Score | None = None
        self.best_step = self.step = self.tokens = 0
        self.started = time.perf_counter()

    def log(self, record: dict) -> None:
        """Append one JSON line to log.jsonl."""
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def keep_if_best(self, score: Score) -> None:
        """Save a checkpoint when the score beats all before it."""
        metrics = {**dataclasses.asdict(score), "tree_nodes": self.config.tree_nodes}
        self.log({"step": self.step, "held_out": {k: v for k, v in metrics.items() if k != "tree"}})
        if self.best and score.expected_accept_length <= self.best.expected_accept_length:
            return
        self.best, self.best_step = score, self.step
        seconds = time.perf_counter() - self.started
        config = {
            **self.base_config,
            "trainer": dataclasses.asdict(self.config),
            "metrics": metrics,
            "progress": {"step": self.step, "tokens": self.tokens, "train_s": seconds},
        }
        save_checkpoint(self.out / "checkpoint", self.head, config, runtime.provenance(self.config.seed))

    def finish(self, interrupted: bool) -> FitResult:
        """Note in the checkpoint and in the log what the whole run took, which may have gone on after its best step."""
        seconds = time.perf_counter() - self.started
        totals = {"steps": self.step, "tokens": self.tokens, "train_s": seconds}
        update_config(self.out / "checkpoint", {"run": {**totals, "interrupted": interrupted}})
        self.log({"finished": not interrupted, **totals})
        return FitResult(self.best, self.best_step, interrupted=interrupted, **totals)


def count_steps(config: TrainConfig, data: TokenizedData, head) -> int:
    """Optimizer steps of the run, at least one; none for a head that has nothing to train."""
    if not head.trained:
        return 0
    per_epoch = len(batches(data, config.tokens_per_step, seed=config.seed))
    steps = max(1, math.floor(per_epoch * config.epochs))
    return min(steps, config.max_steps) if config.max_steps else steps


@dataclass
class Stretch:
    """A stage of the head's training as steps of this run: ``first`` up to and without ``last``."""

    stage: Stage
    first: int
    last: int


def stretches(stages: Sequence[Stage], num_steps: int) -> list[Stretch]:
    """The stages as steps; one that comes to no step is left out.

    Worked example: shares 0.6 and 0.4 of 5 steps are the steps 0 to 2 and 3 to 4.
    """
    shares = np.array([stage.share for stage in stages])
    assert (shares >= 0).all() and abs(shares.sum() - 1) < 1e-6, [stage.share for stage in stages]
    edges = np.round(np.cumsum([0.0, *shares]) * num_steps).astype(int).tolist()
    found = [Stretch(stage, a, b) for stage, a, b in zip(stages, edges, edges[1:], strict=False)]
    return [stretch for stretch in found if stretch.last > stretch.first]


def make_optimizer(config: TrainConfig, head, stage: Stage) -> AdamW:
    """AdamW over the parameters that this stage trains."""
    rates = {name: stage.rate(name) for name in head.trainable()}
    chosen = {name: p for name, p in head.trainable().items() if rates[name] is not None}
    return AdamW(
        list(chosen.values()),
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
        clip=config.clip,
        rates=[rates[name] for name in chosen],
    )


def fit(run: Run, data: TokenizedData, held_out: TokenizedData, source, held_out_source, progress) -> FitResult:
    """Train ``run.head`` and keep its best checkpoint in ``run.out / "checkpoint"``.

    source(indices), held_out_source(indices) -> Features of those conversations. progress(step, num_steps, record) is
    called after every step. The stages of the head follow each other, each with an optimizer and a rate schedule of
    its own. Ctrl-C, looked for after every step, scores what there is, keeps it if best, and returns.
    Raises FloatingPointError when a gradient is not finite; the best checkpoint until then stays.
    """
    with deferred_interrupts():
        return _fit(run, data, held_out, source, held_out_source, progress)


def _fit(run: Run, data: TokenizedData, held_out: TokenizedData, source, held_out_source, progress) -> FitResult:
    config, head = run.config, run.head
    num_steps = count_steps(config, data, head)
    interrupted = False
    head.train()
    try:
        order = _batch_order(data, config)
        for stretch in stretches(head.stages(), num_steps):
            optimizer = make_optimizer(config, head, stretch.stage)
            while run.step < stretch.last:
                batch = make_batch(data, next(order), source, head.num_depths)
                _train_step(run, optimizer, batch, stretch, num_steps, progress)
                if run.step % config.score_every == 0 and run.step < num_steps:
                    run.keep_if_best(score_head(head, held_out, held_out_source, config.tree_nodes))
    except KeyboardInterrupt:
        interrupted = True
    run.keep_if_best(score_head(head, held_out, held_out_source, config.tree_nodes))
    return run.finish(interrupted)


def _batch_order(data: TokenizedData, config: TrainConfig) -> Iterator[np.ndarray]:
    """The conversations of one batch after another, epoch after epoch, without end."""
    for epoch in itertools.count():
        yield from batches(data, config.tokens_per_step, seed=config.seed, epoch=epoch)


def _train_step(run: Run, optimizer: AdamW, batch, stretch: Stretch, num_steps: int, progress) -> None:
    config, length = run.config, stretch.last - stretch.first
    step = run.step - stretch.first
    run.head.enter(stretch.stage.name, step / length)
    rate = learning_rate(step, length, config.learning_rate, config.warmup, config.final_rate)
    record = {"step": run.step + 1, "stage": stretch.stage.name, "rate": rate}
    if len(batch.positions):
        parts = head_loss(run.head, batch, config.depth_weight)
        record["grad_norm"] = optimizer.update(parts.total, rate)
        record["loss"] = [round(float(x.item()), 4) for x in parts.depth_losses]
        record["aux"] = {name: float(term.item()) for name, term in parts.aux.items()}
    run.step += 1
    run.tokens += batch.token_ids.shape[1] - run.head.num_depths
    record["tokens"] = run.tokens
    if run.step % 10 == 0:
        run.log(record)
    progress(run.step, num_steps, record)
    check_interrupt()
