"""The doctor says what is there, what is missing and how to mend it, and its status says whether a run can begin."""

import json
from pathlib import Path

import pytest

from runtime import compile_check, doctor
from runtime.doctor import examine_machine, main, report, what_is_missing
from runtime.entry import run_entry
from runtime.start.choice import choose_device
from runtime.start.devices import Device, Driver
from runtime.start.toolkit import Toolkit

COMPLETE = {
    "python": "3.11.7", "Python.h": "/usr/include/Python.h", "jittor": "1.3.11.0", "numpy": "1.26.4",
    "g++": "/usr/bin/g++", "oneDNN": "/usr/lib/libdnnl.so.2", "mpicc": "/usr/bin/mpicc",
}  # fmt: skip
GPU = Driver((13, 0), (Device("NVIDIA H100", 80 << 30, 90),))


@pytest.fixture
def machine(monkeypatch):
    """A function that says what the machine has."""

    def set_machine(driver=None, toolkits=(), wanted="auto", **found):
        monkeypatch.setenv("GORGON_DEVICE", wanted)
        monkeypatch.setattr(doctor, "find_driver", lambda: driver or Driver(trouble="no NVIDIA driver"))
        monkeypatch.setattr(doctor, "find_toolkits", lambda: list(toolkits))
        monkeypatch.setattr(doctor, "look_around", lambda: COMPLETE | found)

    return set_machine


def test_a_complete_machine_without_a_gpu_serves(machine, capsys):
    machine()
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "device    cpu (no usable CUDA device: no NVIDIA driver)" in printed and "missing" not in printed


@pytest.mark.parametrize(
    ("found", "needed", "command"),
    [
        ({"jittor": None}, True, "pip install -r requirements.txt"),
        ({"g++": None}, True, "apt-get install g++"),
        ({"Python.h": None}, True, "-dev"),
        ({"numpy": "2.3.0"}, True, "pip install -r requirements.txt"),
        ({"jittor": "1.4.0"}, False, "pip install jittor==1.3.11.0"),
        ({"oneDNN": None}, False, "pip install -r requirements.txt"),
        ({"mpicc": None}, False, "apt-get install openmpi-bin libopenmpi-dev"),
    ],
)
def test_what_is_missing_comes_with_its_command_and_decides_the_status(machine, capsys, found, needed, command):
    (missing,) = what_is_missing(COMPLETE | found)
    assert missing.needed == needed and command in missing.command
    machine(**found)
    assert main([]) == int(needed)
    assert f"install with: {missing.command}" in capsys.readouterr().out


def test_a_gpu_without_a_compiler_is_told_and_the_cpu_serves(machine, capsys):
    machine(driver=GPU)
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "GPU 0     NVIDIA H100, 80.0 GiB, compute capability 9.0" in printed
    assert "install with: pip install -r requirements-cuda.txt" in printed
    machine(driver=GPU, wanted="cuda")
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert "device    none (GORGON_DEVICE=cuda is not available: a CUDA device but no nvcc on the PATH" in printed
    assert "install with: pip install -r requirements-cuda.txt" in printed


def test_json_is_the_same_in_one_object(machine, capsys):
    machine(driver=GPU, oneDNN=None)
    assert main(["--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["usable"] is True and record["device"] == "cpu" and record["driver"]["version"] == [13, 0]
    assert [missing["needed"] for missing in record["missing"]] == [False, False]


def test_this_machine_is_looked_at_as_a_run_would(monkeypatch):
    monkeypatch.delenv("GORGON_DEVICE", raising=False)
    findings = examine_machine()
    choice = choose_device("auto", findings.driver, lambda: findings.toolkits)
    assert (findings.device, findings.reason) == (choice.device, choice.reason)
    assert findings.found["jittor"] == "1.3.11.0" and "g++" in report(findings)


def test_a_failed_check_is_status_1(machine, capsys, monkeypatch):
    def fail(archs):
        raise ValueError(f"no nvcc for {archs}")

    machine()
    monkeypatch.setattr(doctor, "compile_core", fail)
    assert main(["--compile", "--archs", "90"]) == 1
    assert "no nvcc for [90]" in capsys.readouterr().out


def a_toolkit(*problems):
    return Toolkit(Path("/opt/cuda/bin/nvcc"), (13, 0), Path("/opt/cuda"), (80, 90), {}, None, None, problems)


@pytest.mark.parametrize(
    ("toolkits", "words"),
    [
        ([], "no nvcc on the PATH; pip install -r requirements-cuda.txt"),
        ([a_toolkit("no cuBLAS")], "no cuBLAS; pip install"),
        ([a_toolkit("no cuBLAS"), a_toolkit()], r"nvcc does not compile for \[70\]; it knows \[80, 90\]"),
    ],
)
def test_compiling_names_what_it_lacks(monkeypatch, toolkits, words):
    monkeypatch.setattr(compile_check, "find_toolkits", lambda: toolkits)
    with pytest.raises(ValueError, match=words):
        compile_check.begin([70, 90])


@pytest.mark.parametrize("arguments", [["--jsn"], ["--archs", "new"], ["now"]])
def test_a_mistyped_option_is_one_line_and_status_2(machine, capsys, arguments):
    machine()
    assert run_entry(main, arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_start_runs_a_product_where_it_can(machine, capsys, monkeypatch):
    machine()
    assert main(["--start", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"]["start"]["product"] == "equal to NumPy's"
    monkeypatch.setattr(doctor, "try_start", lambda: pytest.fail("started"))
    machine(jittor=None)
    assert main(["--start"]) == 1
