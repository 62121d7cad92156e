"""What a planned run needs in memory, disk and time, and whether it can finish. Pure functions of the plan and of one
measured step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from runtime.files.documents import to_json
from trainer.dry_run.plan import FLOAT, Plan, StagePlan

MARGIN = 1.05  # free room over needed room: a disk that is full to the last byte fails sooner


@dataclass(frozen=True)
class Measured:
    """One real step: a pass forward and back and an update, of the last stage, without an average of the weights.

    forward_s, backward_s: of the pass, over ``tokens`` tokens, features included; update_s: of the optimizer.
    peak_before_bytes, peak_after_bytes: the most memory this process had held before and after it.
    """

    forward_s: float
    backward_s: float
    update_s: float
    tokens: int
    peak_before_bytes: int
    peak_after_bytes: int


@dataclass(frozen=True)
class DryRun:
    """What a run will need. Bytes are those of one rank, seconds those of the run; None: not measured.

    gradients_bytes, optimizer_bytes: of the stage that needs most. memory_bytes: the most that a rank will hold.
    states_bytes: ``keep_last`` states; disk_bytes: what the run's directory needs at its fullest: one state more and
    the checkpoint twice, because each is written before the old one is removed. reasons: why it cannot finish.
    """

    plan: Plan
    measured: Measured | None
    gradients_bytes: int
    optimizer_bytes: int
    average_bytes: int
    fixed_bytes: int
    memory_bytes: int
    state_bytes: int
    states_bytes: int
    disk_bytes: int
    step_s: float | None = None
    scores_s: float | None = None
    train_s: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def can_finish(self) -> bool:
        """The verdict."""
        return not self.reasons

    def to_json(self) -> str:
        """One line, the last of stdout."""
        content = {"kind": "dry_run", "can_finish": self.can_finish, **dataclasses.asdict(self)}
        return to_json(content)


def estimate(plan: Plan, measured: Measured | None) -> DryRun:
    """What a run of this plan needs, and whether it can finish. measured: None when no step could be made."""
    copies = 1 + (plan.accumulate > 1) + (plan.ranks > 1)  # the sum of the passes; the flat array that is reduced
    gradients = max((FLOAT * copies * stage.parameters for stage in plan.stages), default=0)
    moments = max((FLOAT * stage.moments for stage in plan.stages), default=0)
    average = FLOAT * plan.parameters * plan.ema
    fixed = plan.backbone_bytes + plan.head_bytes + gradients + moments + average
    state = plan.head_bytes + moments + average if plan.save_every else 0
    memory = fixed
    if measured:
        last = plan.stages[-1] if plan.stages else StagePlan("", 0, 0, 0)
        unseen = gradients + moments - FLOAT * (last.parameters + last.moments) + average
        memory = max(fixed, measured.peak_after_bytes + unseen)
    found = DryRun(
        plan=plan,
        measured=measured,
        gradients_bytes=gradients,
        optimizer_bytes=moments,
        average_bytes=average,
        fixed_bytes=fixed,
        memory_bytes=memory + state,  # a state is copied before it is written
        state_bytes=state,
        states_bytes=plan.keep_last * state,
        disk_bytes=(plan.keep_last + 1) * state + 2 * plan.head_bytes,
    )
    if measured and plan.num_steps:  # a pass is assumed to cost as much per token as the measured one
        rank_tokens = plan.run_tokens / plan.num_steps / plan.ranks
        step = (measured.forward_s + measured.backward_s) * rank_tokens / measured.tokens + measured.update_s
        num_scores = math.ceil(plan.num_steps / plan.score_every)
        scores = num_scores * measured.forward_s * plan.held_out_tokens / plan.ranks / measured.tokens
        found = dataclasses.replace(found, step_s=step, scores_s=scores, train_s=plan.num_steps * step + scores)
    return dataclasses.replace(found, reasons=tuple(_obstacles(found)))


def _obstacles(found: DryRun) -> Iterator[str]:
    """Why the run cannot finish, a sentence each; none when it can."""
    plan = found.plan
    if not any(stage.parameters for stage in plan.stages):
        yield f"no stage trains any parameter of head {plan.head}"
    if plan.num_sequences < plan.ranks:
        yield f"there are {plan.num_sequences} sequences for {plan.ranks} ranks; use fewer ranks or more data"
    if plan.max_length > plan.backbone_max_length:
        yield (
            f"--max-length {plan.max_length} exceeds the {plan.backbone_max_length} positions of the backbone; "
            f"pass --max-length {plan.backbone_max_length}"
        )
    memory = found.memory_bytes * plan.ranks
    if memory > plan.memory_limit:
        who = f"{plan.ranks} ranks need" if plan.ranks > 1 else "it needs"
        yield (
            f"{who} {size(memory)} of memory, {size(plan.memory_limit)} are available; use a larger --accumulate or a "
            "smaller --tokens-per-step"
        )
    needs = {plan.out: found.disk_bytes, plan.cache_dir: plan.cache_bytes}
    if plan.same_disk:
        needs = {plan.out: found.disk_bytes + plan.cache_bytes}
    for place, needed in needs.items():
        free = plan.out_free if place == plan.out else plan.cache_free
        if needed * MARGIN > free:
            parts = {"feature cache": plan.cache_bytes, "states": (plan.keep_last + 1) * found.state_bytes}
            largest = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
            yield (
                f"the disk of {place} has {size(free)} free, {size(needed)} are needed ({largest}); use --features "
                "online, another --cache-dir, a smaller --keep-last or --save-every 0"
            )


# Printing -------------------------------------------------------------------------------------------------------------


def table(found: DryRun) -> str:
    """The plain table of a dry run, verdict last."""
    plan, measured = found.plan, found.measured
    peak, time, features = "not measured", "not measured", "none: computed at every step"
    if measured:
        peak = f"{size(measured.peak_after_bytes)} after one step, {size(measured.peak_before_bytes)} before it"
    if found.train_s is not None:
        complete, scoring = (timedelta(seconds=round(seconds)) for seconds in (found.train_s, found.scores_s))
        time = f"{complete}: {found.step_s:.3g} s a step, {scoring} of it scoring"
        time += "; writing the features not included" if plan.cache_bytes else ""
    if plan.features == "cache":
        missing = f"{size(plan.cache_bytes)} to write to" if plan.cache_bytes else "complete in"
        features = f"{missing} {plan.cache_dir}, {size(plan.cache_free)} free"
    rows = [
        ("head", f"{plan.head}, {plan.parameters:,} parameters"),
        *((f"  {s.name}", f"{s.parameters:,} of them trained for {s.steps:,} steps") for s in plan.stages),
        ("backbone", plan.backbone),
        ("memory", f"{size(found.memory_bytes)} a rank, {plan.ranks} rank(s), {size(plan.memory_limit)} available"),
        ("  backbone", size(plan.backbone_bytes)),
        ("  weights", size(plan.head_bytes)),
        ("  gradients", size(found.gradients_bytes)),
        ("  optimizer", f"{size(found.optimizer_bytes)} ({plan.optimizer})"),
        ("  average", size(found.average_bytes) if plan.ema else "none"),
        ("  peak", peak),
        ("disk", ""),
        ("  features", features),
        ("  states", f"{plan.keep_last} x {size(found.state_bytes)}" if plan.save_every else "none"),
        ("  free", f"{size(plan.out_free)} at {plan.out}"),
        ("data", f"{plan.num_sequences:,} sequences, {plan.tokens:,} tokens; {plan.held_out_tokens:,} held out"),
        ("steps", f"{plan.num_steps:,}, {plan.run_tokens:,} tokens"),
        ("time", time),
        ("can finish", "yes" if found.can_finish else f"no, because {'; '.join(found.reasons)}"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{text}".rstrip() for name, text in rows)


def size(count: float) -> str:
    """``1.23 GB``, three figures, powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"
