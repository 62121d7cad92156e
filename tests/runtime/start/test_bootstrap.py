"""Jittor starts anywhere, quietly, and whatever is in its way is reported."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import runtime
from runtime.entry import run_entry, suggest
from runtime.start import bootstrap
from runtime.start.bootstrap import core_is_compiled, under_mpi
from runtime.start.choice import Choice
from runtime.start.devices import find_driver
from runtime.start.onednn import ONEDNN_FOLDER, link_onednn, onednn_prefix
from runtime.start.python_config import python_config
from runtime.start.quiet import quiet_file_descriptors
from runtime.start.toolkit import NAMED, Part, Toolkit

ROOT = Path(__file__).resolve().parents[3]
# What a started process leaves in its environment for its children.
SETTLED = ("nvcc_path", "cache_name", "use_mkl", "use_mpi", "log_silent", "GORGON_DEVICE", "cuda_archs", NAMED)


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


@pytest.mark.parametrize("before", ["nothing", "links into another environment", "what Jittor downloaded itself"])
def test_onednn_is_linked_where_jittor_looks(home, prefix, before):
    folder = home / ".cache" / "jittor" / "mkl" / ONEDNN_FOLDER
    library = folder / "lib" / "libmkldnn.so"
    if before != "nothing":
        library.parent.mkdir(parents=True)
    if before == "links into another environment":
        (folder / "include").symlink_to("/gone/include")
        library.symlink_to("/gone/lib/libdnnl.so.2")
    elif before == "what Jittor downloaded itself":
        (folder / "include").mkdir()
        (folder / "include" / "dnnl.hpp").touch()
        library.touch()
    for _ in range(2):  # a second time changes nothing
        link_onednn(prefix)
        assert (folder / "include" / "dnnl.hpp").is_file() and library.is_file()
        assert sorted(p.name for p in folder.iterdir()) == ["include", "lib"]
        assert [p.name for p in (folder / "lib").iterdir()] == ["libmkldnn.so"]
    if before != "what Jittor downloaded itself":
        assert os.readlink(folder / "include") == str(prefix / "include")
        assert os.readlink(library) == str(prefix / "lib" / "libdnnl.so.2")


@pytest.mark.parametrize(("name", "below"), [("gorgon-cpu", ""), ("gorgon-cuda", "cu13.0.88_sm_90")])
def test_a_compiled_core_is_found_by_its_sources_and_its_cache_name(home, monkeypatch, name, below):
    """With CUDA it is one folder deeper."""
    sources = Path("/cache/jittor-1")
    version = f"py{platform.python_version()}"
    folder = home / ".cache" / "jittor" / "jt1.3.11" / "g++12" / version / "Linux" / "cpu" / "344b" / name / below
    folder.mkdir(parents=True)
    core = folder / "jittor_core.cpython-311-x86_64-linux-gnu.so"
    core.with_name(f"{core.name}.key").touch()  # half a compilation
    monkeypatch.setenv("cache_name", name)
    assert not core_is_compiled(sources)
    core.touch()
    assert core_is_compiled(sources)
    assert not core_is_compiled(Path("/cache/jittor-2"))
    monkeypatch.setenv("cache_name", "another")
    assert not core_is_compiled(sources)


def test_mpirun_is_recognized(monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    assert not under_mpi()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert under_mpi()


# What Jittor reads from the environment


@pytest.fixture
def environment(home, monkeypatch):
    """The environment of this process, put back afterwards together with its module path."""
    kept = dict(os.environ)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in SETTLED:
        monkeypatch.delenv(name, raising=False)
    yield os.environ
    os.environ.clear()
    os.environ.update(kept)


def bare_toolkit(folder):
    library = folder / "libcublas.so.13"
    library.parent.mkdir(parents=True, exist_ok=True)
    library.touch()
    return Toolkit(folder / "nvcc", (13, 0), folder, (90,), {"cublas": Part(folder, library, 13)}, None, None, ())


def test_with_cuda_jittor_is_given_one_folder(environment, home, tmp_path):
    bootstrap.settle(Choice("cuda", "", "", bare_toolkit(tmp_path / "cuda"), (80, 90)))
    assert environment["cache_name"] == "gorgon-cuda" and environment["cuda_archs"] == "80 90"
    assert environment["nvcc_path"].startswith(f"{home}/.cache/gorgon/toolkit-")
    assert environment[NAMED] == str(tmp_path / "cuda" / "nvcc")
    wanted = {"conv_opt": "1", "use_cutt": "0", "use_cutlass": "0", "use_nccl": "0"}  # cuBLAS and cuRAND, no downloads
    assert {name: environment[name] for name in wanted} == wanted
    sources = bootstrap.settle(Choice("cpu", "asked for"))  # a process that this one starts may still take the CPU
    assert sys.path[0] == str(sources) and sources.parent == home / ".cache" / "gorgon"
    assert (sources / "jittor_utils").is_dir()
    assert environment["cache_name"] == "gorgon-cpu" and environment["nvcc_path"] == ""


def test_what_the_user_has_set_stays(environment, tmp_path):
    environment.update(cache_name="mine", nccl_include_path="/opt/nccl/include", nccl_lib_path="/opt/nccl/lib")
    bootstrap.settle(Choice("cuda", "", "", bare_toolkit(tmp_path / "cuda"), (90,)))
    assert environment["cache_name"] == "mine" and "use_nccl" not in environment


def test_python_headers_are_found_without_the_script_that_tells(monkeypatch, tmp_path):
    monkeypatch.setattr("runtime.start.python_config.places", lambda: [tmp_path / "nowhere"])
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    with pytest.raises(ImportError, match=r"Python\.h.*install python3\.\d+-dev"):
        python_config(tmp_path / "cache")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    script = python_config(tmp_path / "cache")

    def ask(word):
        return subprocess.run([script, word], capture_output=True, text=True, check=True).stdout.strip()

    assert ask("--includes") == f"-I{tmp_path}/include -I{tmp_path}/platinclude"
    assert ask("--extension-suffix").endswith(".so")
    monkeypatch.setattr("runtime.start.python_config.places", lambda: [script])
    assert python_config(tmp_path / "cache") is None


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
    (folder / "nvcc").write_text(f"#!/bin/sh\ntouch '{tmp_path}/nvcc-was-run'; echo 'release 12.4, V12.4.1'\n")
    (folder / "nvcc").chmod(0o755)
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


@pytest.mark.skipif(bool(find_driver().devices), reason="this machine has a CUDA device")
def test_jittor_starts_with_an_nvcc_and_no_device_and_leaves_signals_to_python(tmp_path):
    done = run_python(STARTS, tmp_path)
    assert done.returncode == 7, done.stderr  # it got as far as Ctrl-C, and that came as an exception
    assert done.stdout == ""
    assert not (tmp_path / "nvcc-was-run").exists()


STARTS_WITHOUT_JITTOR = """
import os, sys, types
sys.modules["jittor"] = types.SimpleNamespace(flags=types.SimpleNamespace(), __spec__="a stand-in")
from runtime.start.bootstrap import start
start()
print(os.environ["JITTOR_HOME"])
"""


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_jittor_gets_its_home_whatever_home_it_has_stored(tmp_path, given):
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


def test_a_missing_jittor_says_how_to_install_it(monkeypatch):
    with pytest.raises(AttributeError, match="no attribute 'jittor'"):
        _ = runtime.jittor
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
        (AssertionError("a defect of ours"), None, ""),
    ],
)
def test_an_entry_answers_with_a_status_and_one_line(capsys, monkeypatch, outcome, status, printed):
    def main(arguments):
        assert arguments == ["a"]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(sys, "argv", ["train.py", "a"])
    if status is None:
        with pytest.raises(type(outcome)):
            run_entry(main)
    else:
        assert run_entry(main) == run_entry(main, ["a"]) == status
    assert capsys.readouterr() == ("", 2 * printed)


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    assert str(suggest("head", "gatedrnn", ["mlp", "gated_rnn"])) == (
        "Unknown head 'gatedrnn'. Did you mean 'gated_rnn'? Available: gated_rnn, mlp"
    )
    assert str(suggest("head", "zzz", ["mlp"])) == "Unknown head 'zzz'. Available: mlp"


# Provenance


def test_provenance_is_json_and_names_the_device(monkeypatch, tmp_path):
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
    monkeypatch.setattr(sys.modules["runtime.provenance"], "ROOT", tmp_path)  # without a git history
    assert runtime.provenance()["git_sha"] is None and runtime.provenance()["git_dirty"] is None
