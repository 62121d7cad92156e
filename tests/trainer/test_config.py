"""Options: their order of precedence, and one line with a suggestion for every mistake."""

import dataclasses
import json
import sys

import pytest

import train
import trainer.config
from runtime.entry import USER_MISTAKE, run_entry
from tests.trainer.data.made import GOOD, write_talks
from trainer.config import TrainConfig, parse


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """write(head, text): gives a head a recipe.yaml, and takes away those it has."""
    monkeypatch.setattr(trainer.config, "head_folder", lambda head: tmp_path / "heads" / head)

    def write(head, text):
        (tmp_path / "heads" / head).mkdir(parents=True)
        (tmp_path / "heads" / head / "recipe.yaml").write_text(text)

    return write


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_head_alone_is_enough(recipes):
    config = parse(["--head", "gated_rnn"])
    assert config == TrainConfig(head="gated_rnn")
    assert parse(["--list-heads"]) is None and parse(["--head", "mlp", "--list-heads"]) is None


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(recipes, yaml_file):
    recipes("mlp", "epochs: 7\nseed: 7\nclip: 7\nhead.num_layers: 3\nhead.num_depths: 3\n")
    path = yaml_file("seed: 8\nclip: 8\nhead: mlp\nhead.num_layers: 2\nbeta1: 0.5\n")
    config = parse(["--config", path, "--clip", "9", "--head.lm_head=shared"])
    assert (config.epochs, config.seed, config.clip, config.beta1) == (7.0, 8, 9.0, 0.5)
    assert config.head_options == {"num_layers": 2, "num_depths": 3, "lm_head": "shared"}
    assert isinstance(config.epochs, float)
    assert parse(["--head", "gated_rnn", "--head.num_depths", "2"]).epochs == 1.0  # not the recipe of another head
    recipes("gated_rnn", "epoch: 2\n")
    with pytest.raises(ValueError, match=r"Unknown key in .*heads/gated_rnn/recipe\.yaml: 'epoch'"):
        parse(["--head", "gated_rnn"])


def test_every_option_can_be_given_on_the_command_line_and_in_a_file(recipes, yaml_file):
    given = {
        "backbone": "b", "dtype": "float32", "load_in_8bit": True, "template": "t", "data": ["x", "y"],
        "data_weights": [1.0, 0.5], "block_size": 12, "loss_on": "all", "out": "o", "resume": True, "dry_run": True,
        "accumulate": 2, "save_every": 4, "keep_last": 3, "loss": "mix", "kl_share": 0.25, "kl_top": 7, "teacher": "t",
        "optimizer": "lion", "schedule": "wsd", "decay_share": 0.5, "ema": 0.5, "skip_limit": 2, "tensorboard": True,
        "overwrite": True, "epochs": 2.5, "max_steps": 3, "tokens_per_step": 4, "max_length": 5, "held_out": 6,
        "score_every": 7, "learning_rate": 0.5, "final_rate": 0.25, "warmup": 0.125, "weight_decay": 0.5, "beta1": 0.5,
        "beta2": 0.25, "clip": 0.5, "depth_weight": 0.5, "features": "online", "cache_dir": "c", "tree_nodes": 8,
        "seed": 9, "ranks": 2, "backbone_engine": "torch",
    }  # fmt: skip
    # The one that excludes load_in_8bit has a case of its own among the mistakes.
    assert {"head", "head_options", "load_in_4bit", *given} == {field.name for field in dataclasses.fields(TrainConfig)}
    flags = []
    for name, value in given.items():
        flags.append(f"--{name.replace('_', '-')}")
        flags += [] if value is True else map(str, value) if isinstance(value, list) else [str(value)]
    expected = TrainConfig(head="mlp", head_options={"num_depths": 2}, **given)
    assert parse(["--head", "mlp", *flags, "--head.num_depths", "2"]) == expected
    text = "\n".join(f"{name.replace('_', '-')}: {json.dumps(value)}" for name, value in given.items())
    assert parse(["--config", yaml_file(f"head: mlp\nhead.num_depths: 2\n{text}\n")]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "gatedrnn"], r"Unknown head 'gatedrnn'\. Did you mean 'gated_rnn'\? Available: "),
        (["--head", "mlp", "--epoch", "2"], r"Unknown option '--epoch'\. Did you mean '--epochs'\?"),
        (["--head", "mlp", "--epochs=2", "--lr=3"], r"Unknown option '--lr'\. .*Available: .*--learning-rate"),
        (["--head", "mlp", "--head.num_layer", "2"], r"'--head\.num_layer'\. Did you mean '--head\.num_layers'"),
        (["--head", "mlp", "stray"], "unexpected argument 'stray'"),
        (["--head", "mlp", "--head.num_depths", "many"], r"--head\.num_depths takes int, got 'many'"),
        (["--head", "hydra", "--head.prefix_layer", "maybe"], r"takes bool, got 'maybe'"),
        (["--head", "mlp", "--epochs", "0"], r"--epochs must be above 0, got 0\.0"),
        (["--head", "mlp", "--ranks", "10000000"], "--ranks must be at most 256, got 10000000"),
        (["--head", "mlp", "--clip", "nan"], "--clip must be a number, got nan"),
        (["--head", "mlp", "--max-steps", "-1"], "--max-steps must be at least 0, got -1"),
        (["--head", "mlp", "--warmup", "1"], r"--warmup must be below 1, got 1\.0"),
        (["--head", "mlp", "--features", "disk"], r"Unknown --features 'disk'\. Available: cache, online"),
        (["--head", "mlp", "--optimizer", "adam"], r"Unknown --optimizer 'adam'\. Did you mean 'adamw'\?"),
        (["--head", "mlp", "--load-in-8bit", "--load-in-4bit"], "exclude each other"),
        (["--head", "mlp", "--data", "a", "b", "--data-weights", "1"], "--data-weights has 1 numbers, --data 2 files"),
        (["--head", "mlp", "--data", "a", "--data-weights", "-1"], "must be numbers above 0"),
        (["--head", "mlp", "--kl-share", "1.5"], r"--kl-share must be at most 1, got 1\.5"),
        (["--head", "mlp", "--config", "nowhere.yaml"], r"nowhere\.yaml cannot be read"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_reported(recipes, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_a_missing_head_is_reported_and_help_lists_the_options_of_all_heads(recipes, capsys):
    with pytest.raises(ValueError, match=r"--head NAME is needed; available: .*gated_rnn.*mlp"):
        parse([])
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert "--head.inner_size" in text and "--head.num_layers" in text
    with pytest.raises(SystemExit):
        parse(["--head", "mlp", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "tokens of text per optimizer step, over all passes and ranks (default: 2048)" in text
    assert "--head.lm_head" in text and "--head.inner_size" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 2", r"Unknown key in .*run\.yaml: 'epoch'\. Did you mean 'epochs'\?"),
        ("head.num_depth: 2", "'num_depth'.* Did you mean 'num_depths'"),
        ("head.num_depths: '2'", r"--head\.num_depths takes int, got '2'"),
        ("epochs: two", r"run\.yaml: epochs takes float, got 'two'"),
        ("seed: 1.5", "seed takes int, got 1.5"),
        ("overwrite: 1", "overwrite takes bool, got 1"),
        ("epochs: -1", "--epochs must be above 0"),
        ("- epochs", r"run\.yaml must hold a mapping"),
        ("1: 2", r"run\.yaml: a key must be text, got 1"),
        ("data: [1, 2]", r"run\.yaml: data takes list"),
        ("a: [", r"run\.yaml is not valid YAML"),
    ],
)
def test_a_mistake_in_a_file_is_reported(recipes, yaml_file, text, message):
    with pytest.raises(ValueError, match=message):
        parse(["--head", "mlp", "--config", yaml_file(text)])


# The entry


@pytest.fixture
def failure(capsys):
    """failure(arguments): the line with which train.py rejects a command line; started: after its card."""

    def run(arguments, started=False):
        status = run_entry(train.main, [str(a) for a in arguments])
        printed = capsys.readouterr()
        assert status == USER_MISTAKE and printed.out == "", printed
        *before, last = printed.err.splitlines()
        assert last.startswith("error: ") and (started or not before), printed.err
        return last

    return run


def test_train_reports_a_mistake_before_it_trains(failure, tmp_path):
    data, nowhere, broken = write_talks(tmp_path / "talks.jsonl", 3), tmp_path / "nowhere", tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(GOOD) + "\n{broken\n")
    assert "Did you mean 'gated_rnn'?" in failure(["--head", "gated_rn"])
    assert f"{broken} line 2: not valid JSON" in failure(["--head", "mlp", "--data", broken])
    assert f"{nowhere} cannot be read" in failure(["--head", "mlp", "--data", nowhere])
    assert f"{nowhere} is not a directory" in failure(["--head", "mlp", "--data", data, "--backbone", nowhere])


def test_train_runs_and_its_last_line_is_json(tmp_path, capsys):
    data = write_talks(tmp_path / "talks.jsonl", 12)
    arguments = ["--head", "gated_rnn", "--data", data, "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    arguments += ["--max-steps", 2, "--tokens-per-step", 64, "--head.num_depths", 2, "--head.inner_size", 24]
    for status, more in ((0, []), (USER_MISTAKE, []), (0, ["--overwrite"])):
        assert run_entry(train.main, [str(a) for a in arguments + more]) == status
        printed = capsys.readouterr()
        if status == USER_MISTAKE:
            assert "already holds a checkpoint; choose another --out, or pass --overwrite or --resume" in printed.err
            assert "finished" in (tmp_path / "run" / "log.jsonl").read_text()
        else:
            result = json.loads(printed.out.splitlines()[-1])
            assert result["status"] == "done" and result["steps"] == 2
            config = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
            assert config["head_config"] == {"num_depths": 2, "inner_size": 24, "cell": "gated"}
            assert config["trainer"]["tokens_per_step"] == 64 and config["data"]["conversations"] == 11


def test_train_reports_a_run_that_diverges(failure, tmp_path):
    data = write_talks(tmp_path / "talks.jsonl", 12)
    arguments = ["--head", "gated_rnn", "--data", data, "--out", tmp_path / "run", "--features", "online"]
    arguments += ["--learning-rate", 1e30, "--tokens-per-step", 64, "--head.num_depths", 2, "--head.inner_size", 24]
    arguments += ["--max-steps", 5, "--epochs", 9]
    line = failure(arguments, started=True)
    assert "step 5, the 4th update in a row; the features are finite: lower --learning-rate; see" in line
    assert (tmp_path / "run" / "bad-step-5.npz").exists()


def test_train_lists_the_heads(capsys):
    assert run_entry(train.main, ["--list-heads"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("mlp ") and "parallel" in line for line in lines)
    assert any(line.startswith("gated_rnn ") and "sequential" in line for line in lines)
    assert "heads.mlp" in sys.modules
