"""Jittor's CUDA build and the CUDA source that it generates compile with the nvcc of this machine. Nothing is run.

Needs nvcc, the libraries of requirements-cuda.txt or of a whole toolkit, and no GPU. The first time takes minutes; what
was compiled stays in the home's cache.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.compile_check import compile_core, usable_toolkit
from runtime.start.toolkit_folder import assemble, plan
from tests.runtime.stand_ins import ROOT, SETTLED, build_libraries, preloading

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.nvcc


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    for name in SETTLED:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def toolkit(unsettled):
    try:
        return usable_toolkit()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def core(toolkit):
    """The CUDA build of Jittor's core, compiled for 8.0 and 9.0 the first time."""
    return compile_core()


def test_jittors_core_and_its_libraries_compile_with_cuda_and_live_without_a_gpu(core):
    assert core["core_has_cuda"] and core["cuda_archs"] == [80, 90]
    assert core["libraries"] == ["cublas", "curand", "cub"]
    assert core["product"] == [[24.0] * 5] * 3  # 4 * (2 * 3), on the CPU


def test_the_real_compiler_gets_cpp_17_and_the_architectures(toolkit, tmp_path):
    script = assemble(plan(toolkit, [80, 90]), tmp_path) / "bin" / "nvcc"
    source = tmp_path / "x.cu"
    source.write_text("#include <cub/cub.cuh>\n#include <cublas_v2.h>\n#include <curand.h>\n__global__ void f() {}\n")
    done = subprocess.run(
        [script, "-std=c++14", "--dryrun", "-c", source], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "-arch=sm_80" in done.stderr and "-arch=sm_90" in done.stderr
    assert "-std=c++17" in done.stderr and "-std=c++14" not in done.stderr


def test_the_cuda_source_of_operations_compiles_and_is_not_run(core, toolkit, tmp_path):
    if toolkit.version[0] < 13:
        pytest.skip(f"the stand-in libraries are written for CUDA 13's headers, nvcc is {toolkit.version[0]}")
    environment = preloading(build_libraries(tmp_path, toolkit))
    words = [sys.executable, str(HERE / "cuda_ops_program.py")]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert "error" in answers.pop("control") and 'identifier "no_such_name" is undefined' in done.stderr
    assert {name: answer for name, answer in answers.items() if "error" in answer} == {}
    for name, answer in answers.items():  # the GPU's source was taken, not the CPU's
        asked = {"matmul": "cublas", "batched matmul": "cublas", "matmul float16": "cublas", "random normal": "curand"}
        assert answer[asked.get(name, "cudart")] >= 1, (name, answer)
