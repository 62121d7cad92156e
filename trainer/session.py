"""A training from its options to its record, for the command line, sweeps and dry runs."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import runtime
from backbone.model import Backbone
from heads.base import Head
from heads.checkpoint import weights_sha256
from heads.registry import build
from runtime.files.lock import locked
from runtime.ranks import barrier, share_from_main, text_from_main
from trainer.config import OUTPUT, TrainConfig
from trainer.data.splits import Splits, data_files, load_splits
from trainer.features.cache import OnlineFeatures, open_cache
from trainer.features.teacher import open_teacher
from trainer.fit import CHECKPOINT, LOG, FitResult, Run, count_steps, fit
from trainer.loss import Objective
from trainer.report.events import Events
from trainer.report.record import FILE, make_record
from trainer.report.watch import Watch, card
from trainer.scoring import Score
from trainer.state import STATES, State, check_identity, newest_state

# Options that a state compares by their effect (fingerprints, hashes) instead of their values.
BY_CONTENT = frozenset({"backbone", "data", "template", "head_options"})


@dataclass
class Setting:
    """All that a run needs. base: its description in checkpoints."""

    config: TrainConfig
    backbone: Backbone
    splits: Splits
    head: Head
    base: dict

    @property
    def identity(self) -> dict:
        """What a resumed run must have in common with the interrupted one."""
        options = {k: v for k, v in asdict(self.config).items() if k not in OUTPUT | BY_CONTENT}
        parts = {key: self.base[key] for key in ("head", "head_config", "tokenizer")}
        backbone = {key: self.base["backbone"][key] for key in ("fingerprint", "storage")}
        return {"options": options, **parts, "backbone": backbone, "data": self.base["data"]["sha256"]}

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return count_steps(self.config, self.splits.training, self.head)


def prepare(config: TrainConfig, splits: Splits | None = None) -> Setting:
    """Load text, backbone and a new head. splits: the text, if it is already loaded.

    Raises ValueError where they do not fit together.
    """
    splits = splits or load_splits(config)
    if len(splits.training) < runtime.world_size():
        raise ValueError(
            f"{runtime.world_size()} ranks share {len(splits.training)} training sequences, and each needs one; "
            "start fewer ranks or add text"
        )
    backbone = config.load()
    runtime.set_seed(config.seed)
    head = build(config.head, config.head_options, backbone)
    replies = splits.training.token_ids[splits.training.mask]
    head.prepare(np.bincount(replies, minlength=backbone.config.vocab_size))
    share_from_main([p for _, p in head.named_parameters()])
    base = {
        "head": config.head,
        "head_config": vars(head.config),
        "backbone": {
            "fingerprint": backbone.fingerprint,
            "path": config.backbone,
            "hidden_size": backbone.config.hidden_size,
            "vocab_size": backbone.config.vocab_size,
            "dtype": config.dtype,
            "storage": backbone.storage,
            "engine": config.backbone_engine,
        },
        "tokenizer": {"fingerprint": splits.tokenizer.fingerprint, "template": config.template},
        "num_parameters": head.num_parameters,
        "data": {
            "files": [Path(f).name for f in data_files(config)],
            "sha256": splits.sha256,
            "conversations": len(splits.training),
            "held_out": len(splits.held_out),
            "tokens": int(splits.training.offsets[-1]),
        },
    }
    return Setting(config, backbone, splits, head, base)


def run_directory(config: TrainConfig) -> Path:
    """The directory of a run, the same on every rank: --out, else a new one or, with --resume, the head's newest."""
    if config.out:
        return Path(config.out)
    root = Path("runs") / config.head
    if config.resume:
        states = sorted(root.glob(f"*/{STATES}"), key=lambda path: path.stat().st_mtime)
        if not states:
            raise ValueError(f"there is no run with a state under {root} to resume; pass --out")
        return Path(text_from_main(str(states[-1].parent)))
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return Path(text_from_main(str(root / stamp)))


def enter_directory(config: TrainConfig, out: Path) -> State | None:
    """Prepare the run's directory; with --resume, return the newest state, if there is one.

    Raises ValueError when it already holds a checkpoint and neither --overwrite nor --resume was given.
    """
    if config.resume:
        state = newest_state(out)
        if state is not None:
            return state
    elif (out / CHECKPOINT).exists() and not config.overwrite:
        raise ValueError(f"{out} already holds a checkpoint; choose another --out, or pass --overwrite or --resume")
    barrier()  # every rank has checked before rank 0 changes anything
    if runtime.is_main():
        out.mkdir(parents=True, exist_ok=True)
        (out / LOG).write_text("")
        if (out / STATES).exists():  # of an earlier run
            shutil.rmtree(out / STATES)
    return None


def open_sources(setting: Setting, watch: Watch) -> list:
    """The sources of the features of the training and of the held-out text."""
    config, layers = setting.config, tuple(setting.head.layers)
    parts = (setting.splits.training, setting.splits.held_out)
    if config.features == "online" or not setting.head.trained:
        return [OnlineFeatures(setting.backbone, part, layers) for part in parts]
    where = setting.splits.tokenizer.fingerprint, Path(config.cache_dir)
    ranks = runtime.rank(), runtime.world_size(), barrier
    return [
        open_cache(setting.backbone, where[0], part, layers, where[1], *watch.cache(part, name), *ranks)
        for part, name in zip(parts, ("features", "held out"), strict=True)
    ]


def make_objective(setting: Setting) -> Objective:
    """What the depths learn."""
    config = setting.config
    if config.loss == "ce":
        return Objective()
    share = 1.0 if config.loss == "kl" else config.kl_share
    k = min(config.kl_top, setting.backbone.config.vocab_size)
    return Objective(config.loss, share, open_teacher(setting.backbone, k, config.teacher))


def train(
    config: TrainConfig,
    on_score: Callable[[int, Score], bool] = lambda step, score: False,
    setting: Setting | None = None,
) -> tuple[FitResult, Path]:
    """Train one head in this process, all ranks together; returns the result and the directory of its files.

    on_score(step, score) is called after every score and returns whether the run should end there; setting: what
    ``prepare(config)`` gave, if it was called already. Raises ValueError for options that make no run, and naming the
    process that writes the same directory.
    """
    setting = setting or prepare(config)
    out, main = run_directory(config), runtime.is_main()
    with contextlib.ExitStack() as stack:
        if main:
            stack.enter_context(locked(out))
        state = enter_directory(config, out)
        if state is not None:
            check_identity(state, setting.identity)
        first, num_steps = state.step if state else 0, setting.num_steps
        if first > num_steps:
            raise ValueError(f"{state.directory} is of step {first}, the run has {num_steps}; delete it to resume")
        if main:
            card(config, setting.backbone, setting.head, setting.splits.report, num_steps, out)
        events = stack.enter_context(Events(out, first)) if config.tensorboard and main else None
        watch = stack.enter_context(Watch(num_steps, first, quiet=not main))
        if state is not None:
            watch.say(f"resumed   from step {first} of {num_steps}")
        sources = open_sources(setting, watch)

        def scored(step: int, score: Score) -> bool:
            watch.score(step, score, best=run.best_step == step)
            if events:
                events.score(step, score)
            return on_score(step, score)

        def stepped(step: int, total: int, record: dict) -> None:
            watch.step(step, total, record)
            if events:
                events.step(step, record)

        run = Run(config, setting.head, setting.base, out, setting.identity, scored)
        objective = make_objective(setting)
        result = fit(run, setting.splits.training, setting.splits.held_out, *sources, stepped, objective, state)
        if main:
            write_record(setting, result, out)
    return result, out


def write_record(setting: Setting, result: FitResult, out: Path) -> None:
    """Write ``train.json`` of a finished run."""
    checkpoint = out / CHECKPOINT
    record = make_record(
        setting.config,
        result,
        data={**setting.base["data"], "report": setting.splits.report.as_dict()},
        provenance=runtime.provenance(setting.config.seed),
        parameters=setting.head.num_parameters,
        checkpoint=checkpoint,
        weights_sha256=weights_sha256(checkpoint),
    )
    record.write(out / FILE)
