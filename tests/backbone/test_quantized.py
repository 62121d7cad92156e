"""A backbone in 8 or 4 bits is the backbone of its rounded weights, and as row-invariant as any."""

import numpy as np
import pytest

import runtime
from backbone.differentiable import DifferentiableBackbone
from backbone.model import Backbone, load_backbone
from backbone.tokenizer import load_tokenizer
from ops.kernel import emulated_cuda
from ops.packing.quantize import QUANTIZERS
from ops.row_plan import RowPlan
from runtime import jt
from tests.ops.packing.values import dequantize
from tests.small import draw_weights, small_config
from trainer.data.tokens import TokenizedData
from trainer.features.cache import cache_key

CONFIG = small_config(hidden_size=72, intermediate_size=136, head_dim=6)  # rows of more than one NF4 group
IDS = np.random.default_rng(0).integers(3, 64, (1, 40)).astype(np.int32)
LAYER_MATRICES = ("_proj.weight",)


@pytest.fixture(scope="module", params=list(QUANTIZERS))
def quantized(request):
    return Backbone(CONFIG, draw_weights(CONFIG), "float32", storage=request.param)


def logits(backbone, ids=IDS, **how):
    return backbone.forward(ids, **how).logits.numpy()[0]


def of_rounded_weights(storage):
    """A float32 backbone of what the storage keeps."""
    weights = draw_weights(CONFIG)
    for name, weight in weights.items():
        if name.endswith(LAYER_MATRICES):
            weights[name] = dequantize(*QUANTIZERS[storage](weight))
    return Backbone(CONFIG, weights, "float32")


def test_it_computes_with_the_rounded_weights(quantized):
    exact = Backbone(CONFIG, draw_weights(CONFIG), "float32")
    assert np.abs(logits(quantized) - logits(of_rounded_weights(quantized.storage))).max() < 1e-4
    assert np.abs(logits(quantized) - logits(exact)).max() > 1e-2  # the comparison above would notice


def test_rows_are_bitwise_the_same_in_a_tree_in_a_cache_and_alone(quantized):
    whole = logits(quantized)
    cache = quantized.new_cache(64)
    for first, rows in ((0, 17), (17, 1), (18, 22)):
        part = logits(quantized, IDS[:, first : first + rows], cache=cache)
        cache.commit(np.arange(rows))
        np.testing.assert_array_equal(part, whole[first : first + rows])
    tree = RowPlan(np.array([-1, 0, 0, 1, 2]))
    cache.rewind(20)
    nodes = IDS[:, [20, 21, 30, 22, 31]]
    np.testing.assert_array_equal(logits(quantized, nodes, cache=cache, attend=tree)[[0, 1, 3]], whole[[20, 21, 22]])


def test_it_keeps_the_name_of_its_weights_and_has_features_of_its_own(quantized):
    plain = Backbone(CONFIG, draw_weights(CONFIG), "float32")
    assert quantized.fingerprint == plain.fingerprint
    assert quantized.quantized and not plain.quantized and plain.storage == "float32"
    data = TokenizedData(IDS[0], np.ones(40, bool), np.array([0, 40]))
    others = [plain, *(Backbone(CONFIG, draw_weights(CONFIG), "float32", storage=name) for name in QUANTIZERS)]
    assert len({cache_key(each, "t", data) for each in others}) == 3
    assert cache_key(quantized, "t", data) in {cache_key(each, "t", data) for each in others[1:]}


def test_what_is_added_to_it_is_not_rounded_again(quantized):
    matrices = quantized.blocks[1].matrices()
    change = np.full(matrices["o"].shape, 1e-4, np.float32)
    adapted = quantized.adapted({(1, "o"): change}, "test")
    assert adapted.storage == "float32" and quantized.storage in QUANTIZERS
    for layer in range(2):
        for name, before in quantized.blocks[layer].matrices().items():
            expected = before + change if (layer, name) == (1, "o") else before
            np.testing.assert_array_equal(adapted.blocks[layer].matrices()[name], expected)


def hidden_and_gradient(backbone):
    """Hidden states of two sequences, and the gradient to one number for each of four products."""
    shift = {(layer, name): jt.array(np.zeros(1, np.float32)) for layer in range(2) for name in ("q", "down")}

    def linear(layer, name, x, weight):
        y = weight(x)
        return y + shift[layer, name] * x.mean() if (layer, name) in shift else y

    hidden = DifferentiableBackbone(backbone).hidden(IDS[0], [25, 15], linear)
    found = jt.grad((hidden * hidden.sin()).sum(), list(shift.values()))
    return hidden.numpy(), np.array([each.item() for each in found])


def test_training_through_it_equals_training_through_its_rounded_weights(quantized):
    hidden, gradient = hidden_and_gradient(quantized)
    expected, expected_gradient = hidden_and_gradient(of_rounded_weights(quantized.storage))
    np.testing.assert_allclose(hidden, expected, atol=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3)
    exact = hidden_and_gradient(Backbone(CONFIG, draw_weights(CONFIG), "float32"))
    assert np.abs(exact[0] - hidden).max() > 1e-2 and (np.abs(exact[1] / gradient - 1) > 1e-3).any()
    passed = quantized.forward(IDS, attend=RowPlan.sequences([25, 15])).hidden.numpy()[0]
    np.testing.assert_allclose(hidden, passed, atol=1e-4)


@pytest.mark.skipif(runtime.device == "cuda", reason="on a GPU the fixture's is the one with CUDA's bodies")
def test_with_cuda_bodies_it_is_the_backbone_of_its_rounded_weights(quantized):
    expected = logits(of_rounded_weights(quantized.storage))
    exact = logits(Backbone(CONFIG, draw_weights(CONFIG), "float32"))
    with emulated_cuda():
        found = logits(Backbone(CONFIG, draw_weights(CONFIG), "float32", storage=quantized.storage))
    # Rows are rounded to float16 before eight products, NF4's values too; logits have a standard deviation of 2.
    assert np.abs(found - expected).max() < 1e-1
    assert np.abs(found - exact).max() > 3e-1


def test_8_bits_take_half_the_bytes_4_bits_a_quarter_and_real_text_hardly_changes():
    sixteen, eight, four = load_backbone(), load_backbone(load_in_8bit=True), load_backbone(load_in_4bit=True)
    assert (sixteen.storage, eight.storage, four.storage) == ("float16", "int8", "nf4")

    def num_bytes(backbone):
        return sum(np.asarray(each.data).nbytes for block in backbone.blocks for each in block.inputs)

    assert num_bytes(eight) < 0.53 * num_bytes(sixteen)
    assert num_bytes(four) < 0.28 * num_bytes(sixteen)
    chat = [{"role": "user", "content": "Please tell me a story about a dog."}]
    ids = np.array([load_tokenizer().encode_chat(chat)], np.int32)
    exact = logits(sixteen, ids)
    for rounded, error, agreeing in ((logits(eight, ids), 0.1, 0.9), (logits(four, ids), 0.5, 0.7)):
        assert 0 < np.abs(rounded - exact).max() < error * np.abs(exact).max()
        assert (rounded.argmax(1) == exact.argmax(1)).mean() > agreeing
