"""Configs of every supported family are read as transformers reads them, and the rest is refused by name."""

import dataclasses
import json

import numpy as np
import pytest

from backbone.config import parse_config, read_config, rope_inverse_frequencies, stop_ids
from backbone.formats.containers import write_pickle
from backbone.tokenizer import EMBEDDED
from tests.backbone.models import LLAMA_3_ROPE

LLAMA_1 = {
    "architectures": ["LLaMAForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_sequence_length": 1024,
    "rms_norm_eps": 1e-6,
    "vocab_size": 100,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA_3 = {
    **LLAMA_1,
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA_3_ROPE,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "eos_token_id": [5, 7],
}


def test_configs_of_every_age_are_read():
    embedded, llama_1, llama_3 = read_config(EMBEDDED), parse_config(LLAMA_1), parse_config(LLAMA_3)
    assert (embedded.num_layers, embedded.hidden_size, embedded.max_positions, embedded.bos_id) == (6, 256, 512, 1)
    assert (llama_1.num_kv_heads, llama_1.head_dim, llama_1.rope_theta, llama_1.max_positions) == (4, 16, 1e4, 1024)
    assert not llama_1.tie_embeddings and llama_1.rope_scaling is None and llama_1.eos_ids == (1,)
    assert (llama_3.num_kv_heads, llama_3.head_dim, llama_3.tie_embeddings) == (2, 128, True)
    assert llama_3.rope_theta == 500000.0 and llama_3.rope_scaling == LLAMA_3_ROPE


def test_both_spellings_of_rope_settings_agree():
    old = parse_config({**LLAMA_1, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}})
    middle = parse_config({**LLAMA_1, "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    new = parse_config({**LLAMA_1, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
    assert old == middle == new and new.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_end_tokens_of_the_generation_config_are_added_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3))
    assert read_config(tmp_path).eos_ids == (5, 7)
    for ends, expected in ((9, (5, 7, 9)), ([7, 8], (5, 7, 8)), (None, (5, 7))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert read_config(tmp_path).eos_ids == expected


def test_texts_end_at_the_tokens_that_transformers_takes(tmp_path):
    """Those of generation_config.json if it names any, else those of config.json."""
    assert stop_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 16]}))
    assert stop_ids(tmp_path) == (2, 16)
    for ends, expected in ((9, (9,)), ([7, 8], (7, 8)), (None, (2, 16)), ([], (2, 16))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert stop_ids(tmp_path) == expected
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is '</s>'"):
        stop_ids(tmp_path)


LINEAR = {"rope_type": "linear", "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": LINEAR, "rope_parameters": PLAIN},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {}, "rope_theta": 5e5},
        {"rope_scaling": {**LINEAR, "rope_theta": 7e4}, "rope_parameters": PLAIN, "rope_theta": 3e4},
        {"rope_scaling": {}, "rope_parameters": {**PLAIN, **LINEAR}},
        {"rope_scaling": None, "rope_parameters": None, "rope_theta": 3e4},
        {"rope_scaling": {**LLAMA_3_ROPE, "original_max_position_embeddings": 64}, "rope_parameters": PLAIN},
        {"rope_scaling": {k: v for k, v in LLAMA_3_ROPE.items() if k[:8] != "original"}},
        {"rope_scaling": LLAMA_3_ROPE, "original_max_position_embeddings": 128},
    ],
)
def test_of_two_rope_settings_the_one_that_transformers_takes_counts(settings):
    from transformers import LlamaConfig

    pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = {**LLAMA_1, "max_position_embeddings": 1024, **settings}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(raw)))).inv_freq.numpy()
    ours = rope_inverse_frequencies(parse_config(raw))
    assert np.allclose(ours, theirs, rtol=1e-6, atol=0)
    if settings.get("rope_scaling"):  # the control: the other setting gives other angles
        other = {**raw, "rope_scaling": None}
        assert not np.allclose(rope_inverse_frequencies(parse_config(other)), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_defaults_for_silent_configs_are_those_of_transformers(family):
    from transformers import LlamaConfig, MistralConfig

    sizes = {key: LLAMA_1[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    silent = {**sizes, "num_attention_heads": 16, "model_type": family}
    theirs = (LlamaConfig if family == "llama" else MistralConfig)(**silent)
    ours = parse_config({**silent, "sliding_window": None})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings


def test_mistral_window_must_cover_every_position():
    mistral = {**LLAMA_1, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
    mistral["max_position_embeddings"] = 8192
    for window in (None, 8192, 10000):
        assert parse_config({**mistral, "sliding_window": window}).model_type == "mistral"
    with pytest.raises(ValueError, match="sliding_window 4096 is below max_position_embeddings 8192"):
        parse_config({**mistral, "sliding_window": 4096})
    with pytest.raises(ValueError, match="sliding_window 4096"):
        parse_config(mistral)  # a silent Mistral config means 4096


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "qwen2"}, "qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is not supported; supported: default, linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "'yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_parameters": {}}, "'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "'full_attention' has settings of its own"),
        ({"rope_parameters": {"partial_rotary_factor": None}, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_scaling": {k: v for k, v in LLAMA_3_ROPE.items() if k != "low_freq_factor"}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 3}, "add head_dim"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architecture ..LlamaForCausalLM.. is not supported"),
        ({"model_type": ["llama"]}, "model_type ..llama.. is not supported"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": "x"}, "sliding_window is 'x', expected"),
        ({"num_hidden_layers": 2**31}, "is 2147483648, expected a positive whole number up to 10,000"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "factor is an integer of about .* digits"),
        ({"rope_scaling": {"rope_type": {}}}, "rope_type {} is not supported"),
        ({"hidden_act": "x" * 10**6}, r"hidden_act 'xxxx[x]*\.\.\. is not supported"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        parse_config({**LLAMA_1, **change})


def test_unreadable_configs_are_refused_with_their_path(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{\n"a": }')
    with pytest.raises(ValueError, match=r"config\.json line 2: not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        read_config(tmp_path)


def test_a_pickle_brings_its_config_or_has_one_beside_it(tmp_path):
    file = tmp_path / "backbone.pkl"
    write_pickle(file, {}, {"config": LLAMA_3, "generation_config": {"eos_token_id": 9}})
    assert read_config(file) == parse_config(LLAMA_3, {"eos_token_id": 9})
    write_pickle(file, {}, {})
    with pytest.raises(ValueError, match=r"backbone\.pkl has no entry 'config', and its folder has no config\.json"):
        read_config(file)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1))
    assert read_config(file) == parse_config(LLAMA_1)
    write_pickle(file, {}, {"config": ["llama"]})
    with pytest.raises(ValueError, match="config is a list"):
        read_config(file)
    write_pickle(file, {}, {"config": {**LLAMA_1, "hidden_act": "gelu"}})
    with pytest.raises(ValueError, match=r"backbone\.pkl: hidden_act 'gelu'"):
        read_config(file)
    with pytest.raises(ValueError, match="pass its folder"):
        read_config(tmp_path / "config.json")


def test_a_folder_with_two_kinds_of_weights_is_read_as_hugging_faces(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1))
    (tmp_path / "params.json").write_text("{}")  # Mistral's folders hold both
    (tmp_path / "consolidated.00.pth").write_bytes(b"not looked at")
    (tmp_path / "model.safetensors").write_bytes(b"not looked at")
    assert read_config(tmp_path) == parse_config(LLAMA_1)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"params\.json: dim is None"):
        read_config(tmp_path)


def test_rope_frequencies_of_four_coordinates_by_hand():
    config = dataclasses.replace(parse_config(LLAMA_1), head_dim=4, rope_theta=100.0)
    np.testing.assert_allclose(rope_inverse_frequencies(config), [1.0, 0.1], rtol=1e-6)
    halved = dataclasses.replace(config, rope_scaling={"rope_type": "linear", "factor": 2.0})
    np.testing.assert_allclose(rope_inverse_frequencies(halved), [0.5, 0.05], rtol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "linear", "factor": 4.0}, LLAMA_3_ROPE, {**LLAMA_3_ROPE, "factor": 32.0}],
    ids=["default", "linear", "llama3", "llama3-32"],
)
def test_rope_frequencies_equal_those_of_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = {**LLAMA_3, "rope_parameters": {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}}
    raw.pop("rope_scaling"), raw.pop("rope_theta")
    theirs = LlamaRotaryEmbedding(LlamaConfig(**raw)).inv_freq.numpy()
    ours = rope_inverse_frequencies(parse_config(raw))
    assert ours.dtype == np.float32 and ours.shape == (64,)
    # Eight units in the last place of float32: powf differs between libraries, the formula does not.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    if scaling:  # the control: without the scaling the same comparison fails
        plain = rope_inverse_frequencies(dataclasses.replace(parse_config(raw), rope_scaling=None))
        assert not np.allclose(plain, theirs, rtol=1e-6)
