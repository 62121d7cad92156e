"""What ``train.py --dry-run`` tells: the memory, the disk and the time that a run will take, and whether it can finish.

``plan_run`` looks at the loaded backbone, head and data; one real step is measured by who has it made; ``estimate``
puts both together and is a pure function of the two.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil

FLOAT = 4  # bytes of a float32: a head, its gradients and its optimizer's moments
ROOM = 1.05  # of what is wanted: a disk that is full to the last byte fails sooner
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class StagePlan:
    """A stage of the head's training. parameters: numbers it trains; moments: numbers its optimizer keeps of them;
    steps: optimizer steps of this run."""

    name: str
    parameters: int
    moments: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """What is known of a run before its first step. Sizes are in bytes, texts in tokens.

    parameters: trainable numbers of the head; head_bytes: of all that its checkpoint holds. ranks: processes.
    backbone_bytes: of its weights as they lie in memory. max_length, backbone_max_length: tokens of a conversation that
    are asked for, positions that the backbone knows. num_sequences, tokens: of the text to train on; run_tokens: of all
    steps together, repetitions included. cache_bytes: of the features still to be written, for cache_tokens tokens.
    cache_free, out_free: room where the cache and the run go; same_disk: those are one file system.
    memory_limit: what this process and others like it can have together.
    """

    head: str
    parameters: int
    head_bytes: int
    stages: tuple[StagePlan, ...]
    optimizer: str
    ema: bool
    accumulate: int
    ranks: int
    backbone: str
    backbone_bytes: int
    max_length: int
    backbone_max_length: int
    num_sequences: int
    tokens: int
    held_out_tokens: int
    num_steps: int
    run_tokens: int
    score_every: int
    features: str
    cache_bytes: int
    cache_tokens: int
    cache_dir: str
    cache_free: int
    out: str
    out_free: int
    same_disk: bool
    save_every: int
    keep_last: int
    memory_limit: int


@dataclass(frozen=True)
class Measured:
    """One real step: a pass forward and back and an update, of the last stage, without an average of the weights.

    forward_s, backward_s: of the pass, over ``tokens`` tokens, features included; update_s: of the optimizer.
    peak_before_bytes, peak_after_bytes: the most memory this process had held until before and after it.
    cache_tokens_per_s: of features that were written for trial; None: not measured.
    """

    forward_s: float
    backward_s: float
    update_s: float
    tokens: int
    peak_before_bytes: int
    peak_after_bytes: int
    cache_tokens_per_s: float | None = None


@dataclass(frozen=True)
class DryRun:
    """What a run will need. Bytes are those of one rank, seconds those of the whole run; None: not measured.

    gradients_bytes, optimizer_bytes: of the stage that needs most. memory_bytes: the most that a rank will hold.
    states_bytes: ``keep_last`` states; disk_bytes: what the run's directory needs at its fullest, one state more and
    the checkpoint twice, as one of each is written before the old one goes. features_s: of writing the cache.
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
    step_s: float | None
    scores_s: float | None
    train_s: float | None
    features_s: float | None
    reasons: tuple[str, ...]

    @property
    def can_finish(self) -> bool:
        """The verdict."""
        return not self.reasons

    @property
    def status(self) -> int:
        """Exit status of the entry: 0, or 2 for a run that cannot finish."""
        return 0 if self.can_finish else 2

    def to_json(self) -> str:
        """One line, for stdout's last."""
        content = {"kind": "dry_run", "can_finish": self.can_finish, **dataclasses.asdict(self)}
        return json.dumps(content, allow_nan=False)


# What a run looks like ------------------------------------------------------------------------------------------------


def optimizer_moments(kind: str, shapes: Iterable[Sequence[int]], vocab_sizes: Collection[int]) -> int:
    """Numbers that an optimizer keeps of parameters of these shapes: two of each with adamw, one with lion; with muon
    one of a hidden matrix, two of everything else (``trainer.optim.optimizer``)."""
    total = 0
    for shape in shapes:
        hidden = len(shape) == 2 and not set(vocab_sizes) & set(shape)
        slots = {"adamw": 2, "lion": 1, "muon": 1 if hidden else 2}[kind]
        total += slots * math.prod(shape)
    return total


def held_bytes(thing) -> int:
    """Bytes of all Vars that an object holds, in its attributes, lists and tables, each counted once."""
    from runtime import jt

    seen: set[int] = set()

    def walk(value) -> int:
        if id(value) in seen or isinstance(value, type | ModuleType | str | np.ndarray):
            return 0
        seen.add(id(value))
        if isinstance(value, jt.Var):
            return int(value.numel()) * np.dtype(str(value.dtype)).itemsize
        if hasattr(value, "element_size"):  # a tensor of torch's
            return value.numel() * value.element_size()
        if isinstance(value, Mapping):
            return sum(map(walk, value.values()))
        if isinstance(value, list | tuple):
            return sum(map(walk, value))
        return sum(map(walk, vars(value).values())) if hasattr(value, "__dict__") else 0

    return walk(thing)


def memory_limit() -> int:
    """Bytes that this process may hold: what is free now and what it holds already, or its control group's limit."""
    limit = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if CGROUP_LIMIT.exists() and (text := CGROUP_LIMIT.read_text().strip()).isdigit():
        limit = min(limit, int(text))
    return limit


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def plan_run(config, head, backbone, tokenizer, training, held_out, out: Path) -> Plan:
    """The plan of a run that is loaded and not begun. training, held_out: TokenizedData. out: the run's directory."""
    import runtime
    from trainer.data.tokens import batches
    from trainer.features.cache import array_names, feature_store
    from trainer.fit import count_steps, stretches

    num_steps = count_steps(config, training, head)
    trainable = {name: tuple(p.shape) for name, p in head.trainable().items()} if head.trained else {}
    vocab_sizes = {head.vocab_size, head.num_draftable}
    stages = []
    for stretch in stretches(head.stages(), num_steps) if head.trained else ():
        shapes = [shape for name, shape in trainable.items() if stretch.stage.rate(name) is not None]
        moments = optimizer_moments(config.optimizer, shapes, vocab_sizes)
        steps = stretch.last - stretch.first
        stages.append(StagePlan(stretch.stage.name, sum(map(math.prod, shapes)), moments, steps))
    cache_bytes = cache_tokens = 0
    if config.features == "cache" and head.trained:
        for data in (training, held_out):
            store = feature_store(backbone, tokenizer.fingerprint, data, Path(config.cache_dir))
            names = array_names(head.layers)
            lacking = set(store.all(names)) - store.present(names)
            cache_bytes += store.num_bytes(lacking)
            cache_tokens += sum(store.num_rows(index) for index in {index for _, index in lacking})
    epoch = batches(training, config.tokens_per_step, seed=config.seed)
    epoch_tokens = sum(int(training.lengths[step].sum()) for step in epoch)  # with --data-weights, not the text's
    out_place, cache_place = _existing(out), _existing(Path(config.cache_dir))
    return Plan(
        head=config.head,
        parameters=head.num_parameters,
        head_bytes=FLOAT * sum(int(p.numel()) for _, p in head.named_parameters()),
        stages=tuple(stages),
        optimizer=config.optimizer,
        ema=bool(config.ema) and head.trained,
        accumulate=config.accumulate,
        ranks=runtime.world_size(),
        backbone=config.backbone or "embedded tiny-vicuna",
        backbone_bytes=held_bytes(backbone),
        max_length=config.max_length,
        backbone_max_length=backbone.config.max_positions,
        num_sequences=len(training),
        tokens=int(training.offsets[-1]),
        held_out_tokens=int(held_out.offsets[-1]),
        num_steps=num_steps,
        run_tokens=round(epoch_tokens * num_steps / len(epoch)),
        score_every=config.score_every,
        features=config.features,
        cache_bytes=cache_bytes,
        cache_tokens=cache_tokens,
        cache_dir=config.cache_dir,
        cache_free=shutil.disk_usage(cache_place).free,
        out=str(out),
        out_free=shutil.disk_usage(out_place).free,
        same_disk=out_place.stat().st_dev == cache_place.stat().st_dev,
        save_every=config.save_every,
        keep_last=config.keep_last,
        memory_limit=memory_limit(),
    )


# What it needs --------------------------------------------------------------------------------------------------------


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
        memory_bytes=memory + state,  # which is copied to be written
        state_bytes=state,
        states_bytes=plan.keep_last * state,
        disk_bytes=(plan.keep_last + 1) * state + 2 * plan.head_bytes,
        **_times(plan, measured),
        reasons=(),
    )
    return dataclasses.replace(found, reasons=tuple(_obstacles(found)))


def _times(plan: Plan, measured: Measured | None) -> dict[str, float | None]:
    """Seconds by DryRun's names. A pass is taken to cost as much per token as the one that was measured."""
    features = None
    if not plan.cache_bytes:
        features = 0.0
    elif measured and measured.cache_tokens_per_s:
        features = plan.cache_tokens / measured.cache_tokens_per_s
    if not measured or not plan.num_steps:
        return {"step_s": None, "scores_s": None, "train_s": None, "features_s": features}
    rank_tokens = plan.run_tokens / plan.num_steps / plan.ranks
    step = (measured.forward_s + measured.backward_s) * rank_tokens / measured.tokens + measured.update_s
    num_scores = math.ceil(plan.num_steps / plan.score_every)
    scores = num_scores * measured.forward_s * plan.held_out_tokens / plan.ranks / measured.tokens
    return {"step_s": step, "scores_s": scores, "train_s": plan.num_steps * step + scores, "features_s": features}


def _obstacles(found: DryRun) -> Iterable[str]:
    """Why the run cannot finish, a sentence each; none when it can."""
    plan = found.plan
    if not any(stage.parameters for stage in plan.stages):
        yield f"no stage trains any parameter of head {plan.head}"
    if plan.num_sequences < plan.ranks:
        yield f"there are {plan.num_sequences} sequences for {plan.ranks} ranks; use fewer ranks or more data"
    if plan.max_length > plan.backbone_max_length:
        yield (
            f"--max-length {plan.max_length} lies beyond the {plan.backbone_max_length} positions of the backbone; "
            f"pass --max-length {plan.backbone_max_length}"
        )
    memory = found.memory_bytes * plan.ranks
    if memory > plan.memory_limit:
        whose = f"{plan.ranks} ranks need" if plan.ranks > 1 else "it needs"
        yield (
            f"{whose} {_size(memory)} of memory, there are {_size(plan.memory_limit)}; use a larger --accumulate or a "
            "smaller --tokens-per-step"
        )
    disk = found.disk_bytes
    if plan.same_disk:
        needs = [(disk + plan.cache_bytes, plan.out_free, plan.out)]
    else:
        needs = [(plan.cache_bytes, plan.cache_free, plan.cache_dir), (disk, plan.out_free, plan.out)]
    for wanted, free, place in needs:
        if wanted * ROOM > free:
            parts = {"feature cache": plan.cache_bytes, "states": (plan.keep_last + 1) * found.state_bytes}
            told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
            yield (
                f"the disk of {place} has {_size(free)} free, {_size(wanted)} are needed ({told}); use --features "
                "online, another --cache-dir, a smaller --keep-last or --save-every 0"
            )


# Telling --------------------------------------------------------------------------------------------------------------


def table(found: DryRun) -> str:
    """The plain table of a dry run, verdict last."""
    plan, measured = found.plan, found.measured
    rows = [
        ("head", f"{plan.head}, {plan.parameters:,} parameters"),
        *(
            (f"  {stage.name}", f"{stage.parameters:,} of them trained for {stage.steps:,} steps")
            for stage in plan.stages
        ),
        ("backbone", plan.backbone),
        ("memory", f"{_size(found.memory_bytes)} a rank, {plan.ranks} rank(s), {_size(plan.memory_limit)} to be had"),
        ("  backbone", _size(plan.backbone_bytes)),
        ("  weights", _size(plan.head_bytes)),
        ("  gradients", _size(found.gradients_bytes)),
        ("  optimizer", f"{_size(found.optimizer_bytes)} ({plan.optimizer})"),
        ("  average", _size(found.average_bytes) if plan.ema else "none"),
        ("  peak", f"{_size(measured.peak_after_bytes)} after one step, {_size(measured.peak_before_bytes)} before it")
        if measured
        else ("  peak", "not measured"),
        ("disk", ""),
        ("  features", _cache_words(plan)),
        ("  states", f"{plan.keep_last} x {_size(found.state_bytes)}" if plan.save_every else "none"),
        ("  free", f"{_size(plan.out_free)} at {plan.out}"),
        ("data", f"{plan.num_sequences:,} sequences, {plan.tokens:,} tokens; {plan.held_out_tokens:,} held out"),
        ("steps", f"{plan.num_steps:,}, {plan.run_tokens:,} tokens"),
        ("time", _time_words(found)),
        ("can finish", "yes" if found.can_finish else f"no, because {'; '.join(found.reasons)}"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{text}".rstrip() for name, text in rows)


def _cache_words(plan: Plan) -> str:
    if plan.features != "cache":
        return "none: computed at every step"
    where = f"{plan.cache_dir}, {_size(plan.cache_free)} free"
    return f"{_size(plan.cache_bytes)} to write into {where}" if plan.cache_bytes else f"written already, {where}"


def _time_words(found: DryRun) -> str:
    if found.train_s is None:
        return "not measured"
    words = f"{_duration(found.train_s)}: {found.step_s:.3g} s a step, {_duration(found.scores_s)} of it scoring"
    if found.features_s is None:
        return f"{words}; writing the features not included"
    return f"{words}; before it {_duration(found.features_s)} of writing features" if found.features_s else words


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _size(count: float) -> str:
    """``1.23 GB``, three figures, powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"
