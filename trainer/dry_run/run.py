"""``train.py --dry-run``: loads everything, makes one step, prints what the run will need, and writes nothing."""

from __future__ import annotations

import itertools
import resource
import time

import runtime
from runtime import jt
from runtime.entry import USER_MISTAKE
from trainer.data.tokens import batches
from trainer.dry_run.estimate import Measured, estimate, table
from trainer.dry_run.plan import plan_run
from trainer.features.cache import OnlineFeatures
from trainer.fit import stage_optimizer, stretches
from trainer.loss import head_loss, make_batch
from trainer.session import Setting, make_objective, run_directory
from trainer.step import split


def _peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_step(setting: Setting) -> Measured | None:
    """One pass forward and back and one update, timed the second time, when every kernel is compiled. The stage is the
    last, which trains at least what the others do. None for a head that has nothing to train."""
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
        batch = make_batch(training, part, online, head.num_depths, step)
        loss = head_loss(head, batch, config.depth_weight, objective)
        loss.total.sync()
        clock.append(time.perf_counter())
        grads = jt.grad(loss.total, parameters)
        jt.sync(grads)
        clock.append(time.perf_counter())
        optimizer.update(grads, config.learning_rate)
        clock.append(time.perf_counter())
        seconds = [b - a for a, b in itertools.pairwise(clock)]
    return Measured(*seconds, int(training.lengths[part].sum()), before, _peak_bytes())


def dry_run(setting: Setting) -> int:
    """Print what the run will need, as a table and, in the last line, as JSON. Returns the exit status: 0, or 2 when it
    cannot finish."""
    plan = plan_run(setting, run_directory(setting.config))
    found = estimate(plan, measure_step(setting))
    if runtime.is_main():
        print(setting.splits.report.summary())
        print(table(found))
        print(found.to_json())
    return 0 if found.can_finish else USER_MISTAKE
