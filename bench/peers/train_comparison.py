"""Three trainings of each head from the same weights, for ``bench/peers/torch_train.py``: PyTorch with transformers'
backbone at every step, PyTorch on our feature cache, and ours on it. PyTorch is first tried in several ways, and the
fastest counts. Writing the cache, once for all heads and runs, is not in the figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

from backbone.tokenizer import EMBEDDED
from bench.clock.timing import busy_note, interleave
from bench.peers.process import torch_environment
from bench.peers.train_process import TrainProcess
from bench.tables.terminal import note, show_table
from runtime.entry import suggest
from runtime.interrupt import deferred_interrupts
from runtime.options import option
from trainer.config import TrainConfig
from trainer.config import parse as parse_training

COMPARED = ("mlp", "hydra", "gated_rnn", "eagle")
ONLINE, CACHED, OURS = "torch_online", "torch_cached", "ours"
WARM_UP = 2  # rounds before those that count
TRIAL_STEPS, TRIALS = 4, 3
SAME_LOSS = 0.02  # relative difference allowed between last losses: one backbone is float32, one cache float16
# glibc returns freed large blocks to the system, and every step then takes 15,000 page faults, 3% of its time. This
# keeps them in the process, for which PyTorch's tuning guide uses jemalloc.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


@dataclass(frozen=True)
class Way:
    """How PyTorch runs. sleeping: waiting threads soon sleep, as ours do, instead of torch's own setting; chunked,
    compiled: see ``bench.peers.torch_trainer.TorchTrainer``."""

    sleeping: bool = False
    chunked: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join(word for word, chosen in dataclasses.asdict(self).items() if chosen) or "plain"


WAYS = (Way(), Way(sleeping=True), Way(chunked=True), Way(compiled=True))


@dataclass
class TrainPeerOptions:
    """The options of bench/peers/torch_train.py."""

    heads: list[str] = option([], f"which heads (default: {' '.join(COMPARED)})", metavar="NAME")
    steps: int = option(20, "optimizer steps of a round", metavar="N", least=1)
    rounds: int = option(5, f"rounds that count, after {WARM_UP} that do not", metavar="N", least=1)
    threads: int | None = option(
        None, "of each training (default: the cores that this process may use)", metavar="N", least=1
    )
    tokens_per_step: int = option(2048, "tokens of text per optimizer step", metavar="N", least=1)
    data: list[str] = option([], "training text (default: the embedded corpus)", metavar="FILE")
    cache_dir: str | None = option(None, "where feature caches are (default: that of train.py)", metavar="DIR")
    no_compile: bool = option(False, "do not try torch.compile, which takes minutes")
    out: str | None = option(None, "write the JSON here too", metavar="FILE")

    def check(self) -> None:
        """Fill in the defaults that depend on others. Raises ValueError for an unknown head."""
        self.heads = list(dict.fromkeys(self.heads or COMPARED))
        self.threads = self.threads or len(os.sched_getaffinity(0))
        for name in self.heads:
            if name not in COMPARED:
                raise suggest("head of the comparison", name, COMPARED)


def training_config(name: str, options: TrainPeerOptions) -> TrainConfig:
    """The head's own recipe for as many steps as are measured, with hard labels, without scores and states."""
    steps = (WARM_UP + options.rounds) * options.steps
    words = ["--head", name, "--max-steps", str(steps), "--tokens-per-step", str(options.tokens_per_step)]
    words += ["--score-every", str(steps + 1), "--save-every", "0", "--loss", "ce"]
    words += ["--data", *options.data] if options.data else []
    words += ["--cache-dir", options.cache_dir] if options.cache_dir else []
    config = parse_training(words)
    config.epochs = float(steps)  # an epoch has at least one step
    return config


@dataclass
class Prepared:
    """What the three trainings of a head begin with. torch: the task of PyTorch's process without its way; files: the
    shards of the feature cache."""

    config: TrainConfig
    num_parameters: int
    torch: dict
    files: list[tuple[str, int]]


def prepare_head(config: TrainConfig, splits, scratch: Path, threads: int) -> Prepared:
    """Write the feature cache if it is missing, and to ``scratch`` the text and the initial weights."""
    from heads.checkpoint import save_parameters
    from trainer.report.watch import Watch
    from trainer.session import open_sources, prepare

    setting = prepare(config, splits)
    with Watch(0) as watch:
        source, _ = open_sources(setting, watch)
    weights, data, text = scratch / f"{config.head}.safetensors", scratch / "text.npz", splits.training
    save_parameters(setting.head, weights)
    np.savez(data, token_ids=text.token_ids, mask=text.mask, offsets=text.offsets, weights=text.weights)
    store = source.store
    files = [(str(store.path(("hidden", i)).resolve()), store.num_rows(i)) for i in range(store.num_shards)]
    task = {
        "config": dataclasses.asdict(config),
        "head_config": vars(setting.head.config),
        "directory": str(EMBEDDED),
        "data": str(data),
        "weights": str(weights),
        "threads": threads,
    }
    return Prepared(config, setting.head.num_parameters, task, files)


def environment(threads: int, scratch: Path, way: Way | None) -> dict[str, str]:
    """Of a training process; way: None for ours."""
    if way is None:
        return {**os.environ, "OMP_NUM_THREADS": str(threads)}
    own = {"OMP_NUM_THREADS": str(threads), "TMPDIR": str(scratch)}  # torch.compile writes to the latter
    return torch_environment(way.sleeping) | KEEP_MEMORY | own


def start_torch(prepared: Prepared, cached: bool, way: Way, scratch: Path) -> TrainProcess:
    """PyTorch's training. Raises RuntimeError if it does not run this way."""
    task = {**prepared.torch, "files": prepared.files if cached else None}
    task |= {"chunked": way.chunked, "compiled": way.compiled}
    return TrainProcess("torch", task, environment(prepared.torch["threads"], scratch, way))


def start_ours(prepared: Prepared, scratch: Path) -> TrainProcess:
    """Our training."""
    task = {"config": prepared.torch["config"], "out": str(scratch / "runs" / prepared.config.head)}
    return TrainProcess("ours", task, environment(prepared.torch["threads"], scratch, None))


def choose(start, ways: Sequence[Way], steps: int = TRIAL_STEPS) -> tuple[Way, dict[str, dict | None]]:
    """The fastest way, and by name the trial of each: milliseconds of a step and peak of memory, None if it does not
    run. start(way) -> a process; steps: of a trial. Raises RuntimeError if none runs."""
    trials, speeds = {}, {}
    for way in ways:
        try:
            with contextlib.closing(start(way)) as process:
                process.steps(steps)
                answers = [process.steps(steps) for _ in range(TRIALS)]
        except RuntimeError as error:
            note(f"  {way.name}: {error}")
            trials[way.name] = None
            continue
        ms = float(np.median([answer["seconds"] for answer in answers])) / steps * 1e3
        trials[way.name] = {"step_ms": ms, "peak_bytes": peak_of(answers)}
        speeds[way] = ms
    if not speeds:
        raise RuntimeError("PyTorch's training runs in no way; see the reasons above")
    return min(speeds, key=speeds.get), trials


def peak_of(answers: Sequence[Mapping]) -> int | None:
    """The largest peak of memory; None if the system does not record it."""
    peaks = [answer["peak_bytes"] for answer in answers]
    return None if None in peaks else max(peaks)


def measure_head(prepared: Prepared, options: TrainPeerOptions, scratch: Path, notes: list[str]) -> dict:
    """The three trainings of a head in turns, as the record holds them."""
    name, ways = prepared.config.head, [way for way in WAYS if not (way.compiled and options.no_compile)]
    chosen = {}
    for variant, cached in ((ONLINE, False), (CACHED, True)):
        begin = functools.partial(start_torch, prepared, cached, scratch=scratch)
        chosen[variant] = choose(begin, ways, min(TRIAL_STEPS, options.steps))
        way, trials = chosen[variant]
        tried = ", ".join(f"{key} {t['step_ms']:.0f} ms" if t else f"{key} -" for key, t in trials.items())
        note(f"trials    {name}, {variant}: {tried}; chosen: {way.name}")
    with contextlib.ExitStack() as stack:
        processes = {OURS: stack.enter_context(contextlib.closing(start_ours(prepared, scratch)))}
        for variant, (way, _) in chosen.items():
            started = start_torch(prepared, variant == CACHED, way, scratch)
            processes[variant] = stack.enter_context(contextlib.closing(started))
        turns = {v: lambda p=p: p.steps(options.steps)["seconds"] for v, p in processes.items()}
        interleave(turns, options.rounds, turn_s=0)
        counted = {variant: process.answers[WARM_UP:] for variant, process in processes.items()}
        ready = {variant: process.ready for variant, process in processes.items()}
    tokens = {variant: [answer["tokens"] for answer in answers] for variant, answers in counted.items()}
    assert tokens[ONLINE] == tokens[CACHED] == tokens[OURS], tokens  # the same batches
    notes += differing_losses(name, {variant: answers[-1]["losses"] for variant, answers in counted.items()})
    variants = {variant: describe(answers) for variant, answers in counted.items()}
    for variant, (way, trials) in chosen.items():
        adamw = {key: ready[variant][key] for key in ("adamw", "adamw_trials_ms")}
        variants[variant] |= {"way": dataclasses.asdict(way), "trials": trials, **adamw}
    return {
        "num_parameters": prepared.num_parameters,
        "learning_rate": prepared.config.learning_rate,
        "head_config": prepared.torch["head_config"],
        "round_tokens": tokens[OURS],
        "variants": variants,
        "speedup": {variant: ratio(variants[OURS], variants[variant]) for variant in (ONLINE, CACHED)},
    }


def differing_losses(name: str, losses: Mapping[str, Sequence[float]]) -> list[str]:
    """A note for every PyTorch training whose last losses are not ours: then the work was not the same."""
    ours, notes = np.asarray(losses[OURS]), []
    for variant in (ONLINE, CACHED):
        apart = float(np.max(np.abs(np.asarray(losses[variant]) - ours) / ours))
        if not apart < SAME_LOSS:
            notes.append(f"{name}: the losses of {variant} differ from ours by {apart:.1%}: not the same training")
    return notes


def spread(values: Sequence[float]) -> dict:
    """Median, quartiles and the values themselves."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high, "rounds": list(values)}


def describe(answers: Sequence[Mapping]) -> dict:
    """A training's rounds. low and high are quartiles."""
    return {
        "tokens_per_s": spread([answer["tokens"] / answer["seconds"] for answer in answers]),
        "peak_bytes": peak_of(answers),
        "last_losses": answers[-1]["losses"],
    }


def ratio(ours: Mapping, theirs: Mapping) -> dict:
    """Our speed over theirs, round by round, so that both had the same text at about the same time."""
    pairs = zip(ours["tokens_per_s"]["rounds"], theirs["tokens_per_s"]["rounds"], strict=True)
    return spread([a / b for a, b in pairs])


def measure(options: TrainPeerOptions) -> dict:
    """The record, JSON-ready. Raises ValueError for text that cannot be trained on."""
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "GORGON_DEVICE": "cpu"}  # before Jittor starts here
    notes = busy_note(options.threads)
    from trainer.data.splits import load_splits

    configs = {name: training_config(name, options) for name in options.heads}
    splits = load_splits(configs[options.heads[0]])

    import runtime

    provenance, heads = runtime.provenance(0), {}
    note(f"machine   {provenance['device_name']}, {options.threads} threads")
    # Only after Jittor has started: it ends processes by a SIGTERM, which would be deferred too.
    with deferred_interrupts(), tempfile.TemporaryDirectory(prefix="train-peers-") as folder:
        for name, config in configs.items():
            prepared = prepare_head(config, splits, Path(folder), options.threads)
            note(f"head      {name}, {prepared.num_parameters / 1e6:.2f} M parameters, {config.max_steps} steps")
            heads[name] = measure_head(prepared, options, Path(folder), notes)
    for line in notes:
        note(f"note: {line}")
    return {
        "schema_version": 1,
        "kind": "train-peers",
        "provenance": provenance,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "threads": options.threads,
        "steps_per_round": options.steps,
        "rounds": options.rounds,
        "tokens_per_step": options.tokens_per_step,
        "torch_environment": KEEP_MEMORY,
        "data": {
            "files": [Path(file).name for file in splits.report.files],
            "sha256": splits.sha256,
            "sequences": len(splits.training),
            "tokens": int(splits.training.offsets[-1]),
        },
        "heads": heads,
        "notes": notes,
    }


def show_trainings(record: Mapping) -> None:
    """Print a row per head and training."""
    rows = []
    for name, head in record["heads"].items():
        for variant, each in head["variants"].items():
            speed, peak, times = each["tokens_per_s"], each["peak_bytes"], head["speedup"].get(variant)
            rows.append(
                {
                    "head": name,
                    "training": variant if variant == OURS else f"{variant} ({Way(**each['way']).name})",
                    "tokens/s": f"{speed['median']:.0f}",
                    "quartiles": f"{speed['low']:.0f} to {speed['high']:.0f}",
                    "peak MB": "-" if peak is None else f"{peak / 1e6:.0f}",
                    "ours is faster by": f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})"
                    if times
                    else "",
                }
            )
    title = f"training, {record['threads']} threads, tokens of text per second"
    show_table(title, pd.DataFrame(rows), ["head", "training"])
