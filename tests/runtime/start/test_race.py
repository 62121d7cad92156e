"""Jittor loads a graph's new kernels in several threads, which change the graph: one at a time.

Delays in the middle of each change make a collision likely; without the lock of runtime/start/jittor_source.py the
program corrupts its heap in most runs.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUNS = 5

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(os.environ.get("GORGON_DEVICE") == "cuda", reason="the products are relayed to oneDNN"),
]


@pytest.fixture(scope="module")
def hook(tmp_path_factory):
    library = tmp_path_factory.mktemp("hook") / "list_hook.so"
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", HERE / "list_hook.cc", "-o", library], check=True)
    return library


def run(hook, mode, **environment):
    """(status, what the program printed) of one process."""
    settings = {"PYTHONPATH": str(HERE.parents[2]), "LD_PRELOAD": str(hook), "GORGON_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, HERE / "race_program.py", mode],
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr[-2000:]


def test_threads_that_load_kernels_change_the_graph_one_at_a_time(hook):
    status, found = run(hook, "locked")
    assert status == 0, found
    assert found["products"] == [[16.0]] * 12
    assert found["off_main"] > 0, "no thread touched the graph: the check sees nothing"
    assert found["at_once"] == 0


@pytest.mark.slow
def test_without_the_lock_they_collide(hook):
    """The control: the installed Jittor, whose core is compiled first (minutes)."""
    run(hook, "unlocked", cache_name="gorgon-unlocked")
    found = [run(hook, "unlocked", cache_name="gorgon-unlocked") for _ in range(RUNS)]
    assert all(status != 0 or counts["at_once"] > 0 for status, counts in found)
    assert any(status != 0 for status, _ in found)
