"""The language-model head in float32 exists for training alone, and is the packed one's matrix."""


import numpy as np
import pytest

from backbone.model import Backbone
from tests.small import draw_weights, small_config


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("vocab_size", [64, 50])  # 50 leaves the last block of 16 outputs unfinished
def test_it_is_made_when_it_is_asked_for_and_holds_the_files_numbers(dtype, vocab_size):
    config = small_config(vocab_size=vocab_size)
    weights = draw_weights(config)
    expected = weights["lm_head.weight"].astype(dtype).astype(np.float32)
    backbone = Backbone(config, weights, dtype)
    backbone.forward(np.array([[1, 2]], np.int32)).logits.sync()
    assert "lm_head_weight" not in vars(backbone)
    np.testing.assert_array_equal(backbone.lm_head_weight.numpy(), expected)
    assert backbone.lm_head_weight is backbone.lm_head_weight  # made once
