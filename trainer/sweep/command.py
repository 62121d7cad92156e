"""The command ``python -m trainer.sweep``: runs a study and prints what it found.

``best.yaml`` in the study's folder holds the options of the best trial, as ``train.py --config`` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from runtime.atomic import write_file
from runtime.files.documents import to_json, to_yaml
from runtime.start.bootstrap import under_mpi
from trainer.config import FIELDS
from trainer.sweep.study import Sweep, open_study, parse_sweep, run_trials, say, short

SHOWN = 10  # trials in the table
RUN_ONLY = ("out", "overwrite", "resume", "dry_run")  # options that do not belong in best.yaml


def main(arguments: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    if under_mpi():
        raise ValueError("a sweep is one process; start the same command on each machine, without mpirun")
    sweep = parse_sweep(arguments)
    study = open_study(sweep)
    from trainer.data.splits import load_splits

    splits = load_splits(sweep.base)  # the same for all trials; mistakes in the text are reported before the first
    say(splits.report.summary())
    from trainer.session import prepare, train

    run_trials(sweep, study, lambda config, on_score: train(config, on_score, prepare(config, splits))[0])
    print(finish(sweep, study))


def finish(sweep: Sweep, study: optuna.Study) -> str:
    """Print the table of the best trials, write the best one's options; returns the JSON line for stdout's end.

    Raises ValueError when no trial is complete.
    """
    trials = study.get_trials(deepcopy=False)
    counts = {s.name.lower(): sum(t.state == s for t in trials) for s in TrialState}
    counts = {name: count for name, count in counts.items() if count}
    complete = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: -t.value)
    if not complete:
        raise ValueError(f"no trial of study {sweep.study} is complete: {counts}")
    path = write_best(sweep, complete[0])
    importance = importances(study)
    print(f"{sweep.study}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    print(best_table(complete).to_string(index=False))
    if importance:
        print("importance: " + ", ".join(f"{name} {share:.2f}" for name, share in importance.items()))
    if "running" in counts:
        say("running trials belong to other machines; one without a heartbeat is repeated after five minutes")
    print(f"best: python train.py --config {path}")
    best = {"trial": complete[0].number, "expected_accept_length": complete[0].value, "values": complete[0].params}
    storage = re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", sweep.storage)  # without the password
    content = {"kind": "sweep", "study": sweep.study, "storage": storage, "trials": counts}
    return to_json({**content, "best": best, "best_config": str(path), "importance": importance})


def best_table(complete: Sequence[FrozenTrial]) -> pd.DataFrame:
    """The first trials with their scores and the values of their options."""
    return pd.DataFrame(
        {
            "trial": trial.number,
            "expected accept length": f"{trial.value:.3f}",
            "best step": trial.user_attrs.get("best_step", "-"),
            "minutes": f"{trial.duration.total_seconds() / 60:.1f}",
            **{name: short(value) for name, value in trial.params.items()},
        }
        for trial in complete[:SHOWN]
    )


def importances(study: optuna.Study) -> dict[str, float]:
    """The share of the result's variation that each option explains (PED-ANOVA), largest first; empty where there are
    too few trials to tell: it compares the best tenth with the rest."""
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if len(complete) < SHOWN or len({t.value for t in complete}) < 2:
        return {}
    return {name: round(float(share), 4) for name, share in optuna.importance.get_param_importances(study).items()}


def write_best(sweep: Sweep, trial: FrozenTrial) -> Path:
    """Write all options of the trial to ``best.yaml``; returns its path."""
    config = sweep.config(trial)
    options = {name: getattr(config, name) for name in FIELDS if name not in RUN_ONLY}
    options |= {f"head.{name}": value for name, value in config.head_options.items()}
    path = sweep.folder / "best.yaml"
    title = f"# Trial {trial.number} of study {sweep.study}: expected accept length {trial.value:.4f}.\n"
    write_file(path, title + to_yaml(options))
    return path
