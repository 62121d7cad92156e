"""The embedded backbone, prompts, its own text of each, and fake heads that know it."""

import numpy as np
import pytest

from backbone.model import load_backbone
from backbone.tokenizer import load_tokenizer
from decoding.generate import generate_autoregressive
from tests.fake_heads import NUM_KNOWN, RANKS, TREES, MixingHead, ParallelHead, SequentialHead


@pytest.fixture(scope="session")
def backbones():
    """The embedded backbone in both dtypes."""
    return {dtype: load_backbone(dtype=dtype) for dtype in ("float32", "float16")}


@pytest.fixture(scope="session")
def backbone(backbones):
    return backbones["float32"]


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """A dozen short prompts: one token, random ids, and chat."""
    random = np.random.default_rng(3)
    ids = [random.integers(3, 4096, length).tolist() for length in (1, 2, 3, 5, 9, 17, 33)]
    questions = ("Hello!", "I need a table for two.", "Tell me a story about a fox.", "What is 12 plus 30?", "Why?")
    return ids + [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]


@pytest.fixture(scope="session")
def continuations(backbones, prompts):
    """The baseline's text of every prompt, longer than the tests ask for, by dtype."""
    return {
        dtype: [generate_autoregressive(b, p, max_new_tokens=NUM_KNOWN).token_ids for p in prompts]
        for dtype, b in backbones.items()
    }


@pytest.fixture(scope="session")
def make_head():
    """make_head(name in FAKES, backbone, prompt, continuation) -> a fresh head."""

    def make(name, backbone, prompt, continuation):
        if name == "mixing":
            return MixingHead(backbone)
        kind, ranks = name.split("-")
        head = SequentialHead if kind == "sequential" else ParallelHead
        return head(backbone, [*prompt, *continuation], RANKS[ranks])

    return make


@pytest.fixture(params=TREES)
def tree(request):
    """Each tree in turn."""
    return TREES[request.param]


@pytest.fixture(scope="session")
def mixing_head():
    """The class MixingHead."""
    return MixingHead
