"""Our training beside the same training in plain PyTorch, in turns, on the same batches and as many threads.

    python bench/peers/torch_train.py --out results/train-peers.json

Three trainings of each head on the CPU, from the same weights: PyTorch with transformers' backbone at every step,
PyTorch on our feature cache, and ours on it. PyTorch is first tried in several ways, and the fastest counts. Writing
the cache, once for all heads and runs, is not in the figures. Notes go to stderr; stdout gets a table and one line of
JSON. Run it on a quiet machine: four heads take about 20 minutes, 15 with --no-compile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from backbone.tokenizer import EMBEDDED
from bench.measure.gauges import interleave
from bench.peers.train_process import TrainProcess
from bench.record.schema import check_writable, write_atomically
from runtime.entry import Parser, run_entry, suggest
from runtime.interrupt import deferred_interrupts
from runtime.start.bootstrap import SPIN_COUNT
from trainer.config import TrainConfig
from trainer.config import parse as parse_training

NOTES = Console(stderr=True, highlight=False, soft_wrap=True)
BUSY = 0.25  # processes per thread, over the last minute, from which on a note says so
COMPARED = ("mlp", "hydra", "gated_rnn", "eagle")
ONLINE, CACHED, OURS = "torch_online", "torch_cached", "ours"
WARM_UP = 2  # rounds before those that count
TRIAL_STEPS, TRIALS = 4, 3
SAME_LOSS = 0.02  # share by which the losses of the last step may differ: one backbone is float32, one cache float16
SPIN = "GOMP_SPINCOUNT"  # how long a thread turns at a barrier before it sleeps; see runtime/start/bootstrap.py
# glibc hands large blocks back when they are freed, and every step then takes 15,000 page faults, 3% of its time. This
# keeps them, which is what PyTorch's tuning guide uses jemalloc for.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


@dataclass(frozen=True)
class Way:
    """How PyTorch runs. sleeping: waiting threads soon sleep, as ours do, instead of torch's own choice; chunked,
    compiled: see ``bench.peers.torch_trainer.TorchTrainer``."""

    sleeping: bool = False
    chunked: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join(word for word, chosen in dataclasses.asdict(self).items() if chosen) or "plain"


WAYS = (Way(), Way(sleeping=True), Way(chunked=True), Way(compiled=True))


def build_parser() -> Parser:
    """The options of this entry."""
    parser = Parser(prog="bench/peers/torch_train.py", description=__doc__.splitlines()[0], allow_abbrev=False)

    def add(flag: str, help: str, **settings) -> None:
        default = settings.get("default")
        parser.add_argument(flag, help=help if default is None else f"{help} (default: {default})", **settings)

    add("--heads", f"which heads (default: {' '.join(COMPARED)})", nargs="+", metavar="NAME")
    add("--steps", "optimizer steps of a round", type=int, default=20, metavar="N")
    add("--rounds", f"rounds that count, after {WARM_UP} that do not", type=int, default=5, metavar="N")
    add("--threads", "of each training (default: the cores that this process may use)", type=int, metavar="N")
    add("--tokens-per-step", "tokens of text per optimizer step", type=int, default=2048, metavar="N")
    add("--data", "training text (default: the embedded corpus)", nargs="+", metavar="FILE")
    add("--cache-dir", "where feature caches lie (default: that of train.py)", metavar="DIR")
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile, which takes minutes")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked options. Raises ValueError for unknown ones and for values that make no run."""
    options = build_parser().parse_args(arguments)
    options.heads = list(dict.fromkeys(options.heads or COMPARED))
    if options.threads is None:
        options.threads = len(os.sched_getaffinity(0))
    for name in ("steps", "rounds", "threads", "tokens_per_step"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    for name in options.heads:
        if name not in COMPARED:
            raise suggest("head of the comparison", name, COMPARED)
    if importlib.util.find_spec("torch") is None:
        raise ValueError("torch is not installed; it comes with requirements-dev.txt: make setup-dev")
    return options


def note(text: str) -> None:
    """A line for the person at the terminal."""
    NOTES.print(text, markup=False)


def training_config(name: str, options: argparse.Namespace) -> TrainConfig:
    """The head's own recipe for as many steps as are measured. Hard labels, no scores, no states."""
    steps = (WARM_UP + options.rounds) * options.steps
    words = ["--head", name, "--max-steps", str(steps), "--tokens-per-step", str(options.tokens_per_step)]
    words += ["--score-every", str(steps + 1), "--save-every", "0", "--loss", "ce"]
    words += ["--data", *options.data] if options.data else []
    words += ["--cache-dir", options.cache_dir] if options.cache_dir else []
    config = parse_training(words)
    config.epochs = float(steps)  # an epoch has a step at least
    return config


@dataclass
class Prepared:
    """What the three trainings of a head begin from. torch: the task of PyTorch's process but for its way; files: the
    shards of the feature cache."""

    config: TrainConfig
    num_parameters: int
    torch: dict
    files: list[tuple[str, int]]


def prepare_head(config: TrainConfig, splits, scratch: Path, threads: int) -> Prepared:
    """Write the feature cache if it is not there, and to ``scratch`` the text and the initial weights."""
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
    kept = {name: value for name, value in os.environ.items() if way is None or name != SPIN}
    kept["OMP_NUM_THREADS"] = str(threads)
    if way:
        kept |= KEEP_MEMORY | {"TMPDIR": str(scratch)}  # where torch.compile keeps what it makes
        kept |= {SPIN: SPIN_COUNT} if way.sleeping else {}
    return kept


def start_torch(prepared: Prepared, cached: bool, way: Way, scratch: Path) -> TrainProcess:
    """PyTorch's training. Raises RuntimeError where it does not run this way."""
    task = {**prepared.torch, "files": prepared.files if cached else None}
    task |= {"chunked": way.chunked, "compiled": way.compiled}
    return TrainProcess("torch", task, environment(prepared.torch["threads"], scratch, way))


def start_ours(prepared: Prepared, scratch: Path) -> TrainProcess:
    """Our training."""
    task = {"config": prepared.torch["config"], "out": str(scratch / "runs" / prepared.config.head)}
    return TrainProcess("ours", task, environment(prepared.torch["threads"], scratch, None))


def choose(start, ways: Sequence[Way], steps: int = TRIAL_STEPS) -> tuple[Way, dict[str, dict | None]]:
    """The fastest way, and of each by name its trial: milliseconds of a step and the peak of memory, None where it does
    not run. start(way) -> a process; steps: of a trial. Raises RuntimeError when none runs."""
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
        raise RuntimeError("PyTorch's training runs in no way; the reasons stand above")
    return min(speeds, key=speeds.get), trials


def peak_of(answers: Sequence[Mapping]) -> int | None:
    """The largest peak of memory; None where the system does not tell."""
    peaks = [answer["peak_bytes"] for answer in answers]
    return None if None in peaks else max(peaks)


def measure_head(prepared: Prepared, options: argparse.Namespace, scratch: Path, notes: list[str]) -> dict:
    """The three trainings of a head in turns, as the record holds them."""
    name, ways = prepared.config.head, [way for way in WAYS if not (way.compiled and options.no_compile)]
    chosen = {}
    for variant, cached in ((ONLINE, False), (CACHED, True)):
        begin = functools.partial(start_torch, prepared, cached, scratch=scratch)
        chosen[variant] = choose(begin, ways, min(TRIAL_STEPS, options.steps))
        way, trials = chosen[variant]
        told = ", ".join(f"{key} {t['step_ms']:.0f} ms" if t else f"{key} -" for key, t in trials.items())
        note(f"trials    {name}, {variant}: {told}; taken: {way.name}")
    with contextlib.ExitStack() as stack:
        processes = {OURS: stack.enter_context(contextlib.closing(start_ours(prepared, scratch)))}
        for variant, (way, _) in chosen.items():
            started = start_torch(prepared, variant == CACHED, way, scratch)
            processes[variant] = stack.enter_context(contextlib.closing(started))
        turns = {v: lambda p=p: p.steps(options.steps)["seconds"] for v, p in processes.items()}
        interleave(turns, options.rounds, turn_s=0)
        kept = {variant: process.answers[WARM_UP:] for variant, process in processes.items()}
        ready = {variant: process.ready for variant, process in processes.items()}
    tokens = {variant: [answer["tokens"] for answer in answers] for variant, answers in kept.items()}
    assert tokens[ONLINE] == tokens[CACHED] == tokens[OURS], tokens  # the same batches
    notes += differing_losses(name, {variant: answers[-1]["losses"] for variant, answers in kept.items()})
    variants = {variant: describe(answers) for variant, answers in kept.items()}
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
    """A note for every PyTorch training whose losses of the last step are not ours: then the work was not the same."""
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
    """Our speed over theirs, round by round, so that both saw the same text and the same minutes."""
    pairs = zip(ours["tokens_per_s"]["rounds"], theirs["tokens_per_s"]["rounds"], strict=True)
    return spread([a / b for a, b in pairs])


def measure(options: argparse.Namespace) -> dict:
    """The whole record, JSON-ready. Raises ValueError for text that cannot be trained on."""
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "GORGON_DEVICE": "cpu"}  # before Jittor starts here
    load = os.getloadavg()[0]
    from trainer.data.splits import load_splits

    configs = {name: training_config(name, options) for name in options.heads}
    splits = load_splits(configs[options.heads[0]])

    import runtime

    provenance, notes, heads = runtime.provenance(0), [], {}
    if load > BUSY * options.threads:
        notes.append(f"the machine was busy: {load:.1f} processes ran on {options.threads} threads before this began")
    note(f"machine   {provenance['device_name']}, {options.threads} threads")
    # Not before Jittor has started: it ends processes by a SIGTERM that they would put off too.
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


def table_of(record: Mapping) -> Table:
    """A line per head and training."""
    table = Table(title=f"training, {record['threads']} threads, tokens of text per second", title_justify="left")
    for column in ("head", "training", "tokens/s", "quartiles", "peak MB", "ours is faster by"):
        table.add_column(column, justify="left" if column in ("head", "training") else "right")
    for name, head in record["heads"].items():
        for variant, each in head["variants"].items():
            speed, peak, times = each["tokens_per_s"], each["peak_bytes"], head["speedup"].get(variant)
            table.add_row(
                name,
                variant if variant == OURS else f"{variant} ({Way(**each['way']).name})",
                f"{speed['median']:.0f}",
                f"{speed['low']:.0f} to {speed['high']:.0f}",
                "-" if peak is None else f"{peak / 1e6:.0f}",
                f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})" if times else "",
            )
    return table


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    options = parse(arguments)
    if options.out:
        check_writable(options.out)
    record = measure(options)
    if options.out:
        write_atomically(options.out, json.dumps(record, indent=1) + "\n")
    from bench.compare import show_table

    show_table(table_of(record))
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
