"""The backbone computes what transformers computes, and says what is wrong with weights that it cannot use."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from backbone.model import EMBEDDED, Backbone, load_backbone
from ops.row_plan import RowPlan
from runtime import jt
from tests.small import draw_weights, small_config

# Float32 sums in another order: up to 9e-5 was seen, 5e-7 to 1e-5 for most; the defects below give 0.3 and more.
TOLERANCE = 2e-4
LENGTH = 48

SMALL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
    "grouped queries": (LlamaConfig, LlamaForCausalLM, {"head_dim": 20}),
    "llama3 rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "linear rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LINEAR}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
}


@pytest.fixture(scope="module", params=["tiny-vicuna", *MODELS])
def model(request, tmp_path_factory):
    """A saved model as transformers computes it: directory, torch model, token ids, its outputs."""
    if request.param == "tiny-vicuna":
        directory = EMBEDDED
    else:
        config_class, model_class, changes = MODELS[request.param]
        torch.manual_seed(0)
        made = model_class(config_class(**{**SMALL, **changes}))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        directory = tmp_path_factory.mktemp("model")
        made.save_pretrained(directory)
    loader = MistralForCausalLM if request.param == "mistral" else LlamaForCausalLM
    reference = loader.from_pretrained(directory, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(3, reference.config.vocab_size, (2, LENGTH)).astype(np.int32)
    with torch.no_grad():
        output = reference(torch.tensor(ids).long(), output_hidden_states=True)
    return SimpleNamespace(
        directory=directory,
        torch=reference,
        ids=ids,
        logits=output.logits.numpy(),
        hidden=[h.numpy() for h in output.hidden_states],
    )


def difference(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def test_logits_and_hidden_states_equal_transformers(model):
    backbone = load_backbone(model.directory, dtype="float32")
    num_layers = backbone.config.num_layers
    output = backbone.forward(model.ids, layers=tuple(range(num_layers + 1)))
    assert difference(output.logits.numpy(), model.logits) < TOLERANCE
    assert difference(output.hidden.numpy(), model.hidden[-1]) < TOLERANCE
    for index in range(num_layers):  # transformers gives the last one after the final norm
        assert difference(output.layers[index].numpy(), model.hidden[index]) < TOLERANCE, index
    with torch.no_grad():
        normed = model.torch.model.norm(torch.tensor(output.layers[num_layers].numpy()))
    assert difference(output.hidden.numpy(), normed.numpy()) < TOLERANCE
    assert difference(output.layers[0].numpy(), output.layers[1].numpy()) > 100 * TOLERANCE


def copied(model, tmp_path, edit_config=lambda config: None, edit_weights=lambda tensors: None):
    """The model's directory again, with changes to its config.json and its weights."""
    config = json.loads((model.directory / "config.json").read_text())
    tensors = load_file(model.directory / "model.safetensors")
    edit_config(config)
    edit_weights(tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def plain_rope(config):
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}


def swap_key_heads(tensors):
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = np.ascontiguousarray(np.roll(tensors[name], len(tensors[name]) // 2, 0))


def error_of(model, directory):
    logits = load_backbone(directory, dtype="float32").forward(model.ids).logits.numpy()
    return difference(logits, model.logits)


def test_the_comparison_notices_wrong_weights(model, tmp_path):
    assert error_of(model, copied(model, tmp_path, edit_weights=swap_key_heads)) > 5 * TOLERANCE


@pytest.mark.parametrize("model", ["llama3 rope", "linear rope"], indirect=True)
def test_the_comparison_notices_that_the_rope_scaling_was_dropped(model, tmp_path):
    assert error_of(model, copied(model, tmp_path, plain_rope)) > 5 * TOLERANCE


def test_a_tree_pass_equals_transformers_with_a_four_dimensional_mask(model):
    backbone, base = load_backbone(model.directory, dtype="float32"), 20
    parents = np.array([-1, 0, 0, 1, 2, 2, 4])
    plan = RowPlan(parents)
    prefix, nodes = model.ids[:1, :base], model.ids[1:, : len(parents)]
    cache = backbone.new_cache(40)
    backbone.forward(prefix, cache=cache).logits.sync()
    cache.commit(np.arange(base))
    logits = backbone.forward(nodes, cache=cache, attend=parents).logits.numpy()

    def by_transformers(seen):
        past = DynamicCache(config=model.torch.config)
        mask = torch.zeros((1, 1, len(parents), base + len(parents)))
        mask[:, :, ~torch.tensor(seen)] = torch.finfo(torch.float32).min
        with torch.no_grad():
            model.torch(torch.tensor(prefix).long(), past_key_values=past, use_cache=True)
            positions = torch.tensor(base + plan.positions)[None].long()
            return model.torch(
                torch.tensor(nodes).long(), attention_mask=mask, position_ids=positions, past_key_values=past
            ).logits.numpy()

    seen = plan.mask(base, base + len(parents))
    assert difference(logits, by_transformers(seen)) < TOLERANCE
    seen[6, base + 3] = True  # a node that is no ancestor
    assert difference(logits, by_transformers(seen)) > 5 * TOLERANCE


# On a small random backbone


def test_only_the_logits_that_were_asked_for_come(small, config, tokens):
    ids = tokens(9)
    everything = small.forward(ids)
    last = small.forward(jt.array(ids), logits="last")
    assert tuple(last.logits.shape) == (1, 1, config.vocab_size)
    np.testing.assert_array_equal(last.logits.numpy()[0, 0], everything.logits.numpy()[0, -1])
    assert small.forward(ids, logits=None).logits is None
    np.testing.assert_array_equal(small.lm_logits(everything.hidden).numpy(), everything.logits.numpy())
    embedded = small.forward(ids, layers=(0,)).layers[0].numpy()
    np.testing.assert_array_equal(small.embed(jt.array(ids)).numpy(), embedded)


@pytest.mark.parametrize(("dtype", "vocab_size"), [("float16", 64), ("float32", 50)])
def test_the_language_model_head_in_float32_is_made_when_training_asks_for_it(dtype, vocab_size):
    config = small_config(vocab_size=vocab_size)  # 50 leaves the last block of 16 outputs unfinished
    weights = draw_weights(config)
    expected = weights["lm_head.weight"].astype(dtype).astype(np.float32)
    backbone = Backbone(config, weights, dtype)
    backbone.forward(np.array([[1, 2]], np.int32)).logits.sync()
    assert "lm_head_weight" not in vars(backbone)
    np.testing.assert_array_equal(backbone.lm_head_weight.numpy(), expected)
    assert backbone.lm_head_weight is backbone.lm_head_weight


def test_the_fingerprint_names_the_weights_and_not_the_dtype(config, random_tensors):
    first = Backbone(config, random_tensors(), "float32").fingerprint
    assert Backbone(config, random_tensors(), "float16").fingerprint == first
    tensors = random_tensors()
    tensors["model.norm.weight"][3] += 1
    assert Backbone(config, tensors, "float32").fingerprint != first


# Mistakes


def test_an_unknown_layer_kind_of_logits_and_dtype_are_refused(small, tokens, config, random_tensors):
    with pytest.raises(ValueError, match=r"layers 0 to 2, got \[3\]"):
        small.forward(tokens(3), layers=(1, 3))
    with pytest.raises(ValueError, match="logits must be 'all', 'last' or None, got 'some'"):
        small.forward(tokens(3), logits="some")
    with pytest.raises(ValueError, match="dtype must be one of float16, float32, got 'bfloat16'"):
        Backbone(config, random_tensors(), "bfloat16")
    with pytest.raises(ValueError, match="storage must be one of float32, int8, nf4, got 'fp4'"):
        Backbone(config, random_tensors(), "float32", storage="fp4")
    with pytest.raises(ValueError, match="load_in_8bit and load_in_4bit are both set; choose one"):
        load_backbone(load_in_8bit=True, load_in_4bit=True)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (np.nan, "float32")])
def test_a_weight_that_the_dtype_cannot_hold_is_named(value, dtype, config, random_tensors):
    tensors = random_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight is not finite in {dtype}"):
        Backbone(config, tensors, dtype)
