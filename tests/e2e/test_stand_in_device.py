"""Training and measuring on a CUDA device that does nothing: every CUDA source on the way compiles and starts.

Jittor writes the source of each operation around our bodies and its own; nvcc compiles it as on a machine with a GPU.
Takes minutes the first time: pytest -m "nvcc and slow" tests/e2e.
"""

import json
import subprocess
import sys

import pytest

from runtime.compile_check import usable_toolkit
from tests.runtime.stand_ins import ROOT, SETTLED, build_driver, build_libraries, preloading

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in SETTLED:
        monkeypatch.delenv(name, raising=False)
    try:
        toolkit = usable_toolkit()
    except ValueError as error:
        pytest.skip(str(error))
    if toolkit.version[0] < 13:
        pytest.skip("the stand-in libraries are written for CUDA 13's headers")
    libraries = [build_driver(tmp_path, toolkit), *build_libraries(tmp_path, toolkit)]
    return preloading(libraries) | {"GORGON_DEVICE": "cuda"}


def run(environment, *words, meaningless=False):
    """stdout. meaningless: numbers that no kernel has written may end the command; a compiler's failure may not."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert "Run cmd failed" not in done.stderr, (words, done.stderr[-3000:])
    assert done.returncode == 0 or meaningless, (words, done.stderr[-3000:])
    return done.stdout


def train(environment, head, out):
    words = ("--head", head, "--max-steps", 2, "--features", "online", "--held-out", 4, "--out", out)
    summary = json.loads(run(environment, "train.py", *words).splitlines()[-1])
    assert summary["status"] == "done" and summary["steps"] == 2
    assert json.loads((out / "checkpoint" / "provenance.json").read_text())["device"] == "cuda"


def test_a_head_is_trained_and_measured_on_the_device(environment, tmp_path):
    train(environment, "mlp", tmp_path / "run")
    words = ("--num-prompts", 1, "--max-new-tokens", 6, "--nodes", 8, "--out", tmp_path / "result.json")
    run(environment, "bench/run.py", "--greedy", "--checkpoint", tmp_path / "run", *words, meaningless=True)


def test_a_head_with_attention_of_its_own_is_trained_on_the_device(environment, tmp_path):
    train(environment, "eagle", tmp_path / "run")


def test_passes_of_the_7b_shape_start_on_the_device_and_take_no_more_memory_than_they_need(environment, tmp_path):
    words = ("--shape", "7b", "--no-transformers", "--no-loop", "--repeats", 3, "--out", tmp_path / "engine.json")
    run(environment, "tests/e2e/stand_in_engine.py", *words)
    (shape,) = json.loads((tmp_path / "engine.json").read_text())["shapes"]
    assert len(shape["passes"]) == 21 and shape["memory"]["where"] == "device"
    assert shape["memory"]["ratio"] < 1.2  # over weights and cache, which the host does not hold as well:
    assert shape["memory"]["host_growth_bytes"] < shape["memory"]["weight_bytes"] / 100
