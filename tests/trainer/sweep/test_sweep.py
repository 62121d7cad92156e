"""Sweeps: the space, studies that are resumed, and a best trial that train.py reads.

The training is a stand-in whose expected accept length is a quadratic of the learning rate's logarithm: its best is 3,
at 1e-3. The heads' names and options are real.
"""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from optuna.trial import TrialState

import trainer.sweep.command
from trainer.config import TrainConfig, parse
from trainer.data.conversations import DataReport
from trainer.sweep.command import finish, importances
from trainer.sweep.space import Choices, Range, apply, check_keys, make_space
from trainer.sweep.study import count_trials, open_study, parse_sweep, run_trials

ROOT = Path(__file__).resolve().parents[3]
SPACE = "learning_rate: {low: 1e-4, high: 1e-2, log: true}\nhead.num_layers: {choices: [1, 2]}\n"


class Training:
    """A stand-in for a training: it scores at these steps and at the end, and records the configs it was given.

    fails: {number of the call: what it raises}; interrupted: numbers of calls that Ctrl-C ends; diverged: of those
    whose score is no number.
    """

    def __init__(self, fails=None, interrupted=(), diverged=(), steps=(10, 20)):
        self.fails, self.interrupted, self.diverged, self.steps = fails or {}, interrupted, diverged, steps
        self.configs = []

    def __call__(self, config, on_score):
        number = len(self.configs)
        self.configs.append(config)
        if number in self.fails:
            raise self.fails[number]
        value = math.nan if number in self.diverged else 3 - (math.log10(config.learning_rate) + 3) ** 2
        interrupted = number in self.interrupted or any(
            on_score(step, SimpleNamespace(expected_accept_length=value - 1 / step)) for step in self.steps
        )
        best = SimpleNamespace(expected_accept_length=value)
        return SimpleNamespace(best=best, best_step=30, interrupted=interrupted)


@pytest.fixture
def space_file(tmp_path, monkeypatch):
    """write(text) -> path; the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)

    def write(text=SPACE):
        (tmp_path / "space.yaml").write_text(text)
        return "space.yaml"

    return write


@pytest.fixture
def make_sweep(space_file):
    """make_sweep(trials, *more arguments) -> Sweep over SPACE."""

    def make(trials=8, *more):
        return parse_sweep(["--head", "mlp", "--space", space_file(), "--trials", str(trials), *map(str, more)])

    return make


def run_study(sweep, training):
    study = open_study(sweep)
    run_trials(sweep, study, training)
    return study


def rates(study):
    return [trial.params["learning_rate"] for trial in study.trials]


# The space


def space_of(text, base=None):
    return make_space(check_keys(yaml.safe_load(text), "s.yaml"), base or TrainConfig(head="mlp"), "s.yaml")


def test_numbers_get_the_type_of_the_option_also_where_yaml_reads_text():
    text = (
        "learning_rate: {low: 1e-4, high: 1.e-2, log: true}\nema: {low: 0, high: 0.999}\n"
        "tokens-per-step: {low: 1e3, high: 3000, step: 500}\nweight_decay: {choices: [0, 1e-1]}\n"
        "optimizer: {choices: [adamw, lion]}\nhead.num_layers: {low: 1, high: 3}\nteacher: {choices: [null, a.npz]}\n"
    )
    space = space_of(text)
    assert space == {
        "learning_rate": Range(1e-4, 1e-2, True),
        "ema": Range(0.0, 0.999),
        "tokens_per_step": Range(1000, 3000, False, 500),
        "weight_decay": Choices((0.0, 0.1)),
        "optimizer": Choices(("adamw", "lion")),
        "head.num_layers": Range(1, 3),
        "teacher": Choices((None, "a.npz")),
    }
    assert isinstance(space["ema"].low, float) and isinstance(space["tokens_per_step"].low, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: {low: 1, high: 2}", r"Unknown key in s\.yaml: 'learning_rat'\. Did you mean 'learning_rate'\?"),
        ("head.num_layer: {low: 1, high: 2}", r"Unknown option of head 'mlp' in s\.yaml: 'num_layer'.*'num_layers'\?"),
        ("seed: {low: 1, hihg: 2}", r"Unknown key under s\.yaml: seed: 'hihg'\. Did you mean 'high'\?"),
        ("tree_nodes: {low: 1, high: 2}", r"tree_nodes cannot be swept"),
        ("ema: 0.5", r"ema takes \{low: \.\., high: \.\.\} or \{choices: \[\.\.\]\}, got 0\.5"),
        ("ema: {low: 0}", "ema needs high, or choices"),
        ("ema: {low: 0.5, high: 0.1}", r"low must be below high, got 0\.5 and 0\.1"),
        ("ema: {low: 0, high: 0.5, log: true}", r"log needs a low above 0, got 0\.0"),
        ("ema: {low: 0, high: 0.5, log: maybe}", r"log takes true or false, got 'maybe'"),
        ("ema: {low: 0, high: high}", r"ema\.high takes a number, got 'high'"),
        ("ema: {low: 0, high: 0.5, step: 0.3}", "step must be above 0, divide high - low"),
        ("ema: {low: 0, high: 1}", r"ema cannot be 1\.0: --ema must be below 1"),
        ("seed: {low: 1.5, high: 3}", r"seed\.low takes a whole number, got 1\.5"),
        (f"max_steps: {{low: 1, high: 1{'0' * 400}}}", "takes a number, got an integer of about"),
        (f"max_steps: {{low: 1, high: 1{'0' * 40}}}", r"max_steps\.high takes a whole number, got 1000"),
        ("learning_rate: {low: 1.0e-4, high: 1.0, step: 1.0e-320}", "step must be above 0, divide high - low"),
        ("clip: {low: -1.7e+308, high: 1.7e+308}", "clip: low and high are too far apart"),
        (f"clip: {{low: 1, high: {'x' * 10_000}}}", r"takes a number, got 'xxx[x]*\.\.\.$"),
        ("optimizer: {low: 1, high: 2}", "optimizer is not a number"),
        ("optimizer: {choices: []}", r"optimizer\.choices takes a list of values, got \[\]"),
        ("optimizer: {choices: [on]}", r"optimizer\.choices takes str, got True; YAML reads on, off"),
        ("optimizer: {choices: [lion, lion]}", "contains a value twice"),
        ("learning-rate: {low: 1e-4, high: 1}\nlearning_rate: {low: 1e-4, high: 1}", "learning_rate is given twice"),
        ("{}", r"s\.yaml is empty"),
    ],
)
def test_a_mistake_in_the_space_is_one_clear_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        space_of(text)
    assert "\n" not in str(caught.value)


# The command line


def test_every_option_of_train_is_accepted(space_file, tmp_path):
    (tmp_path / "base.yaml").write_text("head: mlp\nepochs: 2\n")
    sweep = parse_sweep(
        ["--space", space_file(), "--config", "base.yaml", "--max-steps=30", "--head.num_depths", "2", "--study", "a.b"]
    )
    assert (sweep.base.epochs, sweep.base.max_steps, sweep.base.head_options["num_depths"]) == (2.0, 30, 2)
    assert (sweep.study, sweep.storage, sweep.trials) == ("a.b", "sqlite:///runs/sweeps/a.b.db", 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trial", "5"], r"Unknown option '--trial'\. Did you mean '--trials'\?"),
        (["--lerning-rate=1"], r"Unknown option '--lerning-rate'\. Did you mean '--learning-rate'\?"),
        (["--head.num_layer", "1"], "Did you mean '--head.num_layers'"),
        (["--trials", "0"], "--trials must be above 0, got 0"),
        (["--out", "x"], "--out cannot be combined with a sweep"),
        (["--study", "a/b"], "--study names a folder"),
        (["--space", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_a_mistake_on_the_command_line_is_reported(space_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_sweep(["--head", "mlp", "--space", space_file(), *arguments])
    with pytest.raises(ValueError, match="--space FILE is needed"):
        parse_sweep(["--head", "mlp"])


def test_a_mistake_is_reported_before_jittor_loads(tmp_path):
    (tmp_path / "space.yaml").write_text("learning_rate: {low: 2, high: 1}")
    program = (
        "import sys; from runtime.entry import run_entry; from trainer.sweep.command import main\n"
        f"status = run_entry(main, ['--head', 'mlp', '--space', {str(tmp_path / 'space.yaml')!r}])\n"
        "print(status, 'jittor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("error: ") and "low must be below high" in done.stderr
    assert done.stderr.count("\n") == 1


def test_under_mpirun_it_refuses(monkeypatch):
    monkeypatch.setattr(trainer.sweep.command, "under_mpi", lambda: True)
    with pytest.raises(ValueError, match="without mpirun"):
        trainer.sweep.command.main([])


# Trials


def test_a_sweep_finds_the_best_learning_rate_and_prunes(make_sweep):
    training = Training()
    study = run_study(make_sweep(30), training)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED) == len(training.configs) == 30
    assert states.count(TrialState.PRUNED) > 3
    assert abs(math.log10(study.best_params["learning_rate"]) + 3) < 0.2
    assert [config.out for config in training.configs[:2]] == ["runs/sweeps/mlp/0", "runs/sweeps/mlp/1"]
    assert {config.head_options["num_layers"] for config in training.configs} == {1, 2}


def test_a_study_in_two_calls_is_the_study_in_one(make_sweep):
    complete = run_study(make_sweep(14, "--study", "complete"), Training())
    run_study(make_sweep(5, "--study", "parts"), Training())
    rest = Training()
    parts = run_study(make_sweep(14, "--study", "parts"), rest)
    assert len(rest.configs) == 9
    assert rates(parts) == rates(complete) and len(set(rates(complete))) == 14
    assert [t.value for t in parts.trials] == [t.value for t in complete.trials]
    other = run_study(make_sweep(2, "--study", "other", "--seed", 1), Training())
    assert rates(other) != rates(complete)[:2]


def test_other_options_or_another_space_are_another_study(make_sweep, space_file):
    run_study(make_sweep(2), Training())
    with pytest.raises(ValueError, match=r"study mlp in sqlite.*epochs was 1\.0, is 2\.0"):
        open_study(make_sweep(2, "--epochs", 2))
    open_study(make_sweep(2, "--cache-dir", "elsewhere"))
    space = space_file("learning_rate: {low: 1e-4, high: 1e-1, log: true}\n")
    with pytest.raises(ValueError, match=r"space of head.num_layers was .Choices.*space of learning_rate was .Range"):
        open_study(parse_sweep(["--head", "mlp", "--space", space]))


def test_a_failed_trial_is_recorded_and_the_sweep_continues(make_sweep, capsys):
    fails = {1: FloatingPointError("the loss is not finite"), 3: ValueError("no such head")}
    training = Training(fails=fails)
    study = run_study(make_sweep(6), training)
    assert [t.number for t in study.trials if t.state == TrialState.FAIL] == [1, 3]
    assert study.trials[1].user_attrs["error"] == "the loss is not finite"
    assert len(training.configs) == 6
    captured = capsys.readouterr()
    assert "the loss is not finite" in captured.err and "Warning" not in captured.err and captured.out == ""
    study = run_study(make_sweep(2, "--study", "other"), Training(diverged=[0], steps=()))
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_three_failures_in_a_row_end_the_sweep_and_two_do_not(make_sweep):
    two = {0: ValueError("a"), 1: ValueError("b"), 3: ValueError("c"), 4: ValueError("d")}
    assert len(run_study(make_sweep(6, "--study", "two"), Training(fails=two)).trials) == 6
    three = {number: ValueError(f"reason {number}") for number in range(1, 9)}
    training = Training(fails=three)
    with pytest.raises(ValueError, match="3 trials in a row failed, the last one: reason 3; the study is saved"):
        run_study(make_sweep(9, "--study", "three"), training)
    assert len(training.configs) == 4


def test_a_mistake_of_the_program_is_not_caught(make_sweep):
    sweep = make_sweep(3)
    with pytest.raises(KeyError):
        run_study(sweep, Training(fails={0: KeyError("bug")}))
    with pytest.raises(ValueError, match="no trial of study mlp is complete"):
        finish(sweep, open_study(sweep))


def test_after_ctrl_c_the_study_is_resumed_and_its_trial_repeated(make_sweep, capsys):
    sweep, training = make_sweep(5), Training(interrupted=[2])
    study = open_study(sweep)
    with pytest.raises(KeyboardInterrupt):
        run_trials(sweep, study, training)
    assert "the same command runs the remaining 3 trials" in capsys.readouterr().err
    again = Training()
    study = run_study(make_sweep(5), again)
    assert len(again.configs) == 3
    assert again.configs[0].learning_rate == training.configs[2].learning_rate
    assert again.configs[0].out != training.configs[2].out
    assert count_trials(study) == 5


def test_a_trial_of_another_machine_counts_and_one_that_died_does_not(make_sweep):
    sweep = make_sweep(3)
    study = open_study(sweep)
    with pytest.warns(UserWarning, match="Heartbeat"):
        study.ask()
    training = Training()
    run_trials(sweep, study, training)
    assert len(training.configs) == 2
    study.tell(0, state=TrialState.FAIL)  # what Optuna does with a trial that gave no sign of life for too long
    run_trials(sweep, study, training)
    assert len(training.configs) == 3


def test_a_new_study_does_not_write_into_the_folders_of_an_old_one(make_sweep, tmp_path):
    (tmp_path / "runs/sweeps/mlp/0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"runs/sweeps/mlp/0 exists, but the study is new"):
        open_study(make_sweep())
    open_study(make_sweep(8, "--overwrite"))


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////nowhere/at/all/study.db"])
def test_a_storage_that_cannot_be_used_is_named(make_sweep, url):
    with pytest.raises(ValueError, match=f"--storage {url} cannot be used: ") as caught:
        open_study(make_sweep(8, "--storage", url))
    assert "\n" not in str(caught.value)


# The end


def test_train_reads_the_best_trial_and_would_train_just_that(make_sweep, capsys, tmp_path):
    sweep = make_sweep(15, "--max-steps", 7, "--head.num_depths", 2, "--beta2", "1e-05")
    study = run_study(sweep, Training())
    content = json.loads(finish(sweep, study))
    best = study.best_trial
    expected = apply(sweep.base, best.params)
    assert parse(["--config", content["best_config"]]) == expected
    assert (expected.max_steps, expected.out, expected.head_options["num_depths"]) == (7, None, 2)
    assert content["best"] == {"trial": best.number, "expected_accept_length": best.value, "values": best.params}
    assert content["trials"]["complete"] + content["trials"]["pruned"] == 15
    out = capsys.readouterr().out
    header = next(index for index, line in enumerate(out.splitlines()) if "expected accept length" in line)
    assert out.splitlines()[header + 1].split()[:2] == [str(best.number), f"{best.value:.3f}"]
    assert f"python train.py --config {content['best_config']}" in out
    assert [path.name for path in (tmp_path / "runs/sweeps/mlp").iterdir()] == ["best.yaml"]
    report = json.loads(finish(dataclasses.replace(sweep, storage="mysql://me:secret@host/db"), study))
    assert report["storage"] == "mysql://me:***@host/db"


def test_the_learning_rate_is_what_matters_to_the_stand_in(make_sweep):
    study = run_study(make_sweep(20), Training(steps=()))
    found = importances(study)
    assert list(found) == ["learning_rate", "head.num_layers"] and found["learning_rate"] > 0.8
    assert importances(run_study(make_sweep(4, "--study", "short"), Training())) == {}


def test_the_command_runs_the_trials_on_one_split_and_ends_with_the_best_as_json(space_file, monkeypatch, capsys):
    training, splits, given = Training(), SimpleNamespace(report=DataReport()), []
    monkeypatch.setattr("trainer.data.splits.load_splits", lambda config: splits)
    monkeypatch.setattr("trainer.session.prepare", lambda config, its: given.append(its))
    monkeypatch.setattr("trainer.session.train", lambda config, on_score, setting: (training(config, on_score), None))
    trainer.sweep.command.main(["--head", "mlp", "--space", space_file(), "--trials", "3"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["trials"] == {"complete": 3} and last["best"]["values"]["head.num_layers"] in (1, 2)
    assert len(training.configs) == 3 and all(its is splits for its in given) and len(given) == 3
