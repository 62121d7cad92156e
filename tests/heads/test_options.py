"""Options of heads: each explains itself, wrong ones are refused, and an untrained head is the backbone."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from heads.base import Head
from heads.decoder import LayerHead
from heads.medusa import ParallelHead
from heads.recurrent import RecurrentHead
from heads.registry import available, build, head_class, make_config
from tests.heads.parity import DEPTHS, VOCAB, close, draw_text, logits_of, run

NAMES = available()
METHODS = {
    Head: {"execute": 3, "begin": 2, "step": 3, "score_depths": 2},
    ParallelHead: {"depth_hidden": 2},
    RecurrentHead: {"start": 1, "advance": 2, "score": 1},
    LayerHead: {"pair": 2, "logits": 1},
}
LM_HEADS = ("own", "shared", "low_rank")


@pytest.mark.parametrize("base", METHODS)
def test_a_head_without_a_method_names_it(backbone, base):
    head = base(SimpleNamespace(num_depths=2), backbone)
    for method, arguments in METHODS[base].items():
        with pytest.raises(TypeError, match=f"{base.__name__} does not define {method}"):
            getattr(head, method)(*[None] * arguments)


def test_every_head_and_option_explains_itself():
    assert {"mlp", "gated_rnn"} <= set(NAMES)
    for name in NAMES:
        assert head_class(name).__doc__
        for field in dataclasses.fields(head_class(name).Config):
            assert field.metadata.get("help"), f"{name}.{field.name} has no sentence for --help"


def test_an_unknown_head_is_answered_with_the_nearest_one(backbone):
    with pytest.raises(ValueError, match=r"Unknown head 'gatedrnn'\. Did you mean 'gated_rnn'\? Available: .*mlp"):
        build("gatedrnn", {}, backbone)


@pytest.mark.parametrize("name", NAMES)
def test_options_that_no_head_has_are_refused(name, backbone):
    with pytest.raises(ValueError, match=r"'num_depth'.* Did you mean 'num_depths'"):
        build(name, {"num_depth": 2}, backbone)
    with pytest.raises(ValueError, match="at least one token, got num_depths=0"):
        build(name, {"num_depths": 0}, backbone)
    for value in ("3", 2.5, None, True):
        with pytest.raises(ValueError, match=r"--head\.num_depths takes int"):
            make_config(name, {"num_depths": value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eagle", {"trained_depths": 0}, "trained_depths must be at least 1 and finite, got 0"),
        ("eagle", {"noise": -0.1}, "noise must be at least 0 and finite, got -0.1"),
        ("eagle3", {"draft_vocab_size": 65}, "draft_vocab_size must be from 0 to 64, got 65"),
        ("gated_rnn", {"inner_size": 0}, "inner_size must be at least 1 and finite, got 0"),
        ("gated_rnn", {"cell": "lstm"}, "cell must be one of gated, gru, got 'lstm'"),
        ("hydra", {"lm_head": "mine"}, "lm_head must be one of own, shared, low_rank, got 'mine'"),
        ("hydra", {"num_layers": 0}, "num_layers must be at least 1 and finite, got 0"),
        ("hydra", {"draft_vocab_size": VOCAB + 1}, f"draft_vocab_size must be from 0 to {VOCAB}, got {VOCAB + 1}"),
        ("hydra", {"draft_vocab_size": 8, "lm_head": "shared"}, "draft_vocab_size 8 needs lm_head own, got shared"),
        ("lora", {"adapter_rank": 0}, "adapter_rank must be at least 1 and finite, got 0"),
        ("lora", {"joint_share": 0.0}, "joint_share must be above 0 and at most 1"),
        ("lora", {"kl_weight": 0.0}, "kl_weight must be above 0"),
        ("lora", {"adapter_alpha": float("nan")}, "adapter_alpha must be above 0"),
        ("lstm_eagle", {"hidden_size": 0}, "hidden_size must be at least 1 and finite, got 0"),
        ("lstm_eagle", {"feature_weight": float("inf")}, "feature_weight must be at least 0 and finite, got inf"),
        ("mlp", {"num_layers": 0}, "num_layers must be at least 1 and finite, got 0"),
        ("mlp", {"lm_head": "low_rank", "rank": 0}, "rank must be at least 1, got 0"),
        ("moe", {"num_experts": 1, "top_k": 1}, "num_experts must be at least 2 and finite, got 1"),
        ("moe", {"num_experts": 3, "top_k": 4}, r"top_k must be from 1 to num_experts \(3\), got 4"),
        ("moe", {"inner_size": 0}, "inner_size must be at least 1 and finite, got 0"),
        ("moe", {"balance_weight": float("nan")}, "balance_weight must be at least 0 and finite, got nan"),
        ("prompt_lookup", {"max_ngram": 0}, "max_ngram must be at least 1 and finite, got 0"),
        ("redrafter", {"lm_head": "low_rank"}, "lm_head must be one of own, shared, got 'low_rank'"),
        ("redrafter", {"num_layers": 0}, "num_layers must be at least 1 and finite, got 0"),
    ],
)
def test_options_that_make_no_head_are_refused(backbone, name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, options, backbone)


@pytest.mark.parametrize(
    ("name", "lm_heads"), [("mlp", LM_HEADS), ("moe", LM_HEADS), ("hydra", LM_HEADS), ("redrafter", ("own", "shared"))]
)
def test_an_untrained_depth_repeats_the_backbones_next_token(backbone, name, lm_heads):
    hidden, ids = draw_text()
    for lm_head in lm_heads:
        head = build(name, {"num_depths": DEPTHS, "lm_head": lm_head}, backbone)
        head.eval()
        for logits in logits_of(run(head, hidden, ids)):
            assert close(logits, hidden @ backbone.lm_head_weight.numpy().T)


@pytest.mark.parametrize(
    ("name", "count"), [("mlp", 2 * (3 * 2 + 1)), ("hydra", 1 + 2 * (3 * 2 + 1)), ("redrafter", 3 + 3 * 2 + 1)]
)
def test_every_layer_has_its_own_weights(backbone, name, count):
    head = build(name, {"num_depths": 2, "num_layers": 3}, backbone)
    assert len({id(parameter) for parameter in head.parameters()}) == count
    first = head.blocks[0][0] if name != "redrafter" else head.blocks[0]
    before = [parameter.numpy().copy() for parameter in head.parameters()]
    first.linear.bias.update(first.linear.bias + 1)
    changed = [not np.array_equal(b, p.numpy()) for b, p in zip(before, head.parameters(), strict=True)]
    assert changed.count(True) == 1
