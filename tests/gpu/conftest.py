"""Where the checks of this folder run: on a GPU at full size, else rehearsed on a small backbone with CUDA's bodies in
emulation, so that none of them meets its first GPU untried.

    GORGON_DEVICE=cuda python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

import runtime
from backbone.model import load_backbone
from backbone.tokenizer import load_tokenizer
from bench.measure.options import DEFAULT_PROMPTS
from bench.record.prompts import load_prompts
from tests.small import bodies, small_backbone


@dataclass(frozen=True)
class Place:
    """name: emulated or gpu. location: what Jittor calls the place of a Var that kernels use. load: dtype ->
    backbone. prompts: token ids each. new_tokens: decoded after each. steps: passes that the memory is watched for."""

    name: str
    location: str
    load: Callable
    prompts: list[list[int]]
    new_tokens: int
    steps: int


def full_size() -> Place:
    """tiny-vicuna and its prompts."""
    tokenizer = load_tokenizer()
    texts = [each.turns[0] for each in load_prompts(DEFAULT_PROMPTS, None, 0).prompts]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    return Place("gpu", "device", lambda dtype: load_backbone(dtype=dtype), prompts, 64, 1000)


def small_size() -> Place:
    """The small backbone of the other tests and prompts that count on, which it has not learned to do."""
    prompts = [[(first + i) % 61 + 3 for i in range(length)] for first, length in ((0, 9), (30, 4))]
    return Place("emulated", "cpu", small_backbone, prompts, 12, 60)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request):
    """A GPU, or its stand-in."""
    on_gpu = runtime.device == "cuda"
    if request.param == "gpu" and not on_gpu:
        pytest.skip(f"this process runs on the CPU: {runtime.device_reason}")
    if request.param != "gpu" and on_gpu:
        pytest.skip("rehearsed where there is no GPU")
    with bodies("cuda"):
        yield full_size() if on_gpu else small_size()


@pytest.fixture
def tokens(place):
    """tokens(backbone, count): (1, count) int32, the same at each call."""

    def draw(backbone, count):
        return np.random.default_rng(7).integers(3, backbone.config.vocab_size, (1, count)).astype(np.int32)

    return draw
