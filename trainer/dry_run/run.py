"""``train.py --dry-run``: everything is loaded, one step goes forward and back, nothing is written."""

from __future__ import annotations

import itertools
import resource
import time

import runtime
from runtime import jt
from trainer.data.tokens import batches
from trainer.dry_run.estimate import Measured, estimate, plan_run, table
from trainer.features.cache import OnlineFeatures
from trainer.fit import stage_optimizer, stretches
from trainer.loss import head_loss, make_batch
from trainer.session import Setting, make_objective, run_directory
from trainer.step import split


def _peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_step(setting: Setting) -> Measured | None:
    """One pass forward and back and one update, timed the second time, when every kernel is there. The stage is the
    last: it trains at least what the others do. None for a head that has nothing to train."""
    config, head, training = setting.config, setting.head, setting.splits.training
    stages = stretches(head.stages(), setting.num_steps)
    if not head.trained or not stages:
        return None
    before = _peak_bytes()
    head.train()
    optimizer = stage_optimizer(config, head, stages[-1].stage)
    head.enter(stages[-1].stage.name, 0.5)
    online, objective = OnlineFeatures(setting.backbone, training, tuple(head.layers)), make_objective(setting)
    step = batches(training, config.tokens_per_step, seed=config.seed)[0]
    part = split(step, training.lengths, config.accumulate * runtime.world_size())[0]
    parameters, seconds = list(optimizer.parameters.values()), []
    for _ in range(2):
        clock = [time.perf_counter()]
        said = head_loss(
            head, make_batch(training, part, online, head.num_depths, step), config.depth_weight, objective
        )
        said.total.sync()
        clock.append(time.perf_counter())
        grads = jt.grad(said.total, parameters)
        jt.sync(grads)
        clock.append(time.perf_counter())
        optimizer.update(grads, config.learning_rate)
        clock.append(time.perf_counter())
        seconds = [b - a for a, b in itertools.pairwise(clock)]
    tokens = int(training.lengths[part].sum())
    return Measured(*seconds, tokens, before, _peak_bytes())


def dry_run(setting: Setting) -> int:
    """Print what the run will need, as a table and, in the last line, as JSON. Returns the exit
    status: 2 when it cannot finish."""
    splits = setting.splits
    plan = plan_run(
        setting.config,
        setting.head,
        setting.backbone,
        splits.tokenizer,
        splits.training,
        splits.held_out,
        run_directory(setting.config),
    )
    found = estimate(plan, measure_step(setting))
    if runtime.is_main():
        print(table(found))
        print(found.to_json())
    return found.status
