"""Our training beside PyTorch's: both do the same work, in processes of their own, and the record says how fast."""

import contextlib
import dataclasses
import gzip
import json

import numpy as np
import pytest
import torch

from bench.peers import torch_train, train_comparison
from bench.peers.torch_trainer import ADAMW
from bench.peers.train_comparison import WAYS, Way, start_torch
from bench.peers.train_process import Done, Rounds, train_ours, train_torch
from runtime.entry import run_entry
from trainer.config import EMBEDDED_CORPUS


def corpus(count):
    """The first conversations of the embedded corpus, as lines of JSON."""
    with gzip.open(EMBEDDED_CORPUS, "rt", encoding="utf-8") as file:
        return [next(file) for _ in range(count)]


# The trainings --------------------------------------------------------------------------------------------------------


def test_a_training_answers_when_as_many_steps_as_asked_for_are_done():
    answers = []
    rounds = Rounds(iter([2, 1]), answers.append)
    rounds.wait()
    rounds.step(10, [3.0])
    assert answers == []
    rounds.step(20, [2.0])
    with pytest.raises(Done):
        rounds.step(5, [1.0])
    assert [(a["tokens"], a["losses"]) for a in answers] == [(30, [2.0]), (5, [1.0])]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A training of the embedded backbone on 40 conversations, and where its files lie."""
    folder = tmp_path_factory.mktemp("trainings")
    text = folder / "text.jsonl"
    text.write_text("".join(corpus(40)), encoding="utf-8")
    words = ["--heads", "mlp", "--steps", "1", "--rounds", "1", "--threads", "1", "--tokens-per-step", "1024"]
    options = torch_train.parse([*words, "--data", str(text), "--cache-dir", str(folder / "cache")])
    from trainer.data.splits import load_splits

    config = train_comparison.training_config("mlp", options)
    return train_comparison.prepare_head(config, load_splits(config), folder, 1), folder


def answers_of(train, task, steps):
    answers, threads = [], torch.get_num_threads()
    with contextlib.suppress(Done):
        train(task, Rounds(iter([steps]), answers.append))
    torch.set_num_threads(threads)
    return answers


def test_all_three_trainings_do_the_same_work(prepared):
    """The backbone computes in float32 on each side, the cache rounds to float16."""
    prepared, folder = prepared
    task = {**prepared.torch, "chunked": False, "compiled": False}
    ready, ours = answers_of(train_ours, {"config": task["config"], "out": str(folder / "run")}, 3)
    assert ready == {"ready": True} and prepared.config.max_steps == 3
    for files in (None, prepared.files):
        ready, theirs = answers_of(train_torch, {**task, "files": files}, 3)
        assert ready["adamw"] in ADAMW and ready["adamw_trials_ms"].keys() == ADAMW.keys()
        assert theirs["tokens"] == ours["tokens"] > 2048
        np.testing.assert_allclose(theirs["losses"], ours["losses"], rtol=1e-3)
    other = {**task, "config": {**task["config"], "seed": 1}}  # the control: another order of the text
    _, theirs = answers_of(train_torch, {**other, "files": prepared.files}, 3)
    assert not np.allclose(theirs["losses"], ours["losses"], rtol=1e-3)


def test_a_training_runs_in_a_process_of_its_own_and_says_when_it_cannot(prepared, tmp_path):
    prepared, _ = prepared
    with contextlib.closing(start_torch(prepared, True, Way(True), tmp_path)) as process:
        first, second = process.steps(1), process.steps(2)
        assert process.answers == [first, second] and second["tokens"] > first["tokens"] > 0
    assert process.child.process.returncode == 0  # it ends when no more steps are asked for
    broken = dataclasses.replace(prepared, torch={**prepared.torch, "weights": str(tmp_path / "absent")})
    with pytest.raises(RuntimeError, match="ended with status 1"):
        start_torch(broken, True, Way(), tmp_path)


def test_torch_spins_by_its_own_setting_unless_it_is_to_sleep(monkeypatch, tmp_path):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    plain, sleeping = (train_comparison.environment(3, tmp_path, way) for way in WAYS[:2])
    assert "GOMP_SPINCOUNT" not in plain and sleeping["GOMP_SPINCOUNT"] == "2000"
    assert train_comparison.environment(3, tmp_path, None)["GOMP_SPINCOUNT"] == "7"  # ours: the user's setting
    assert {each["OMP_NUM_THREADS"] for each in (plain, sleeping)} == {"3"}


# The comparison -------------------------------------------------------------------------------------------------------


class FakeProcess:
    """Takes so many seconds a step. loss: of the last step."""

    open = 0

    def __init__(self, step_s, loss=3.0):
        self.step_s, self.loss, self.answers = step_s, loss, []
        self.ready = {"adamw": "fused", "adamw_trials_ms": {"fused": 1.0}}
        FakeProcess.open += 1

    def steps(self, count):
        tokens = 100 * count
        answer = {"seconds": self.step_s * count, "tokens": tokens, "losses": [self.loss], "peak_bytes": 5}
        self.answers.append(answer)
        return answer

    def close(self):
        FakeProcess.open -= 1


def test_the_fastest_way_counts_and_one_that_does_not_run_is_null(monkeypatch):
    monkeypatch.setattr(FakeProcess, "open", 0)
    plain, sleeping, chunked, compiled = WAYS

    def start(way):
        assert FakeProcess.open == 0  # one at a time
        if way.compiled:
            raise RuntimeError("no compiler")
        return FakeProcess({plain: 0.2, sleeping: 0.3, chunked: 0.1}[way])

    way, trials = train_comparison.choose(start, WAYS)
    assert way == chunked and FakeProcess.open == 0
    assert trials["plain"] == {"step_ms": pytest.approx(200), "peak_bytes": 5} and trials["compiled"] is None
    _, trials = train_comparison.choose(start, [plain], steps=1)
    assert trials["plain"]["step_ms"] == pytest.approx(200)
    with pytest.raises(RuntimeError, match="runs in no way"):
        train_comparison.choose(start, [compiled])


@pytest.fixture
def fakes(monkeypatch, prepared):
    """Trainings of 0.1 s (ours), 0.2 s (cached) and 0.4 s (online) a step; returns the loss that online has."""
    monkeypatch.setattr(FakeProcess, "open", 0)
    losses = {"online": 3.0}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GORGON_DEVICE", "cpu")
    monkeypatch.setattr(train_comparison, "prepare_head", lambda *arguments: prepared[0])
    monkeypatch.setattr(train_comparison, "start_ours", lambda *arguments: FakeProcess(0.1))
    monkeypatch.setattr(
        train_comparison,
        "start_torch",
        lambda prepared, cached, way, scratch: (
            FakeProcess(0.2 + way.sleeping) if cached else FakeProcess(0.4, losses["online"])
        ),
    )
    return losses


def run(words, tmp_path, capsys):
    """The record that the entry writes and prints."""
    out = tmp_path / "peers.json"
    assert run_entry(torch_train.main, [*words, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    return record


def test_the_record_holds_speeds_ratios_and_how_pytorch_ran(fakes, tmp_path, capsys, prepared):
    text = str(prepared[1] / "text.jsonl")
    record = run(["--heads", "mlp", "--steps", "4", "--rounds", "3", "--data", text, "--no-compile"], tmp_path, capsys)
    assert record["kind"] == "train-peers" and record["versions"]["torch"] and record["threads"] >= 1
    assert record["data"]["files"] == ["text.jsonl"]  # no folder outside the project
    head = record["heads"]["mlp"]
    assert head["round_tokens"] == [400] * 3  # the rounds that warm up do not count
    ours, cached = head["variants"]["ours"], head["variants"]["torch_cached"]
    assert ours["tokens_per_s"]["rounds"] == pytest.approx([1000] * 3) and ours["peak_bytes"] == 5
    assert cached["tokens_per_s"]["median"] == pytest.approx(500)
    assert not cached["way"]["sleeping"] and set(cached["trials"]) == {"plain", "sleeping", "chunked"}
    assert head["speedup"]["torch_cached"]["median"] == pytest.approx(2)
    assert head["speedup"]["torch_online"]["rounds"] == pytest.approx([4] * 3)
    assert head["learning_rate"] == 0.006  # the head's own recipe
    assert not [line for line in record["notes"] if "losses" in line] and FakeProcess.open == 0
    assert str(prepared[1]) not in json.dumps({k: v for k, v in record.items() if k != "provenance"})


def test_trainings_whose_losses_differ_are_noted(fakes, tmp_path, capsys, prepared):
    fakes["online"] = 3.1
    text = str(prepared[1] / "text.jsonl")
    record = run(["--heads", "mlp", "--steps", "1", "--rounds", "1", "--data", text], tmp_path, capsys)
    assert [line for line in record["notes"] if "losses of torch_online differ from ours by 3.3%" in line]
    assert set(record["heads"]["mlp"]["variants"]["torch_cached"]["trials"]) == {way.name for way in WAYS}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heads", "mpl"], "Unknown head of the comparison 'mpl'. Did you mean 'mlp'?"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--step", "1"], "Unknown option '--step'. Did you mean '--steps'?"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, message, capsys):
    assert run_entry(torch_train.main, words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_torch_the_entry_says_where_it_comes_from(monkeypatch, capsys):
    monkeypatch.setattr(torch_train.importlib.util, "find_spec", lambda name: None)
    assert run_entry(torch_train.main, []) == 2
    assert "requirements-dev.txt" in capsys.readouterr().err
