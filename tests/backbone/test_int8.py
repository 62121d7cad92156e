"""A backbone in 8 bits is the backbone of its rounded weights, and as row-invariant as any."""

import numpy as np
import pytest

from backbone.model import Backbone, load_backbone
from backbone.tokenizer import load_tokenizer
from ops.decoder_layer import RowPlan
from ops.linear import quantize_rows
from tests.small import draw_weights, small_config
from trainer.data import TokenizedData
from trainer.features import cache_key

IDS = np.random.default_rng(0).integers(3, 64, (1, 40)).astype(np.int32)
LAYER_MATRICES = ("_proj.weight",)


@pytest.fixture(scope="module")
def eight():
    return Backbone(small_config(), draw_weights(small_config()), "float32", int8=True)


def logits(backbone, ids=IDS, **how):
    return backbone.forward(ids, **how).logits.numpy()[0]


def test_it_computes_with_the_rounded_weights(eight):
    weights = draw_weights(small_config())
    for name, weight in weights.items():
        if name.endswith(LAYER_MATRICES):
            rounded, scale = quantize_rows(weight)
            weights[name] = rounded * scale[:, None]
    rounded = Backbone(small_config(), weights, "float32")
    exact = Backbone(small_config(), draw_weights(small_config()), "float32")
    assert np.abs(logits(eight) - logits(rounded)).max() < 1e-4
    assert np.abs(logits(eight) - logits(exact)).max() > 1e-2  # the comparison above would notice


def test_rows_are_bitwise_the_same_in_a_tree_in_a_cache_and_alone(eight):
    whole = logits(eight)
    cache = eight.new_cache(64)
    for first, rows in ((0, 17), (17, 1), (18, 22)):
        part = logits(eight, IDS[:, first : first + rows], cache=cache)
        cache.commit(np.arange(rows))
        np.testing.assert_array_equal(part, whole[first : first + rows])
    tree = RowPlan(np.array([-1, 0, 0, 1, 2]))
    cache.rewind(20)
    nodes = IDS[:, [20, 21, 30, 22, 31]]
    np.testing.assert_array_equal(logits(eight, nodes, cache=cache, attend=tree)[[0, 1, 3]], whole[[20, 21, 22]])


def test_it_keeps_the_name_of_its_weights_and_has_features_of_its_own(eight):
    plain = Backbone(small_config(), draw_weights(small_config()), "float32")
    assert eight.fingerprint == plain.fingerprint
    assert (eight.storage, plain.storage) == ("int8", "float32")
    data = TokenizedData(IDS[0], np.ones(40, bool), np.array([0, 40]))
    assert cache_key(eight, "t", data) != cache_key(plain, "t", data)


def test_what_is_added_to_it_is_not_rounded_again(eight):
    matrices = eight.blocks[1].matrices()
    change = np.full(matrices["o"].shape, 1e-4, np.float32)
    adapted = eight.adapted({(1, "o"): change}, "test")
    assert adapted.storage == "float32" and eight.storage == "int8"
    for layer in range(2):
        for name, before in eight.blocks[layer].matrices().items():
            expected = before + change if (layer, name) == (1, "o") else before
            np.testing.assert_array_equal(adapted.blocks[layer].matrices()[name], expected)


def test_it_takes_half_the_bytes_and_hardly_changes_real_text():
    sixteen, eight = load_backbone(), load_backbone(load_in_8bit=True)

    def num_bytes(backbone):
        return sum(np.asarray(each.data).nbytes for block in backbone.blocks for each in block.inputs)

    assert num_bytes(eight) < 0.53 * num_bytes(sixteen)
    chat = [{"role": "user", "content": "Please tell me a story about a dog."}]
    ids = np.array([load_tokenizer().encode_chat(chat)], np.int32)
    exact, rounded = logits(sixteen, ids), logits(eight, ids)
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()
    assert (rounded.argmax(1) == exact.argmax(1)).mean() > 0.9
