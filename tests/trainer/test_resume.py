"""A killed run is resumed to the weights of an uninterrupted one; damaged files are refused by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from heads import checkpoint
from heads.checkpoint import config_digest
from runtime.atomic import sha256_of
from tests.trainer.runs import NUM_STEPS, OPTIONS, start, training_data
from trainer.features.cache import OnlineFeatures
from trainer.state import check_identity, list_states, newest_state

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Ends a run in the middle of a step, unexpected by the trainer."""


def kill_at(wanted):
    def progress(step, num_steps, record):
        if step == wanted:
            raise Killed

    return progress


def tensors(out):
    """The bytes of the checkpoint and of the last state."""
    files = [out / "checkpoint" / "head.safetensors", *sorted(list_states(out)[-1].glob("*.safetensors"))]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def comparable(out):
    """The log without its clocks."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_s") and k != "memory_bytes"} for line in lines]


VARIANTS = {
    "plain": {},
    "averaged lion": {"optimizer": "lion", "ema": 0.9, "learning_rate": 2e-3, "score_every": 3},
    "muon in two passes": {"optimizer": "muon", "accumulate": 2, "schedule": "wsd"},
    "two stages": {"head": "lora", "head_options": {"num_depths": 2, "adapter_rank": 2, "joint_share": 0.5}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_is_resumed_to_the_weights_of_an_uninterrupted_one(backbone, tmp_path, variant):
    options = VARIANTS[variant]
    start(backbone, tmp_path / "complete", **options)
    for step in (3, 7, 11):  # before the first state, after it, and after the second
        with pytest.raises(Killed):
            state = newest_state(tmp_path / "broken")
            start(backbone, tmp_path / "broken", state=state, progress=kill_at(step), **options)
    state = newest_state(tmp_path / "broken")
    assert state.step == 8
    result, _, records, run = start(backbone, tmp_path / "broken", state=state, **options)
    assert [record["step"] for record in records] == [9, 10, 11, 12] and result.steps == NUM_STEPS
    assert tensors(tmp_path / "broken") == tensors(tmp_path / "complete")
    assert comparable(tmp_path / "broken") == comparable(tmp_path / "complete")
    assert [(s["first_step"], s["last_step"]) for s in run.sessions] == [(0, 4), (4, 8), (8, 12)]


def test_a_run_that_forgets_its_moments_ends_elsewhere(backbone, tmp_path, monkeypatch):
    """The control of the test above: the comparison notices an optimizer that starts over."""
    start(backbone, tmp_path / "complete")
    with pytest.raises(Killed):
        start(backbone, tmp_path / "broken", progress=kill_at(7))
    monkeypatch.setattr("trainer.optim.optimizer.Optimizer.load_state", lambda self, state: None)
    start(backbone, tmp_path / "broken", state=newest_state(tmp_path / "broken"))
    assert tensors(tmp_path / "broken") != tensors(tmp_path / "complete")


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "between two steps"), (signal.SIGTERM, "within a step")]
)
def test_a_run_stopped_by_a_signal_is_resumed(backbone, tmp_path, number, moment):
    def stop(step, num_steps, record):
        if step == 6 and moment == "between two steps":
            os.kill(os.getpid(), number)

    online, calls = OnlineFeatures(backbone, training_data()[0], ()), []

    def source(indices):
        calls.append(1)
        if len(calls) == 6 and moment == "within a step":
            os.kill(os.getpid(), number)
        return online(indices)

    start(backbone, tmp_path / "complete")
    result, *_ = start(backbone, tmp_path / "broken", source=source, progress=stop)
    assert result.interrupted and result.steps == 6
    assert (tmp_path / "broken" / "checkpoint").exists() and comparable(tmp_path / "broken")[-1]["finished"] is False
    state = newest_state(tmp_path / "broken")
    assert state.step == 6
    result, _, _, _ = start(backbone, tmp_path / "broken", state=state)
    assert result.steps == NUM_STEPS and not result.interrupted
    complete, broken = tensors(tmp_path / "complete"), tensors(tmp_path / "broken")
    name = f"step-{NUM_STEPS:08d}/head.safetensors"
    assert complete[name] == broken[name]


def test_only_the_newest_states_are_kept(backbone, tmp_path):
    start(backbone, tmp_path / "run", keep_last=2, save_every=3)
    assert [path.name for path in list_states(tmp_path / "run")] == ["step-00000009", "step-00000012"]
    start(backbone, tmp_path / "none", save_every=0)
    assert list_states(tmp_path / "none") == [] and newest_state(tmp_path / "none") is None


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    start(backbone, out, ema=0.5)
    return out


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("head.safetensors", "cut"),
        ("optimizer.safetensors", "changed"),
        ("average.safetensors", "gone"),
        ("state.json", "cut"),
        ("state.json", "changed"),
    ],
)
def test_a_damaged_state_is_refused_by_name(finished, tmp_path, file, harm):
    shutil.copytree(finished, tmp_path / "run")
    path = list_states(tmp_path / "run")[-1] / file
    damage(path, harm)
    with pytest.raises(ValueError, match=rf"{file}.*(is missing|is damaged|not valid JSON).*delete .*start over"):
        newest_state(tmp_path / "run")
    assert newest_state(finished).step == NUM_STEPS  # the control


@pytest.mark.parametrize("file", ["head.safetensors", "optimizer.safetensors", "average.safetensors"])
def test_a_state_that_is_not_finite_is_refused_by_name(finished, tmp_path, file):
    shutil.copytree(finished, tmp_path / "run")
    directory = list_states(tmp_path / "run")[-1]
    arrays = load_file(directory / file)
    name = next(name for name, array in arrays.items() if array.dtype == np.float32)
    arrays[name] = np.full_like(arrays[name], np.nan)
    save_file(arrays, directory / file)
    meta = json.loads((directory / "state.json").read_text())
    meta["files"][file] = sha256_of(directory / file)
    (directory / "state.json").write_text(json.dumps({**meta, "digest": config_digest(meta)}))
    with pytest.raises(ValueError, match=rf"{file}: .* not finite .*; delete .* to start over"):
        newest_state(tmp_path / "run")


def damage(path, harm):
    content = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:  # one digit or one bit, so that JSON and safetensors can still be read
        place = next(
            i for i in range(len(content) // 2, len(content)) if path.suffix != ".json" or 48 <= content[i] < 58
        )
        content[place] ^= 1
        path.write_bytes(content)


def test_a_state_of_a_run_with_other_options_is_refused(finished):
    state = newest_state(finished)
    state.meta["identity"] = {"options": {"epochs": 1.0, "out": "a"}, "data": "abc", "head": "mlp"}
    check_identity(state, {"options": {"epochs": 1.0, "out": "b"}, "data": "abc", "head": "mlp"})
    with pytest.raises(ValueError, match=r"another run: data was 'abc', is 'xyz'; epochs was 1\.0, is 2\.0"):
        check_identity(state, {"options": {"epochs": 2.0, "out": "a"}, "data": "xyz", "head": "mlp"})


@pytest.mark.parametrize(
    ("folder", "change", "reason"),
    [
        ("step-00000012", {"step": 10**9}, r"is of step 1000000000, best \d+; its folder names another"),
        ("step-00000012", {"step": -5}, r"progress\.step: .* \(got -5\)"),
        ("step-00000012", {"step": "12"}, r"progress\.step: "),
        ("step-00000012", {"best_step": 13}, "best 13"),
        ("step-00000012", {"history": [{"step": 1}]}, r"progress\.history"),
        ("step-00000012", {"train_s": None}, r"progress\.train_s"),
        ("step-00000012", {"sessions": {}}, r"progress\.sessions"),
    ],
)
def test_a_state_whose_digest_fits_and_whose_counters_do_not_is_refused(finished, tmp_path, folder, change, reason):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "states" / folder / "state.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(checkpoint.signed({**meta, "progress": {**meta["progress"], **change}})))
    with pytest.raises(ValueError, match=rf"state\.json.*{reason}.*; delete .* to start over"):
        newest_state(tmp_path / "run")


def test_a_state_that_holds_bare_nan_as_older_ones_do_is_read(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = list_states(tmp_path / "run")[-1] / "state.json"
    meta = json.loads(path.read_text())
    meta["progress"]["best"]["loss"][-1] = float("nan")
    meta["digest"] = checkpoint.config_digest(meta)
    path.write_text(json.dumps(meta))
    assert newest_state(tmp_path / "run").meta["progress"]["best"]["loss"][-1] is None


@pytest.mark.parametrize("name", ["step-\u00b2", "step-99999999x", "step--0000005", "step-1"])
def test_a_folder_that_no_run_made_is_no_state(finished, tmp_path, name):
    shutil.copytree(finished, tmp_path / "run")
    expected = list_states(tmp_path / "run")
    (tmp_path / "run" / "states" / name).mkdir()
    assert list_states(tmp_path / "run") == expected


def test_a_full_disk_ends_the_run_and_leaves_the_earlier_state(backbone, tmp_path, monkeypatch):
    real, full_at = checkpoint.save_file, ["step-00000008"]

    def full(arrays, path):
        if full_at[0] in path:
            raise SafetensorError("I/O error: No space left on device (os error 28)")  # of the library, no OSError
        real(arrays, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"step-00000008 cannot be written: .*No space left.*then --resume, from step 4$"):
        start(backbone, tmp_path / "run")
    for full_at[0], told in (("step-00000004", "no earlier state$"), ("checkpoint", "write .*checkpoint: .*No space")):
        with pytest.raises(OSError, match=told):
            start(backbone, tmp_path / "early")
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    start(backbone, tmp_path / "run", state=newest_state(tmp_path / "run"))
    start(backbone, tmp_path / "complete")
    assert tensors(tmp_path / "run") == tensors(tmp_path / "complete")


PROGRAM = """
import sys
from pathlib import Path
from tests.small import small_backbone
from tests.trainer.runs import start
from trainer.state import newest_state
out = Path(sys.argv[1])
out.mkdir(exist_ok=True)
backbone = small_backbone()
print("ready", flush=True)
start(backbone, out, state=newest_state(out), max_steps=60, save_every=2, score_every=3, epochs=30.0, ema=0.9)
"""
assert OPTIONS["head"] == "gated_rnn"


def child(out):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out)], env=environment, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def kill_while_writing(process, out):
    """SIGKILL at a moment when a checkpoint or a state is half written. False if there was none."""
    while process.poll() is None:
        if any(out.glob(".checkpoint.*.partial")) or any((out / "states").glob(".*.partial")):
            process.kill()
            process.wait()
            return True
    return False


def test_sigkill_changes_nothing(tmp_path):
    """Kill a training after some seconds, and while it writes, None; then let it end."""
    complete, broken = tmp_path / "complete", tmp_path / "broken"
    process = child(complete)
    assert process.wait() == 0
    killed = half_written = 0
    for moment in (0.3, None, 0.2):
        process = child(broken)
        if moment is None:
            half_written += kill_while_writing(process, broken)
        else:
            time.sleep(moment)
        killed += process.poll() is None or process.returncode == -signal.SIGKILL
        process.kill()
        process.wait()
    assert child(broken).wait() == 0
    assert tensors(broken) == tensors(complete) and comparable(broken) == comparable(complete)
    assert killed == 3 and half_written == 1
