"""Runs what checks a kernel against its reference once for every body: the CPU's, and CUDA's, on a GPU or emulated."""

import pytest

import runtime
from tests.small import bodies


@pytest.fixture(params=["cpu", "cuda"])
def body(request):
    """Which bodies the operations of this test run; make weights within the test."""
    if runtime.device == "cuda" and request.param == "cpu":
        pytest.skip("on a GPU the CPU's bodies are not used")
    with bodies(request.param):
        yield request.param


@pytest.fixture(params=["ascending", "descending"])
def order(request, monkeypatch):
    """In which order emulated threads run; a barrier is missing where the result depends on it."""
    monkeypatch.setenv("GORGON_EMULATOR_ORDER", request.param)
    return request.param
