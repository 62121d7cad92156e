"""Runs what checks a kernel against its reference once for every body: the CPU's, and CUDA's, on a GPU or emulated."""

import contextlib

import pytest

import runtime
from ops.kernel import emulated_cuda


@pytest.fixture(params=["cpu", "cuda"])
def body(request):
    """Which bodies the operations of this test run; make weights within the test."""
    on_gpu = runtime.device == "cuda"
    if on_gpu and request.param == "cpu":
        pytest.skip("on a GPU the CPU's bodies are not used")
    with contextlib.nullcontext() if on_gpu or request.param == "cpu" else emulated_cuda():
        yield request.param


@pytest.fixture(params=["ascending", "descending"])
def order(request, monkeypatch):
    """In which order emulated threads run; a result that depends on it lacks a barrier."""
    monkeypatch.setenv("GORGON_EMULATOR_ORDER", request.param)
    return request.param
