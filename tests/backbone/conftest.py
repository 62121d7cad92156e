"""A small random backbone, text for it, and tensors of every type that a checkpoint may hold."""

import json
import random

import ml_dtypes
import numpy as np
import pytest
import torch

import runtime
from backbone.model import Backbone
from tests.small import bodies, draw_weights, small_config

CONFIG = small_config(head_dim=12)  # a width that is no multiple of a vector's 16 lanes
MADE = [(dtype, body) for body in ("cpu", "cuda") for dtype in ("float32", "float16")]


def draw_tensors(seed=0):
    return draw_weights(CONFIG, seed)


@pytest.fixture
def config():
    """The small backbone's."""
    return CONFIG


@pytest.fixture
def random_tensors():
    """random_tensors(): name -> float32 weights of the small backbone, the same at each call."""
    return draw_tensors


@pytest.fixture(scope="module", params=MADE, ids="-".join)
def made(request):
    dtype, body = request.param
    if runtime.device == "cuda" and body == "cpu":
        pytest.skip("on a GPU the CPU's bodies are not used")
    with bodies(body):
        return Backbone(CONFIG, draw_tensors(), dtype), body


@pytest.fixture
def small(made):
    """The small backbone in either type, for either bodies, which serve during the test."""
    backbone, body = made
    with bodies(body):
        yield backbone


@pytest.fixture
def tokens():
    """tokens(count, seed): random text for the small backbone, (1, count) int32."""

    def draw(count, seed=0):
        return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (1, count)).astype(np.int32)

    return draw


@pytest.fixture
def state():
    """A state dict with a tensor of every kind."""
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4),
        "b.weight": torch.randn(2, 3, 4).half(),
        "c.weight": torch.randn(5).bfloat16(),
        "d.ids": torch.arange(6).reshape(2, 3),
        "e.flag": torch.tensor([True, False]),
        "f.scalar": torch.tensor(2.5, dtype=torch.float64),
        "g.empty": torch.zeros(0, 4),
    }


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.fixture
def assert_same():
    """assert_same(found, state): what was read is the state dict, type for type and bit for bit."""

    def check(found, state):
        found = dict(found)
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            expected = as_numpy(tensor)
            assert found[name].dtype == expected.dtype and found[name].shape == expected.shape, name
            np.testing.assert_array_equal(found[name], expected, err_msg=name)

    return check


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory):
    """A small SentencePiece model with Llama's settings, and no tokenizer.json."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("pieces")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "them", "then", "assistant", "user"]
    order = random.Random(0)
    (directory / "text").write_text("\n".join(" ".join(order.choices(words, k=8)) for _ in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
