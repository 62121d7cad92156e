"""The GPU check runs every step whatever the others do, ends what hangs, and calls nothing passed that was not run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu_check
from bench.gpu import check, step
from bench.gpu import steps as gpu_steps
from bench.gpu.step import Outcome, Step, StepFailed, run_step
from runtime.entry import run_entry

ROOT = Path(__file__).resolve().parents[3]


def program(name, text, limit_s=30.0, **settings):
    """A step that needs no GPU and runs some Python."""
    return Step(name, [sys.executable, "-c", text], limit_s, **{"needs_gpu": False, **settings})


GOOD = program("good", "print('fine')")
BAD = program("bad", "import sys; print('before'); sys.exit('the reason')")
NEEDY = program("needy", "raise SystemExit('never run here')", needs_gpu=True)
AFTER = program("after", "print('still run')")


@pytest.fixture
def run_check(tmp_path, monkeypatch):
    """run_check(steps, *arguments, gpu=False) -> (status, record, the table's lines)."""
    monkeypatch.setattr(check, "provenance", lambda gpu, outcomes: {"device": "cpu", "git_sha": "abc"})

    def run(several, *arguments, gpu=False):
        monkeypatch.setattr(check, "usable_gpu", lambda: (gpu, "a card" if gpu else "no driver"))
        out = tmp_path / "check.json"
        status = gpu_check.main([*arguments, "--out", str(out), "--logs", str(tmp_path / "logs")], several)
        return status, json.loads(out.read_text())

    return run


def outcomes_of(record):
    return {each["name"]: (each["status"], each["reason"]) for each in record["steps"]}


def test_a_failing_step_does_not_keep_the_others_from_running(run_check, tmp_path, capsys):
    status, record = run_check([GOOD, BAD, AFTER])
    found = outcomes_of(record)
    assert status == 1 and record["kind"] == "gpu-check" and record["status"] == 1
    assert [found[name][0] for name in ("good", "bad", "after")] == ["pass", "fail", "pass"]
    assert found["bad"][1] == "exit status 1: the reason"
    assert (tmp_path / "logs" / "bad.log").read_text() == "before\nthe reason\n"
    lines = capsys.readouterr().out.splitlines()
    assert any("bad" in line and "fail" in line and "bad.log" in line for line in lines)
    assert json.loads(lines[-1]) == record
    assert "2 pass, 1 fail" in lines


def test_all_steps_passing_is_status_0(run_check):
    status, record = run_check([GOOD, AFTER], gpu=True)
    assert status == 0 and {each["status"] for each in record["steps"]} == {"pass"}
    assert record["provenance"]["device"] == "cuda" and {"gpu", "driver", "nvcc"} <= set(record["provenance"])


def test_without_a_gpu_nothing_passes_for_want_of_trying(run_check, capsys):
    status, record = run_check([GOOD, NEEDY])
    assert status == 1 and outcomes_of(record)["needy"] == ("not run", "no usable CUDA device")
    assert "nothing was checked on a GPU (with --allow-no-gpu that is no failure)" in capsys.readouterr().out
    assert run_check([GOOD, NEEDY], "--allow-no-gpu")[0] == 0
    assert run_check([GOOD, BAD, NEEDY], "--allow-no-gpu")[0] == 1
    status, record = run_check([GOOD, NEEDY], gpu=True)  # the control: with one it runs, and fails
    assert status == 1 and outcomes_of(record)["needy"] == ("fail", "exit status 1: never run here")


HANGING = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                          "print('ready', flush=True); time.sleep(600)"], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def is_running(pid):
    """Whether a process is there and not only waiting to be taken note of."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, seconds=10.0):
    ends = time.monotonic() + seconds
    while not condition() and time.monotonic() < ends:
        time.sleep(0.02)
    assert condition()


def test_a_hanging_step_is_ended_with_all_that_it_started(run_check, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "GRACE_S", 0.2)
    hanging = program("hanging", HANGING, limit_s=2.0)
    status, record = run_check([hanging, AFTER])
    assert status == 1 and outcomes_of(record)["hanging"] == ("fail", "stopped after its limit of 2 s")
    assert outcomes_of(record)["after"][0] == "pass"
    child = int((tmp_path / "logs" / "hanging.log").read_text().split()[0])
    wait_until(lambda: not is_running(child))  # it ignores the first signal


def test_a_budget_ends_the_step_in_hand_and_starts_no_other(run_check, monkeypatch):
    monkeypatch.setattr(step, "GRACE_S", 0.2)
    slow = program("slow", "import time; time.sleep(600)")
    status, record = run_check([GOOD, slow, AFTER], "--budget-minutes", "0.02")
    found = outcomes_of(record)
    assert status == 1
    assert found["slow"] == ("not run", "stopped: the budget is used up")
    assert found["after"] == ("not run", "the budget is used up")


def test_continuing_keeps_what_passed_and_runs_the_rest(run_check, tmp_path):
    counting = program("counting", f"open({str(tmp_path / 'count')!r}, 'a').write('x')")
    mended = program("bad", "print('mended')")
    assert run_check([counting, BAD])[0] == 1
    status, record = run_check([counting, mended], "--continue")
    assert status == 0 and [each["status"] for each in record["steps"]] == ["pass", "pass"]
    assert (tmp_path / "count").read_text() == "x"
    _, record = run_check([counting, mended], "--only", "bad")  # the control: without, the file tells of this run alone
    assert outcomes_of(record)["counting"] == ("skipped", "not among --only")


def test_figures_of_another_card_or_commit_are_not_continued(run_check, tmp_path):
    run_check([GOOD])
    path = tmp_path / "check.json"
    content = json.loads(path.read_text())
    for name, value in (("gpu", "another card"), ("git_sha", "0123")):
        path.write_text(json.dumps({**content, "provenance": {**content["provenance"], name: value}}))
        with pytest.raises(ValueError, match=rf"cannot be continued: its {name} is {value}, here it is"):
            gpu_check.main(["--continue", "--out", str(path)], [GOOD])
    path.write_text('{"kind": "engine"}')
    with pytest.raises(ValueError, match="its kind is 'engine'"):
        gpu_check.main(["--continue", "--out", str(path)], [GOOD])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_step_and_still_writes_the_table(tmp_path, number):
    script = tmp_path / "check.py"
    script.write_text(
        "import sys\n"
        "from bench import gpu_check\n"
        "from bench.gpu import check\n"
        "from bench.gpu.step import Step\n"
        "from runtime.entry import run_entry\n"
        "check.provenance = lambda gpu, outcomes: {}\n"
        "check.usable_gpu = lambda: (True, 'a card')\n"
        "sleep = [sys.executable, '-c', 'import time; print(\"asleep\", flush=True); time.sleep(600)']\n"
        "several = [Step('first', ['true'], 9.0), Step('sleeping', sleep, 600.0), Step('last', ['true'], 9.0)]\n"
        "sys.exit(run_entry(lambda arguments: gpu_check.main(arguments, several)))\n"
    )
    command = [sys.executable, str(script), "--out", str(tmp_path / "check.json"), "--logs", str(tmp_path / "logs")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "logs" / "sleeping.log"
    wait_until(lambda: log.exists() and "asleep" in log.read_text(), 60.0)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "1 pass, 2 not run; interrupted" in out
    record = json.loads((tmp_path / "check.json").read_text())
    assert [each["status"] for each in record["steps"]] == ["pass", "not run", "not run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "docter"], "Unknown step 'docter'. Did you mean 'doctor'"),
        (["--skip", "engine-8b"], "Did you mean 'engine-7b'"),
        (["--only", "core", "--skip", "core"], "leave no step"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(check, "run_step", lambda *rest: pytest.fail("ran anyway"))
    assert run_entry(gpu_check.main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


# What a step's files say ---------------------------------------------------------------------------------------------


def test_a_step_that_ends_well_with_a_bad_result_failed(tmp_path):
    def read(result):
        raise StepFailed("the loss rose", {"loss": 2.0})

    stale = tmp_path / "result.json"
    stale.write_text('{"ms": 1}')  # of an earlier run
    for found, reason, figures in (
        (program("a", "", read=read), "the loss rose", {"loss": 2.0}),
        (program("b", "", read=lambda log: json.loads(log.read_text())), "its figures cannot be read", {}),
        (program("c", "", read=lambda log: {"loss": float("nan")}), "its figures cannot be read", {}),
        (program("d", "", read=lambda result: json.loads(result.read_text()), result=stale), "its figures cannot", {}),
        (Step("e", ["/no/such/program"], 5.0), "cannot start", {}),
    ):
        outcome = run_step(found, tmp_path)
        assert (outcome.status, outcome.figures) == ("fail", figures) and outcome.reason.startswith(reason)


def test_the_counts_of_pytest_are_read_and_nothing_but_skipped_tests_is_no_pass(tmp_path):
    log = tmp_path / "log"
    for text, counts in (
        ("....\n12 passed, 3 skipped in 4.01s\n", {"passed": 12, "skipped": 3}),
        ("F.\n1 failed, 1 passed, 2 errors in 1s", {"failed": 1, "passed": 1, "errors": 2}),
    ):
        log.write_text(text)
        assert gpu_steps.pytest_figures(log) == counts
    for text in ("7 skipped in 0.1s", ""):
        log.write_text(text)
        with pytest.raises(StepFailed, match="no test passed"):
            gpu_steps.pytest_figures(log)


def engine_file(path, late_kernels=0, loop=None):
    def one(rows, context, ms, share):
        return {"rows": rows, "context": context, "ms": ms, "bandwidth_share": share}

    shape = {
        "name": "7b",
        "bounds": {"read_gb_s": 3000.0},
        "passes": [one(1, 128, 5.0, 0.8), one(64, 128, 6.0, 0.7), one(1, 1024, 5.5, 0.5), one(64, 1024, 7.7, 0.6)],
        "host": [{"share": 0.04}, {"share": 0.12}],
        "memory": {"late_kernels": late_kernels},
        "fits_in_cache": False,
    }
    path.write_text(json.dumps({"shapes": [shape], "loop": loop}))
    return path


def test_the_figures_of_an_engine_are_the_worst_of_its_contexts(tmp_path):
    figures = gpu_steps.engine_figures(engine_file(tmp_path / "engine.json"))
    assert figures["floor_times"] == 2.0 and figures["verify_over_one"] == pytest.approx(1.4)
    assert figures["host_share"] == 0.12
    assert gpu_steps.engine_line(figures) == (
        "pass ms: 5.00 after 128, 5.50 after 1024; 2.00 x the floor (goal 1.5: missed); "
        "verify(64)/verify(1) 1.40 (goal 1.25: missed); host share 12% (goal 10%: missed)"
    )
    assert "goal" not in gpu_steps.engine_line({**figures, "shape": "tiny-vicuna"})  # launches bound such a pass
    loop = {"autoregressive": {"tokens_per_s": 900.0}, "tree": {"outside_ms": 0.1, "step_ms": 2.0}}
    figures = gpu_steps.engine_figures(engine_file(tmp_path / "loop.json", loop=loop))
    assert gpu_steps.engine_line(figures).endswith(
        "loop: 900 tokens/s without a head; a tree step's share outside the kernels 5% (goal 10%: met)"
    )
    with pytest.raises(StepFailed, match="2 kernels were compiled on the clock"):
        gpu_steps.engine_figures(engine_file(tmp_path / "late.json", late_kernels=2))


def test_a_loss_that_does_not_fall_is_a_failure(tmp_path):
    path = tmp_path / "train.json"

    def write(first, last):
        history = [{"loss": [first, 1.0]}, {"loss": [last, 1.0]}]
        record = {"provenance": {"device": "cuda"}, "steps": 50, "tokens_per_s": 9000.0, "history": history}
        path.write_text(json.dumps(record))

    write(5.0, 4.0)
    figures = gpu_steps.train_figures(path)
    assert gpu_steps.train_line(figures) == "held-out loss 6.000 to 5.000 in 50 steps, 9000 tokens/s"
    write(5.0, 5.0)
    with pytest.raises(StepFailed, match="did not fall"):
        gpu_steps.train_figures(path)


def test_texts_that_differ_from_the_baseline_are_a_failure(tmp_path, make_record):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(make_record()))
    assert "parity 2/2" in gpu_steps.decoding_line(gpu_steps.decoding_figures(path))
    path.write_text(json.dumps(make_record(parity__identical=1)))
    with pytest.raises(StepFailed, match="only 1 of 2 texts"):
        gpu_steps.decoding_figures(path)


def test_every_step_that_needs_a_gpu_refuses_to_fall_back_to_the_cpu():
    named = {each.name: each for each in gpu_steps.STEPS}
    assert len(named) == len(gpu_steps.STEPS) and {"doctor", "core", "gpu-tests", "engine-7b"} <= set(named)
    for each in gpu_steps.STEPS:
        if each.needs_gpu and each.name != "setup":
            assert each.env["GORGON_DEVICE"] == "cuda", each.name
        assert each.limit_s <= 20 * 60
    kernels = {name for name in named if name.startswith("ops-")}
    assert {"ops-linear", "ops-attention", "ops-select"} <= kernels and "ops-emulator" not in kernels


def test_a_card_is_described_by_its_tools(monkeypatch):
    answers = {"nvidia-smi": "NVIDIA H100 80GB HBM3, 580.95, 81559\n", "nvcc": "x\nCuda, release 13.0, V13.0.88\n"}

    def answer(words, **options):
        if words[0] not in answers:
            raise FileNotFoundError(words[0])
        return SimpleNamespace(stdout=answers[words[0]])

    monkeypatch.setattr(check.subprocess, "run", answer)
    assert check.describe_gpu() == {
        "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.95", "gpu_memory_bytes": 81559 << 20, "nvcc": "13.0, V13.0.88",
    }  # fmt: skip
    answers.clear()
    assert set(check.describe_gpu().values()) == {None}


def test_provenance_is_that_of_the_device_that_was_checked(monkeypatch):
    asked = []

    def answer(*words, environment, timeout_s):
        asked.append(environment["GORGON_DEVICE"])
        return 'a line before\n{"device": "known"}'

    monkeypatch.setattr(check, "output_of", answer)
    assert check.provenance(False, []) == {"device": "known"}
    assert check.provenance(True, [Outcome("core", "fail")]) == {}
    assert check.provenance(True, [Outcome("core", "pass")]) == {"device": "known"}
    assert asked == ["cpu", "cuda"]
    monkeypatch.setattr(check, "output_of", lambda *words, **options: None)
    assert check.provenance(False, []) == {}
