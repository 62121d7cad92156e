"""Jittor starts anywhere, quietly, and whatever stands in its way is said in words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import runtime
from runtime import bootstrap
from runtime.bootstrap import (
    ONEDNN_FOLDER,
    DeviceError,
    choose_device,
    core_is_compiled,
    count_cuda_devices,
    link_onednn,
    onednn_prefix,
    quiet_file_descriptors,
    toolkit_major_version,
    under_mpi,
)
from runtime.entry import run_entry, suggest

ROOT = Path(__file__).resolve().parents[2]
# What a started process leaves in its environment for its children.
SETTLED = ("nvcc_path", "cache_name", "use_mkl", "use_mpi", "log_silent", "GORGON_DEVICE")


# The choice of a device


@pytest.mark.parametrize(
    ("wanted", "num_devices", "nvcc", "toolkit", "device", "reason"),
    [
        ("auto", 0, None, None, "cpu", "no usable CUDA device"),
        ("auto", 0, "/usr/bin/nvcc", None, "cpu", "no usable CUDA device"),
        ("auto", 1, None, None, "cpu", "no nvcc on the PATH"),
        ("auto", 1, "", None, "cpu", "no nvcc on the PATH"),
        ("auto", 1, "/usr/bin/nvcc", None, "cpu", "the CUDA toolkit is None"),
        ("auto", 1, "/usr/bin/nvcc", 13, "cpu", "the CUDA toolkit is 13; Jittor 1.3.11 knows up to 12"),
        ("auto", 2, "/usr/bin/nvcc", 12, "cuda", "2 CUDA device(s), toolkit 12"),
        ("cuda", 1, "/usr/bin/nvcc", 11, "cuda", "toolkit 11"),
        ("cpu", 2, "/usr/bin/nvcc", 12, "cpu", "asked for"),
        ("cpu", 0, None, None, "cpu", "asked for"),
    ],
)
def test_the_device_follows_from_what_the_machine_has(wanted, num_devices, nvcc, toolkit, device, reason):
    chosen, why = choose_device(wanted, num_devices, nvcc, toolkit)
    assert chosen == device and reason in why


@pytest.mark.parametrize(("num_devices", "nvcc", "toolkit"), [(0, "nvcc", 12), (1, None, None), (1, "nvcc", 13)])
def test_cuda_that_was_asked_for_and_cannot_be_had_raises(num_devices, nvcc, toolkit):
    with pytest.raises(DeviceError, match="GORGON_DEVICE=cuda cannot be served: "):
        choose_device("cuda", num_devices, nvcc, toolkit)


@pytest.mark.parametrize("wanted", ["gpu", "CUDA", ""])
def test_another_word_for_a_device_is_refused(wanted):
    with pytest.raises(ValueError, match="GORGON_DEVICE must be auto, cpu or cuda, got"):
        choose_device(wanted, 1, "nvcc", 12)


def write_script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_toolkit_says_its_version_or_nothing(tmp_path):
    text = "Cuda compilation tools, release 13.1, V13.1.80"
    assert toolkit_major_version(write_script(tmp_path / "a", f"echo '{text}'")) == 13
    assert toolkit_major_version(write_script(tmp_path / "b", "echo 'hello'")) is None
    assert toolkit_major_version(write_script(tmp_path / "c", f"echo '{text}'; exit 1")) is None
    assert toolkit_major_version(str(tmp_path / "nowhere")) is None


# oneDNN and the compiled core


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("JITTOR_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def prefix():
    found = onednn_prefix()
    if found is None:
        pytest.skip("oneDNN is not installed")
    return found


def test_onednn_is_linked_where_jittor_looks(home, prefix):
    folder = home / ".cache" / "jittor" / "mkl" / ONEDNN_FOLDER
    for _ in range(2):  # a second time changes nothing
        link_onednn(prefix)
        assert os.readlink(folder / "include") == str(prefix / "include")
        assert (folder / "include" / "dnnl.hpp").is_file()
        assert os.readlink(folder / "lib" / "libmkldnn.so") == str(prefix / "lib" / "libdnnl.so.2")
        assert sorted(p.name for p in folder.iterdir()) == ["include", "lib"]
        assert [p.name for p in (folder / "lib").iterdir()] == ["libmkldnn.so"]


def test_links_into_another_environment_are_replaced(home, prefix):
    folder = home / ".cache" / "jittor" / "mkl" / ONEDNN_FOLDER
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to("/gone/include")
    (folder / "lib" / "libmkldnn.so").symlink_to("/gone/lib/libdnnl.so.2")
    link_onednn(prefix)
    assert (folder / "include" / "dnnl.hpp").is_file() and (folder / "lib" / "libmkldnn.so").is_file()


def test_a_onednn_that_jittor_downloaded_itself_does_not_stand_in_the_way(home, prefix):
    folder = home / ".cache" / "jittor" / "mkl" / ONEDNN_FOLDER
    (folder / "lib").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "dnnl.hpp").write_text("")
    (folder / "lib" / "libmkldnn.so").write_bytes(b"")
    link_onednn(prefix)


def test_a_compiled_core_is_found_by_its_cache_name(home, monkeypatch):
    monkeypatch.setenv("cache_name", "gorgon-cuda")
    assert not core_is_compiled()
    deep = home / ".cache" / "jittor" / "jt1.3.11" / "g++12" / "py3.11" / "Linux" / "cpu" / "7b6b"
    (deep / "gorgon-cpu").mkdir(parents=True)
    (deep / "gorgon-cpu" / "jittor_core.cpython-311-x86_64-linux-gnu.so").touch()
    assert not core_is_compiled()
    monkeypatch.setenv("cache_name", "gorgon-cpu")
    assert core_is_compiled()
    (deep / "gorgon-cpu" / "jittor_core.cpython-311-x86_64-linux-gnu.so").unlink()
    (deep / "gorgon-cpu" / "jittor_core.cpython-311-x86_64-linux-gnu.so.key").touch()  # half a compilation
    assert not core_is_compiled()


def test_mpirun_is_recognised(monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    assert not under_mpi()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert under_mpi()


# Quiet


def test_what_native_code_prints_is_kept_from_the_user(capfd):
    print("before")
    with quiet_file_descriptors():
        os.write(1, b"compiling 1/9\n")
        os.write(2, b"warning: something\n")
        subprocess.run(["echo", "a child"], check=True)
    print("after")
    printed = capfd.readouterr()
    assert printed.out == "before\nafter\n" and printed.err == ""


def test_an_error_shows_the_last_lines_and_is_passed_on(capfd):
    with pytest.raises(ZeroDivisionError), quiet_file_descriptors():
        for number in range(40):
            os.write(1 + number % 2, f"line {number}.\n".encode())
        raise ZeroDivisionError
    os.write(1, b"open again\n")
    printed = capfd.readouterr()
    assert printed.out == "open again\n"
    assert [line for line in printed.err.splitlines() if line] == [f"line {number}." for number in range(10, 40)]


# Whole processes


def run_python(code, tmp_path, **environment):
    """A fresh interpreter whose PATH holds an ``nvcc`` that leaves a mark when it is run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_script(folder / "nvcc", f"touch '{tmp_path}/nvcc-was-run'; echo 'release 12.4, V12.4.1'")
    inherited = {key: value for key, value in os.environ.items() if key not in SETTLED}
    path = f"{folder}:{os.environ['PATH']}"
    environment = {**inherited, "PYTHONPATH": str(ROOT), "PATH": path, **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={key: value for key, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=540,
    )


STARTS = """
import os, signal, subprocess, sys
from runtime import jt
import runtime
assert runtime.device == "cpu", runtime.device
assert (jt.ones((3,)) * 2).sum().item() == 6
assert "torch" not in sys.modules
child = subprocess.Popen(["sleep", "60"])
child.kill()
child.wait()
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_jittor_starts_with_an_nvcc_and_no_device_and_leaves_signals_to_python(tmp_path):
    done = run_python(STARTS, tmp_path)
    assert done.returncode == 7, done.stderr  # it got as far as Ctrl-C, and that came as an exception
    assert done.stdout == ""
    assert not (tmp_path / "nvcc-was-run").exists()


STARTS_WITHOUT_JITTOR = """
import os, sys, types
sys.modules["jittor"] = types.SimpleNamespace(flags=types.SimpleNamespace(), __spec__="a stand-in")
from runtime.bootstrap import start
start()
print(os.environ["JITTOR_HOME"])
"""


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_jittor_is_told_its_home_so_that_one_it_remembers_does_not_count(tmp_path, given):
    home = tmp_path / "home"
    (home / ".cache" / "jittor").mkdir(parents=True)
    (home / ".cache" / "jittor" / "config.json").write_text(json.dumps({"JITTOR_HOME": "/nowhere/at/all"}))
    wanted = tmp_path / given if given else home
    done = run_python(STARTS_WITHOUT_JITTOR, tmp_path, HOME=str(home), JITTOR_HOME=str(wanted) if given else None)
    assert done.returncode == 0 and done.stdout == f"{wanted}\n", done.stderr


def test_helpers_of_the_command_line_load_without_jittor(tmp_path):
    code = "import runtime, runtime.entry, runtime.provenance, sys; sys.exit('jittor' in sys.modules)"
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unknown_attribute_of_runtime_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'jittor'"):
        _ = runtime.jittor


def test_a_missing_jittor_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"make setup.*requirements\.txt"):
        bootstrap.start()


# The command line's answers


@pytest.mark.parametrize(
    ("outcome", "status", "printed"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (ValueError("two\n  lines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x.json"), 2, "error: [Errno 2] No such file: 'x.json'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_entry_answers_with_a_status_and_one_line(capsys, outcome, status, printed):
    def main(arguments):
        assert arguments == ["a"]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert run_entry(main, ["a"]) == status
    assert capsys.readouterr() == ("", printed)


def test_an_entry_passes_on_what_is_no_mistake_of_the_users():
    def main(arguments):
        raise AssertionError("a fault of ours")

    with pytest.raises(AssertionError):
        run_entry(main, [])


def test_an_entry_takes_the_process_arguments_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "3"])
    seen = []
    assert run_entry(seen.extend) == 0 and seen == ["--seed", "3"]


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    assert str(suggest("head", "gatedrnn", ["mlp", "gated_rnn"])) == (
        "Unknown head 'gatedrnn'. Did you mean 'gated_rnn'? Available: gated_rnn, mlp"
    )
    assert str(suggest("head", "zzz", ["mlp"])) == "Unknown head 'zzz'. Available: mlp"


# Provenance


def test_provenance_is_json_and_names_the_device(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), "--seed", "3"])
    record = json.loads(json.dumps(runtime.provenance(seed=3)))
    assert set(record) == {
        "git_sha", "git_dirty", "command", "utc", "python", "versions", "device", "device_name", "threads",
        "memory_bytes", "world_size", "seed",
    }  # fmt: skip
    assert record["device"] in ("cpu", "cuda") and record["device_name"]
    assert record["command"] == ["train.py", "--seed", "3"] and record["seed"] == 3
    assert record["versions"]["jittor"] and record["threads"] >= 1 and record["memory_bytes"] > 2**20
    assert record["world_size"] == 1 and record["utc"].endswith("+00:00")


def test_provenance_outside_a_git_history_says_null(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["runtime.provenance"], "ROOT", tmp_path)
    record = runtime.provenance()
    assert record["git_sha"] is None and record["git_dirty"] is None
