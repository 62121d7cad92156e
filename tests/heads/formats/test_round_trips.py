"""A head that passes through two formats comes back bit for bit, whatever its sizes and its dtype."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.files.lazy import in_memory
from backbone.formats.cast import FLOATS
from heads.formats.contents import Casting, HeadWeights, Target
from heads.formats.conversion import BY_NAME
from heads.formats.files import open_head
from heads.formats.own import default_options
from tests.small import small_config

# What a conversion writes for each name here: the format, and the file or folder.
PLACES = {
    "npz": ("npz", "head.npz"),
    "jtr": ("jittor-pkl", "head.jtr"),
    "medusa-pt": ("medusa", "a"),
    "medusa-safetensors": ("medusa", "b/medusa_lm_head.safetensors"),
    "vllm": ("vllm-medusa", "c"),
    "tensorrt": ("tensorrt-llm-medusa", "d"),
}


class Borrowed(Target):
    """A backbone of any width: only its sizes, embedding and language-model head."""

    def __init__(self, width, vocabulary, random):
        super().__init__()
        self.config = small_config(hidden_size=width, head_dim=width // 4, vocab_size=vocabulary)
        ends = random.standard_normal((2, vocabulary, width)).astype(np.float16)
        self._ends = {"model.embed_tokens.weight": in_memory(ends[0]), "lm_head.weight": in_memory(ends[1])}


@st.composite
def heads(draw, places):
    """(backbone, weights, dtype): an mlp head that these formats can hold, some numbers at the dtype's limits."""
    tied = any(place.startswith("medusa") for place in places)  # Medusa's own code ties the blocks of a depth
    depths, layers = draw(st.integers(1, 4)), 1 if tied else draw(st.integers(1, 3))
    width, vocabulary = 8 * draw(st.integers(1, 3)), draw(st.integers(1, 40))
    dtypes = [name for name in FLOATS if name != "bfloat16" or not {"npz", "jtr"} & set(places)]
    dtype = FLOATS[draw(st.sampled_from(dtypes))]
    lm_head = draw(st.sampled_from(["own"] if "tensorrt" in places else ["own", "shared"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    target = Borrowed(width, vocabulary, random)
    options = default_options("mlp", num_depths=depths, num_layers=layers, lm_head=lm_head)
    shapes = {f"blocks.{k}.{j}.linear.weight": (width, width) for k in range(depths) for j in range(layers)}
    shapes |= {f"blocks.{k}.{j}.linear.bias": (width,) for k in range(depths) for j in range(layers)}
    if lm_head == "own":
        shapes |= {f"lm_heads.{k}.weight": (vocabulary, width) for k in range(depths)}
    tensors = {}
    for name, shape in shapes.items():
        numbers = random.standard_normal(shape) * 10.0 ** random.integers(-9, 4)
        numbers.flat[0] = draw(st.sampled_from([0.0, -0.0, 1e-8, 65504.0]))
        tensors[name] = in_memory(numbers.astype(dtype).astype(np.float32))
    config = {"head": "mlp", "head_config": options, "backbone": {"hidden_size": width, "vocab_size": vocabulary}}
    return target, HeadWeights("mlp", options, tensors, config), dtype


def passed(weights, place, folder, dtype, target):
    """The head, written to a file and read again."""
    name, where = PLACES[place]
    BY_NAME[name].write(weights, folder / where, Casting(dtype), target)
    found = open_head(folder / where)
    assert BY_NAME[name].recognize(found)
    assert sum(format.recognize(found) for format in BY_NAME.values()) == 1
    return BY_NAME[name].read(found, target)


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise([*PLACES, "npz"])))
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_head_passed_through_two_formats_is_the_same(first, second, data):
    target, weights, dtype = data.draw(heads((first, second)))
    with tempfile.TemporaryDirectory() as folder:
        once = passed(weights, first, Path(folder), dtype, target)
        # A head from another system has no config, which single files need.
        once.config.update(weights.config)
        twice = passed(once, second, Path(folder), dtype, target)
        assert twice.options == weights.options and twice.tensors.keys() == weights.tensors.keys()
        for name, tensor in weights.tensors.items():
            assert twice.tensors[name].dtype == np.float32
            assert twice.tensors[name].read().tobytes() == tensor.read().tobytes(), name


def test_a_missing_tensor_is_named():
    random = np.random.default_rng(0)
    target = Borrowed(8, 5, random)
    options = default_options("mlp", num_depths=2)
    shapes = {f"blocks.{k}.0.linear.weight": (8, 8) for k in range(2)}
    tensors = {name: in_memory(np.ones(shape, np.float32)) for name, shape in shapes.items()}
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.raises(ValueError, match=r"missing: blocks\.0\.0\.linear\.bias"),
    ):
        passed(HeadWeights("mlp", options, tensors, {}), "vllm", Path(folder), FLOATS["float32"], target)
