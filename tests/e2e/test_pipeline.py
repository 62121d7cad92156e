"""The commands of the README, as a user types them: train, measure, compare, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*words, status=0, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == status, (words, done.returncode, done.stderr[-3000:])
    return done


def train(out, *more):
    # Online, because a test leaves no gigabyte of features.
    words = ("train.py", "--features", "online", "--out", out, "--max-steps", 6, "--held-out", 8, *more)
    return json.loads(run(*words).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for head in ("gated_rnn", "mlp"):
        summary = train(folder / head / "first", "--head", head)
        assert summary["status"] == "done" and summary["steps"] == 6
        assert 1 < summary["expected_accept_length"] < 6
    return folder


def test_trained_heads_are_measured_and_compared(trained, tmp_path):
    words = ("--greedy", "--runs", trained, "--num-prompts", 5, "--max-new-tokens", 24, "--out-dir", tmp_path)
    measured = run("bench/run.py", *words)
    results = {head: json.loads((tmp_path / f"{head}.json").read_text()) for head in ("gated_rnn", "mlp")}
    floor = json.loads((tmp_path / "prompt_lookup.json").read_text())
    assert json.loads(measured.stdout.splitlines()[-1]) == floor and floor["checkpoint"] is None
    for record in results.values():
        assert record["status"] == "complete"
        assert record["parity"]["identical"] == record["parity"]["prompts"] == 5
        assert record["checkpoint"]["train_steps"] == 6
        assert not record["checkpoint"]["path"].startswith(str(ROOT))
    compared = run("bench/compare.py", *sorted(tmp_path.glob("*.json")), "--plot", tmp_path / "plot.png")
    assert "gated_rnn" in compared.stdout and "mlp" in compared.stdout
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_checkpoint_of_another_backbone_is_refused_in_one_line(trained, tmp_path):
    config = trained / "mlp" / "first" / "checkpoint" / "config.json"
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    content = json.loads(config.read_text())
    del content["digest"]  # as a checkpoint of an earlier version has none
    content["backbone"]["fingerprint"] = "0" * 16
    (copy / "config.json").write_text(json.dumps(content))
    (copy / "head.safetensors").write_bytes((config.parent / "head.safetensors").read_bytes())
    done = run("bench/run.py", "--checkpoint", copy, "--num-prompts", 1, "--out", tmp_path / "x.json", status=2)
    assert done.stderr.splitlines()[-1].startswith("error: ") and "0" * 16 in done.stderr
    assert not (tmp_path / "x.json").exists()


def test_ctrl_c_keeps_the_best_checkpoint_of_a_run(tmp_path):
    words = ["train.py", "--head", "mlp", "--features", "online", "--out", tmp_path / "run", "--held-out", 8]
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", *map(str, words), "--head.lm_head", "shared"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert json.loads(output.splitlines()[-1])["status"].startswith("interrupted")
    assert (tmp_path / "run" / "checkpoint" / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train.py", "--head", "gatedrnn"), "Did you mean 'gated_rnn'?"),
        (("train.py", "--head", "mlp", "--epoch", "2"), "Did you mean '--epochs'?"),
        (("bench/run.py", "--greedy", "--nodess", "4"), "Did you mean '--nodes'?"),
        (("bench/compare.py", "no-such-result.json"), "no-such-result.json"),
    ],
)
def test_a_mistyped_command_is_answered_in_one_line(words, expected):
    done = run(*words, status=2)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and expected in done.stderr
