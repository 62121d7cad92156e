"""Many short trainings that look for the options with the longest expected accept length (Optuna).

    python -m trainer.sweep --head gated_rnn --space sweep.yaml --trials 20 --max-steps 300 --score-every 50

The space is YAML, see ``trainer.sweep.space``; every option of train.py is taken as well and holds for all trials. The
study lies in a database, so that Ctrl-C costs one trial and the same command goes on; with ``--storage`` on a database that
several machines see, the same command on each of them works at one study.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import yaml
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import SQLAlchemyError

from runtime.atomic import write_file
from runtime.entry import Parser, run_entry, suggest
from runtime.options import flag
from runtime.start.bootstrap import under_mpi
from trainer.config import FIELDS, OUTPUT, TrainConfig, parse, read_yaml
from trainer.sweep.space import Space, apply, check_keys, make_space

SWEEPS = Path("runs") / "sweeps"
FAILURES = 3  # failed trials in a row that end a sweep: it is the options then, not bad luck
FAILING = (FloatingPointError, ValueError)  # a training that diverged, options that make no head
# Seconds between the signs of life of a trial, and without one until it is given up and tried again.
HEARTBEAT_S, SILENCE_S = 60, 300
SHOWN = 10  # trials of the table at the end
RUN_ONLY = ("out", "overwrite", "resume", "dry_run")  # options that do not belong in the best trial's file
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
        """Where the trials lie."""
        return SWEEPS / self.study

    def config(self, trial: FrozenTrial | Trial) -> TrainConfig:
        """The options of a trial, its directory among them."""
        return dataclasses.replace(apply(self.base, trial.params), out=str(self.folder / str(trial.number)))


# The command line -----------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="python -m trainer.sweep",
        description="Look for the options that give a head the longest expected accept length.",
        epilog="Every option of train.py is taken too: python train.py --head NAME --help",
        allow_abbrev=False,
    )
    parser.add_argument("--space", metavar="FILE", help="YAML file of the options to vary")
    parser.add_argument("--trials", type=int, metavar="N", default=20, help="trials in all (default: %(default)s)")
    parser.add_argument("--storage", metavar="URL", help="SQLAlchemy URL (default: sqlite in runs/sweeps/<study>.db)")
    parser.add_argument("--study", metavar="NAME", help="name of the study (default: the head's)")
    return parser


def parse_sweep(arguments: Sequence[str]) -> Sweep:
    """The sweep that a command line asks for. Raises ValueError; a mistyped option or key is answered before anything
    is loaded, but for those of the head."""
    parser = _parser()
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
            raise ValueError(f"{flag(name)} does not go with a sweep; each trial has a directory")
    study = options.study or base.head
    if not re.fullmatch(r"\w[\w.-]*", study):
        raise ValueError(f"--study names a folder: letters, digits, dots and dashes, got {study!r}")
    storage = options.storage or f"sqlite:///{SWEEPS / study}.db"
    return Sweep(study, storage, options.trials, base, make_space(entries, base, options.space))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for a mistake of the user's, 130 when Ctrl-C ended it."""
    return run_entry(_main, arguments)


def _main(arguments: Sequence[str]) -> None:
    if under_mpi():
        raise ValueError("a sweep is one process; start the same command on each machine, without mpirun")
    sweep = parse_sweep(arguments)
    study = open_study(sweep)
    from trainer.data.splits import load_splits

    splits = load_splits(sweep.base)  # the same for all trials; mistakes in the text come before the first of them
    from trainer.fit import Pruned
    from trainer.session import prepare, train

    run_trials(sweep, study, lambda config, on_score: train(config, on_score, prepare(config, splits)).result, Pruned)
    print(finish(sweep, study))


# The study ------------------------------------------------------------------------------------------------------------


class SeededSampler(BaseSampler):
    """TPE whose random numbers depend on the seed and the trial's number alone: a sweep that goes on, or is shared by
    machines, draws neither the same trials again nor others than it would have."""

    def __init__(self, seed: int):
        self.seed, self.sampler = seed, TPESampler(seed=seed)

    def before_trial(self, study, trial):
        self.sampler = TPESampler(
            seed=int(np.random.SeedSequence([self.seed % 2**32, trial.number]).generate_state(1)[0])
        )
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study, trial):
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study, trial, state, values):
        self.sampler.after_trial(study, trial, state, values)


def open_study(sweep: Sweep) -> optuna.Study:
    """The study of a sweep, made where there is none. Raises ValueError for a storage that cannot be used, for a study
    of other options and for one whose folder is taken."""
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
    described = _describe(sweep)
    if known is None:
        taken = [path for path in sweep.folder.iterdir() if path.name.isdigit()]
        if taken and not sweep.base.overwrite:
            raise ValueError(f"{taken[0]} is there, but the study is new; choose another --study or pass --overwrite")
        study.set_user_attr("sweep", described)
    elif known != described:
        pairs = [(key, part.get(key), described[where].get(key)) for where, part in known.items() for key in part]
        pairs += [
            (key, None, new) for where in known for key, new in described[where].items() if key not in known[where]
        ]
        told = [f"{key} was {old}, is {new}" for key, old, new in pairs if old != new]
        raise ValueError(
            f"study {sweep.study} in {sweep.storage} has other options: {'; '.join(told)}; give the same, or another "
            "--study"
        )
    return study


def _describe(sweep: Sweep) -> dict:
    """What all calls that work at one study must have in common, as JSON gives it back."""
    base = {key: value for key, value in dataclasses.asdict(sweep.base).items() if key not in OUTPUT}
    space = {f"space of {name}": repr(spec) for name, spec in sweep.space.items()}
    return json.loads(json.dumps({"options": base, "space": space}))


def count_trials(study: optuna.Study) -> int:
    """Trials that are done or under way. Those that Ctrl-C or a dead machine ended are not: they are made again."""
    done = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    trials = study.get_trials(deepcopy=False)
    return sum(t.state in done or (t.state == TrialState.FAIL and "error" in t.user_attrs) for t in trials)


# The trials -----------------------------------------------------------------------------------------------------------


def run_trials(sweep: Sweep, study: optuna.Study, train: Callable, pruned: type[Exception]) -> None:
    """Make trials until the study has as many as the sweep wants.

    train(config, on_score) -> FitResult trains once and tells of every score; ``pruned``: what on_score raises to end
    it early. A trial that fails is noted and the next one begins; FAILURES of them in a row raise ValueError. Ctrl-C
    queues the trial it ended and goes on as KeyboardInterrupt.
    """
    trials = _Trials(sweep, study, train, pruned)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(study)
        if count_trials(study) >= sweep.trials:
            return
        try:
            study.optimize(trials.objective, n_trials=1, catch=FAILING, callbacks=[trials.tell])
        except KeyboardInterrupt:
            if trials.current is not None:
                study.enqueue_trial(trials.current.params)
            left = sweep.trials - count_trials(study)
            _say(f"study {sweep.study} is kept; the same command makes the {left} trials that are left")
            raise


class _Trials:
    """The trials that this process makes."""

    def __init__(self, sweep: Sweep, study: optuna.Study, train: Callable, pruned: type[Exception]):
        self.sweep, self.study, self.train, self.pruned = sweep, study, train, pruned
        self.current: Trial | None = None
        self.failures = 0

    def objective(self, trial: Trial) -> float:
        """One training; returns its best expected accept length."""
        self.current = trial
        for name, spec in self.sweep.space.items():
            spec.suggest(trial, name)
        config = self.sweep.config(trial)
        ended = False

        def on_score(step: int, score) -> None:
            nonlocal ended
            trial.report(score.expected_accept_length, step)
            if trial.should_prune():
                ended = True
                raise self.pruned(f"step {step}: {score.expected_accept_length:.3f} is below the median")

        try:
            config.check()
            result = self.train(config, on_score)
            if result.interrupted and not ended:
                raise KeyboardInterrupt
            value = float(result.best.expected_accept_length)
            if not math.isfinite(value):
                raise FloatingPointError(f"the expected accept length is {value}")
        except self.pruned as error:
            raise optuna.TrialPruned(str(error)) from error
        except FAILING as error:
            trial.set_user_attr("error", " ".join(str(error).split()))
            raise
        if ended:
            raise optuna.TrialPruned
        trial.set_user_attr("best_step", result.best_step)
        return value

    def tell(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A line about a trial that ended. Raises ValueError when too many failed in a row."""
        self.current = None
        words = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}[trial.state]
        values = " ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
        score = _score_of(trial)
        _say(f"trial {trial.number} {words} {'-' if score is None else f'{score:.3f}'} {values}")
        self.failures = self.failures + 1 if trial.state == TrialState.FAIL else 0
        if trial.state == TrialState.FAIL:
            _say(f"  {trial.user_attrs['error']}")
        if self.failures >= FAILURES:
            raise ValueError(
                f"{self.failures} trials in a row failed, the last one: {trial.user_attrs['error']}; the study is kept"
            )


def _say(text: str) -> None:
    CONSOLE.print(text, markup=False, soft_wrap=True)


def _score_of(trial: FrozenTrial) -> float | None:
    """The best expected accept length that a trial reached, as far as it went."""
    return trial.value if trial.value is not None else max(trial.intermediate_values.values(), default=None)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# The end --------------------------------------------------------------------------------------------------------------


def finish(sweep: Sweep, study: optuna.Study) -> str:
    """Print the table of the best trials, write the best one's options; returns the JSON line for stdout's end.

    Raises ValueError when no trial was completed.
    """
    trials = study.get_trials(deepcopy=False)
    complete = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: -t.value)
    counts = {
        s.name.lower(): sum(t.state == s for t in trials) for s in TrialState if any(t.state == s for t in trials)
    }
    if not complete:
        raise ValueError(f"no trial of study {sweep.study} was completed: {counts}")
    path = write_best(sweep, complete[0])
    importance = importances(study)
    _show(complete, list(sweep.space), f"{sweep.study}: {', '.join(f'{n} {name}' for name, n in counts.items())}")
    if importance:
        print("importance: " + ", ".join(f"{name} {share:.2f}" for name, share in importance.items()))
    if "running" in counts:
        _say("trials that are running are another machine's; one that died is made again after five minutes")
    print(f"best: python train.py --config {path}")
    best = {"trial": complete[0].number, "expected_accept_length": complete[0].value, "values": complete[0].params}
    content = {"kind": "sweep", "study": sweep.study, "storage": _without_password(sweep.storage), "trials": counts}
    return json.dumps({**content, "best": best, "best_config": str(path), "importance": importance})


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", url)


def _show(complete: Sequence[FrozenTrial], names: Sequence[str], title: str) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("trial", "expected accept length", "best step", "minutes", *names):
        table.add_column(name, justify="right")
    for trial in complete[:SHOWN]:
        cells = [str(trial.number), f"{trial.value:.3f}", str(trial.user_attrs.get("best_step", "-"))]
        cells.append(f"{trial.duration.total_seconds() / 60:.1f}")
        table.add_row(*(Text(cell) for cell in [*cells, *(_short(trial.params[name]) for name in names)]))
    whole = None if sys.stdout.isatty() else 10_000  # columns; a table takes only what it needs
    Console(highlight=False, width=whole).print(table)


def importances(study: optuna.Study) -> dict[str, float]:
    """The share of the result's variation that each option explains (PED-ANOVA), largest first; empty where there are
    too few trials to tell: it compares the best tenth with the rest."""
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if len(complete) < SHOWN or len({t.value for t in complete}) < 2:
        return {}
    return {name: round(float(share), 4) for name, share in optuna.importance.get_param_importances(study).items()}


def write_best(sweep: Sweep, trial: FrozenTrial) -> Path:
    """Write ``best.yaml`` into the study's folder, whole or not at all: the trial's options, all of them, as
    ``train.py --config`` reads them. Returns its path."""
    config = sweep.config(trial)
    options = {name: getattr(config, name) for name in FIELDS if name not in RUN_ONLY}
    options |= {f"head.{name}": value for name, value in config.head_options.items()}
    path = sweep.folder / "best.yaml"
    title = f"# Trial {trial.number} of study {sweep.study}: expected accept length {trial.value:.4f}.\n"
    write_file(path, title + yaml.safe_dump(options, sort_keys=False))
    return path
