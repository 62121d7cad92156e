"""What is known of a run before its first step: sizes, steps, and the room that there is."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil

import runtime
from runtime import jt
from trainer.data.tokens import batches
from trainer.features.cache import array_names, feature_store
from trainer.fit import stretches, vocab_sizes
from trainer.optim.optimizer import OPTIMIZERS
from trainer.session import Setting

FLOAT = 4  # bytes of a float32: a head, its gradients and its optimizer's moments
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# What a plan takes over from the options of the run.
OPTIONS = ("head", "optimizer", "accumulate", "max_length", "score_every", "features", "cache_dir")
OPTIONS += ("save_every", "keep_last")


@dataclass(frozen=True)
class StagePlan:
    """A stage of the head's training. parameters: numbers it trains; moments: numbers its optimizer stores of them;
    steps: optimizer steps of this run."""

    name: str
    parameters: int
    moments: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """A run that is loaded and not begun. Sizes are in bytes, texts in tokens.

    parameters: trainable numbers of the head; head_bytes: of all that its checkpoint holds. ranks: processes.
    backbone_bytes: of its weights in memory. max_length, backbone_max_length: tokens of a conversation that are asked
    for, positions that the backbone has. num_sequences, tokens: of the training text; run_tokens: of all steps,
    repetitions included. cache_bytes: of the features that are not in the cache yet. cache_free, out_free: free room on
    the disks of the cache and of the run; same_disk: whether they are one file system. memory_limit: bytes that all
    ranks together may hold.
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
    cache_dir: str
    cache_free: int
    out: str
    out_free: int
    same_disk: bool
    save_every: int
    keep_last: int
    memory_limit: int


def held_bytes(thing) -> int:
    """Bytes of all Vars that an object holds, in its attributes, lists and tables, each counted once."""
    seen: set[int] = set()

    def walk(value) -> int:
        if id(value) in seen or isinstance(value, type | ModuleType | str | np.ndarray):
            return 0
        seen.add(id(value))
        if isinstance(value, jt.Var):
            return int(value.numel()) * np.dtype(str(value.dtype)).itemsize
        if hasattr(value, "element_size"):  # a PyTorch tensor
            return value.numel() * value.element_size()
        if isinstance(value, Mapping):
            return sum(map(walk, value.values()))
        if isinstance(value, list | tuple):
            return sum(map(walk, value))
        return sum(map(walk, vars(value).values())) if hasattr(value, "__dict__") else 0

    return walk(thing)


def memory_limit() -> int:
    """Bytes that this process may hold: the free memory and what it holds already, or its control group's limit."""
    limit = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if CGROUP_LIMIT.exists() and (text := CGROUP_LIMIT.read_text().strip()).isdigit():
        limit = min(limit, int(text))
    return limit


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _stage_plans(setting: Setting) -> tuple[StagePlan, ...]:
    head, optimizer = setting.head, OPTIMIZERS[setting.config.optimizer]
    if not head.trained:
        return ()
    plans = []
    for stretch in stretches(head.stages(), setting.num_steps):
        parameters = moments = 0
        for name, parameter in head.trainable().items():
            if stretch.stage.rate(name) is not None:
                shape = tuple(parameter.shape)
                parameters += math.prod(shape)
                moments += math.prod(shape) * len(optimizer.slots_of(shape, vocab_sizes(head)))
        plans.append(StagePlan(stretch.stage.name, parameters, moments, stretch.last - stretch.first))
    return tuple(plans)


def _missing_cache_bytes(setting: Setting) -> int:
    config, splits, names = setting.config, setting.splits, array_names(setting.head.layers)
    if config.features != "cache" or not setting.head.trained:
        return 0
    total = 0
    for data in (splits.training, splits.held_out):
        store = feature_store(setting.backbone, splits.tokenizer.fingerprint, data, Path(config.cache_dir))
        total += store.num_bytes(set(store.all(names)) - store.present(names))
    return total


def plan_run(setting: Setting, out: Path) -> Plan:
    """The plan of a run. out: its directory."""
    config, head, training = setting.config, setting.head, setting.splits.training
    epoch = batches(training, config.tokens_per_step, seed=config.seed)
    epoch_tokens = sum(int(training.lengths[step].sum()) for step in epoch)  # with --data-weights, not the text's
    out_place, cache_place = _existing(out), _existing(Path(config.cache_dir))
    return Plan(
        **{name: getattr(config, name) for name in OPTIONS},
        parameters=head.num_parameters,
        head_bytes=FLOAT * sum(int(p.numel()) for _, p in head.named_parameters()),
        stages=_stage_plans(setting),
        ema=bool(config.ema) and head.trained,
        ranks=runtime.world_size(),
        backbone=config.backbone or "embedded tiny-vicuna",
        backbone_bytes=held_bytes(setting.backbone),
        backbone_max_length=setting.backbone.config.max_positions,
        num_sequences=len(training),
        tokens=int(training.offsets[-1]),
        held_out_tokens=int(setting.splits.held_out.offsets[-1]),
        num_steps=setting.num_steps,
        run_tokens=round(epoch_tokens * setting.num_steps / len(epoch)),
        cache_bytes=_missing_cache_bytes(setting),
        cache_free=shutil.disk_usage(cache_place).free,
        out=str(out),
        out_free=shutil.disk_usage(out_place).free,
        same_disk=out_place.stat().st_dev == cache_place.stat().st_dev,
        memory_limit=memory_limit(),
    )
