"""Every CUDA body compiles with nvcc for sm_80 and sm_90; nothing of it is run."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ops.cuda.cuda_calls import CALLS
from tests.ops.cuda.cuda_programs import compile_unit, record, spills, translation_units

ARCHS = [80, 90]
NVCC = shutil.which("nvcc")
pytestmark = [pytest.mark.nvcc, pytest.mark.skipif(NVCC is None, reason="no nvcc here")]


def compile_all(units, folder):
    paths = []
    for name, text in units.items():
        path = folder / f"{name}.cu"
        path.write_text(text)
        paths.append(path)
    with ThreadPoolExecutor(2) as pool:
        return list(zip(units, pool.map(lambda path: compile_unit(NVCC, path, ARCHS), paths), strict=True))


def test_every_cuda_body_compiles_for_both_architectures(tmp_path):
    programs = record(CALLS)
    assert len(programs) >= 50
    for name, done in compile_all(translation_units(programs), tmp_path):
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        for arch in ARCHS:
            assert f"sm_{arch}" in done.stderr, (name, arch)
        assert spills(done.stderr) == {}, name


def test_a_body_with_a_mistake_does_not_compile(tmp_path):
    (name, text), *_ = translation_units(record(CALLS[:1])).items()
    (_, done), *_ = compile_all({name: text.replace("in0_shape1", "in0_shape7", 1)}, tmp_path)
    assert done.returncode != 0 and "in0_shape7" in done.stderr


def test_spills_are_read_from_what_ptxas_says():
    report = """ptxas info    : Function properties for _Z3foo
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z3bar
    40 bytes stack frame, 36 bytes spill stores, 44 bytes spill loads
"""
    assert spills(report) == {"_Z3bar": 36}
