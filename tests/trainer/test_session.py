"""A training through its command line: resumptions, dry runs, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from runtime.entry import USER_MISTAKE, run_entry
from runtime.files.lock import locked
from tests.trainer.data.made import write_talks
from trainer.config import TrainConfig
from trainer.data import splits
from trainer.data.conversations import load_conversations
from trainer.report.record import TrainRecord
from trainer.session import run_directory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path, capsys):
    """command(*options): one train.py on small data; returns (status, the last line of stdout or stderr)."""
    data = write_talks(tmp_path / "talks.jsonl", 30)
    fixed = ["--head", "gated_rnn", "--head.num_depths", "2", "--head.inner_size", "24", "--data", str(data)]
    fixed += ["--out", str(tmp_path / "run"), "--features", "online", "--tokens-per-step", "128", "--max-steps", "6"]
    fixed += ["--save-every", "2", "--epochs", "9"]

    def run(*options, lines=None):
        status = run_entry(train.main, [*fixed, *map(str, options)])
        printed = capsys.readouterr()
        if lines is not None:
            lines += printed.err.splitlines()
        return status, (printed.out or printed.err).splitlines()[-1]

    return run


def test_a_run_writes_its_record_and_resuming_a_finished_one_changes_nothing(command, tmp_path):
    assert command("--score-every", 3)[0] == 0
    record = TrainRecord.read(tmp_path / "run" / "train.json")
    assert (record.steps, record.head, record.interrupted, record.skipped_updates) == (6, "gated_rnn", False, 0)
    assert [point.step for point in record.history] == [3, 6] and record.best.step in (3, 6)
    assert record.data["report"]["read"] == 30 and record.data["conversations"] == 27
    assert [(s.first_step, s.last_step) for s in record.sessions] == [(0, 6)]
    weights = (tmp_path / "run" / "checkpoint" / "head.safetensors").read_bytes()
    status, line = command("--score-every", 3, "--resume")
    assert status == 0 and json.loads(line)["steps"] == 6
    assert (tmp_path / "run" / "checkpoint" / "head.safetensors").read_bytes() == weights
    last = TrainRecord.read(tmp_path / "run" / "train.json").sessions[-1]
    assert (last.first_step, last.last_step) == (6, 6)


def test_a_run_in_a_directory_that_another_one_writes_is_refused_before_it_changes_anything(command, tmp_path):
    assert command()[0] == 0
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    with locked(tmp_path / "run"):
        for option in ("--overwrite", "--resume"):
            status, line = command(option)
            assert status == USER_MISTAKE and f"being written by another process, {os.getpid()} on " in line
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log
    assert command("--overwrite")[0] == 0 and not (tmp_path / "run" / ".lock").exists()


def test_depths_without_a_label_have_no_loss_in_files_and_a_dash_on_the_screen(command, tmp_path):
    data = tmp_path / "short.jsonl"  # replies of one token and the end: the second depth and later have no label
    question = {"from": "human", "value": "hello there"}
    talks = [{"conversations": [question, {"from": "gpt", "value": letter}]} for letter in "abcdefghij" * 3]
    data.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    lines = []
    status, _ = command("--data", data, "--head.num_depths", 4, "--score-every", 6, lines=lines)
    assert status == 0
    [shown] = [line for line in lines if "held out" in line]
    assert " - -" in shown and "nan" not in shown and " 0.00" not in shown, shown
    for file in ("log.jsonl", "train.json", "checkpoint/config.json", "states/step-00000006/state.json"):
        text = (tmp_path / "run" / file).read_text()
        assert "NaN" not in text and "null" in text, file
    best = TrainRecord.read(tmp_path / "run" / "train.json").best
    assert best.loss[0] > 0 and best.loss[-1] is None and best.top1[-1] is None
    assert command("--data", data, "--head.num_depths", 4, "--score-every", 6, "--resume")[0] == 0


def test_resuming_with_other_options_is_refused_by_name(command):
    assert command()[0] == 0
    status, line = command("--resume", "--max-steps", 8, "--head.num_depths", 3, "--loss-on", "all")
    assert status == USER_MISTAKE and "belongs to another run" in line
    for difference in ("max_steps was 6, is 8", "num_depths was 2, is 3", "loss_on was 'assistant', is 'all'"):
        assert difference in line


def test_resuming_with_other_text_is_refused_and_without_a_run_begins_one(command, tmp_path):
    assert command()[0] == 0
    other = write_talks(tmp_path / "other.jsonl", 29)
    status, line = command("--resume", "--data", other)
    assert status == USER_MISTAKE and "data was" in line
    assert command("--resume", "--out", tmp_path / "fresh")[0] == 0


def test_resume_without_out_takes_the_newest_run_of_the_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("older", "newer", "none")):
        folder = tmp_path / "runs" / "mlp" / name
        folder.mkdir(parents=True)
        if name != "none":
            (folder / "states").mkdir()
            os.utime(folder / "states", (index, index))
    assert run_directory(TrainConfig(head="mlp", resume=True)) == Path("runs/mlp/newer")
    with pytest.raises(ValueError, match=r"there is no run with a state under .*to resume; pass --out"):
        run_directory(TrainConfig(head="gated_rnn", resume=True))


def test_a_new_run_in_the_directory_of_an_old_one_removes_its_states(command, tmp_path):
    assert command()[0] == 0
    assert command("--overwrite", "--save-every", 0, "--max-steps", 2)[0] == 0
    assert not (tmp_path / "run" / "states").exists()
    status, line = command("--resume", "--overwrite", "--save-every", 0, "--max-steps", 2)
    assert status == 0 and json.loads(line)["steps"] == 2


def test_a_dry_run_reports_what_the_run_needs_and_writes_nothing(command, tmp_path):
    status, line = command("--dry-run")
    report = json.loads(line)
    assert status == 0 and report["can_finish"] and report["plan"]["num_steps"] == 6
    assert report["measured"]["forward_s"] > 0 and report["train_s"] > 0 and not (tmp_path / "run").exists()
    status, line = command("--dry-run", "--max-length", 100000)
    report = json.loads(line)
    assert status == USER_MISTAKE and not report["can_finish"] and "exceeds the 512 positions" in report["reasons"][0]


def test_averaged_weights_and_every_loss_train_through_the_command(command, tmp_path):
    for more in (["--loss", "kl"], ["--loss", "mix", "--kl-share", 0.3, "--ema", 0.9], ["--optimizer", "muon"]):
        status, line = command("--overwrite", *more)
        assert status == 0 and np.isfinite(json.loads(line)["expected_accept_length"]), more


@pytest.mark.mpi
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_more_ranks_than_sequences_are_refused(tmp_path):
    data = write_talks(tmp_path / "talks.jsonl", 2)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    words = ["mpirun", *root, "--oversubscribe", "-np", "2", sys.executable, "train.py", "--head", "gated_rnn"]
    words += ["--data", str(data), "--out", str(tmp_path / "run"), "--features", "online"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "2 ranks share 1 training sequences, and each needs one" in done.stderr


def test_the_held_out_conversations_can_be_written_as_prompts(tmp_path):
    data, out = write_talks(tmp_path / "talks.jsonl", 30), tmp_path / "held_out.jsonl"
    splits.main(["--out", str(out), "--head", "mlp", "--data", str(data)])
    talks, _ = load_conversations(out)
    text = splits.load_splits(TrainConfig(head="mlp", data=[str(data)]))
    assert len({talk.id for talk in talks}) == len(text.held_out) == 3
    encoded = text.tokenizer.encode_many_with_mask([talk.messages for talk in talks])
    assert [len(ids) for ids, _ in encoded] == text.held_out.lengths.tolist()
