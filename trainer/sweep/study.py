"""Searches for the options with the longest expected accept length, by many short trainings (Optuna).

    python -m trainer.sweep --head gated_rnn --space sweep.yaml --trials 20 --max-steps 300 --score-every 50

The space is YAML, see ``trainer.sweep.space``; every option of train.py is accepted too and holds for all trials. The
study is a database: Ctrl-C loses one trial, and the same command resumes the study. With a ``--storage`` that several
machines can reach, the same command on each of them works on one study.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from runtime.entry import Parser, suggest
from runtime.files.documents import plain, read_yaml
from runtime.options import flag
from trainer.config import FIELDS, OUTPUT, TrainConfig, differences, parse
from trainer.sweep.space import Space, apply, check_keys, make_space

SWEEPS = Path("runs") / "sweeps"
FAILURES = 3  # consecutive failed trials that end a sweep: then the options are wrong
FAILING = (FloatingPointError, ValueError)  # a training that diverged, options that make no head
# Seconds between heartbeats of a trial, and without one until it is given up and repeated.
HEARTBEAT_S, SILENCE_S = 60, 300
CONSOLE = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Sweep:
    """What a command line asks for. base: the options of every trial; trials: in all, over all calls and machines."""

    study: str
    storage: str
    trials: int
    base: TrainConfig
    space: Space

    @property
    def folder(self) -> Path:
        """The directory of the trials."""
        return SWEEPS / self.study

    def config(self, trial: FrozenTrial | Trial) -> TrainConfig:
        """The options of a trial, its directory included."""
        return dataclasses.replace(apply(self.base, trial.params), out=str(self.folder / str(trial.number)))


def parse_sweep(arguments: Sequence[str]) -> Sweep:
    """The sweep that a command line asks for. Raises ValueError; mistyped options and keys, except those of the head,
    are reported before anything is loaded."""
    parser = Parser(
        prog="python -m trainer.sweep",
        description="Search for the options that give a head the longest expected accept length.",
        epilog="Every option of train.py is accepted too: python train.py --head NAME --help",
        allow_abbrev=False,
    )
    parser.add_argument("--space", metavar="FILE", help="YAML file of the options to vary")
    parser.add_argument("--trials", type=int, metavar="N", default=20, help="trials in all (default: %(default)s)")
    parser.add_argument("--storage", metavar="URL", help="SQLAlchemy URL (default: sqlite in runs/sweeps/<study>.db)")
    parser.add_argument("--study", metavar="NAME", help="name of the study (default: the head's)")
    options, rest = parser.parse_known_args(arguments)
    known = [name for action in parser._actions for name in action.option_strings]
    known += ["--config", *map(flag, FIELDS)]
    for word in rest:
        name = word.split("=")[0]
        if name.startswith("--") and not name.startswith("--head.") and name not in known:
            raise suggest("option", name, known)
    if options.space is None:
        raise ValueError("--space FILE is needed: a YAML file of the options to vary")
    if options.trials < 1:
        raise ValueError(f"--trials must be above 0, got {options.trials}")
    entries = check_keys(read_yaml(Path(options.space)), options.space)
    base = parse(rest)
    for name in ("out", "resume", "dry_run"):
        if getattr(base, name):
            raise ValueError(f"{flag(name)} cannot be combined with a sweep; each trial has its own directory")
    study = options.study or base.head
    if not re.fullmatch(r"\w[\w.-]*", study):
        raise ValueError(f"--study names a folder: letters, digits, dots and dashes, got {study!r}")
    storage = options.storage or f"sqlite:///{SWEEPS / study}.db"
    return Sweep(study, storage, options.trials, base, make_space(entries, base, options.space))


# The study ------------------------------------------------------------------------------------------------------------


class SeededSampler(TPESampler):
    """TPE whose random numbers depend only on the seed and the trial's number: a resumed sweep, or one shared by
    machines, draws the trials that it would have drawn."""

    def __init__(self, seed: int):
        super().__init__(seed=seed)
        self.base_seed = seed % 2**32

    def before_trial(self, study, trial):
        super().__init__(seed=int(np.random.SeedSequence([self.base_seed, trial.number]).generate_state(1)[0]))
        super().before_trial(study, trial)


def open_study(sweep: Sweep) -> optuna.Study:
    """The study of a sweep, created where there is none. Raises ValueError for a storage that cannot be used, for a
    study with other options, and for a new one whose folder already holds trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats and their callback
            storage = RDBStorage(
                sweep.storage,
                heartbeat_interval=HEARTBEAT_S,
                grace_period=SILENCE_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
            )
        study = optuna.create_study(
            study_name=sweep.study,
            storage=storage,
            load_if_exists=True,
            direction="maximize",
            sampler=SeededSampler(sweep.base.seed),
            pruner=optuna.pruners.MedianPruner(),
        )
        known = study.user_attrs.get("sweep")
    except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError) as error:
        raise ValueError(f"--storage {sweep.storage} cannot be used: {str(error).splitlines()[0]}") from error
    # What all calls that work on one study must have in common, as JSON returns it.
    base = {key: value for key, value in dataclasses.asdict(sweep.base).items() if key not in OUTPUT}
    space = {f"space of {name}": repr(spec) for name, spec in sweep.space.items()}
    described = plain({"options": base, "space": space})
    if known is None:
        taken = [path for path in sweep.folder.iterdir() if path.name.isdigit()]
        if taken and not sweep.base.overwrite:
            raise ValueError(f"{taken[0]} exists, but the study is new; choose another --study or pass --overwrite")
        study.set_user_attr("sweep", described)
    elif known != described:
        found = [each for part in known for each in differences(known[part], described[part])]
        raise ValueError(
            f"study {sweep.study} in {sweep.storage} has other options: {'; '.join(found)}; use the same ones, or "
            "another --study"
        )
    return study


def count_trials(study: optuna.Study) -> int:
    """Trials that are finished or running. Those ended by Ctrl-C or a dead machine do not count: they are repeated."""
    done = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    trials = study.get_trials(deepcopy=False)
    return sum(t.state in done or (t.state == TrialState.FAIL and "error" in t.user_attrs) for t in trials)


# The trials -----------------------------------------------------------------------------------------------------------


def run_trials(sweep: Sweep, study: optuna.Study, train: Callable) -> None:
    """Run trials until the study has as many as the sweep asks for.

    train(config, on_score) -> FitResult trains once and reports every score; on_score returns whether to end it early.
    A trial that fails is recorded and the next one begins; FAILURES of them in a row raise ValueError. Ctrl-C queues
    the trial that it ended and is raised again.
    """
    trials = _Trials(sweep, train)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(study)
        if count_trials(study) >= sweep.trials:
            return
        try:
            study.optimize(trials.objective, n_trials=1, catch=FAILING, callbacks=[trials.report])
        except KeyboardInterrupt:
            if trials.current is not None:
                study.enqueue_trial(trials.current.params)
            left = sweep.trials - count_trials(study)
            say(f"study {sweep.study} is saved; the same command runs the remaining {left} trials")
            raise


class _Trials:
    """The trials that this process runs."""

    def __init__(self, sweep: Sweep, train: Callable):
        self.sweep, self.train = sweep, train
        self.current: Trial | None = None
        self.failures = 0

    def objective(self, trial: Trial) -> float:
        """Train once; returns the best expected accept length."""
        self.current = trial
        for name, spec in self.sweep.space.items():
            spec.suggest(trial, name)
        config = self.sweep.config(trial)
        ended = False

        def on_score(step: int, score) -> bool:
            nonlocal ended
            trial.report(score.expected_accept_length, step)
            ended = trial.should_prune()
            return ended

        try:
            config.check()
            result = self.train(config, on_score)
            if result.interrupted and not ended:
                raise KeyboardInterrupt
            value = float(result.best.expected_accept_length)
            if not math.isfinite(value):
                raise FloatingPointError(f"the expected accept length is {value}")
        except FAILING as error:
            trial.set_user_attr("error", " ".join(str(error).split()))
            raise
        if ended:
            raise optuna.TrialPruned
        trial.set_user_attr("best_step", result.best_step)
        return value

    def report(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Print a line about a trial that ended. Raises ValueError when too many failed in a row."""
        self.current = None
        outcome = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        score = trial.value if trial.value is not None else max(trial.intermediate_values.values(), default=None)
        values = " ".join(f"{name}={short(value)}" for name, value in trial.params.items())
        say(f"trial {trial.number} {outcome[trial.state]} {'-' if score is None else f'{score:.3f}'} {values}")
        self.failures = self.failures + 1 if trial.state == TrialState.FAIL else 0
        if trial.state == TrialState.FAIL:
            say(f"  {trial.user_attrs['error']}")
        if self.failures >= FAILURES:
            raise ValueError(
                f"{self.failures} trials in a row failed, the last one: {trial.user_attrs['error']}; the study is saved"
            )


def say(text: str) -> None:
    """A line on stderr."""
    CONSOLE.print(text, markup=False, soft_wrap=True)


def short(value) -> str:
    """An option's value, floats in four figures."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
