"""Meta's layout against Meta's equations: its own rotation of neighbouring pairs, written out here in torch."""

import json
import shutil

import numpy as np
import pytest
import torch

from backbone.config import read_config, read_raw_config
from backbone.files.lazy import in_memory
from backbone.files.meta import feed_forward_size, to_half_split, to_interleaved
from backbone.formats import ConvertOptions, convert, open_source
from backbone.formats.targets import params_of
from backbone.model import load_backbone
from tests.backbone.models import LLAMA_3_ROPE, bits, raw_config, write_model
from tests.small import SMALL, small_config

# Meta's file leaves things open, and reading it says so; one test looks at that.
pytestmark = pytest.mark.filterwarnings("ignore:.*(params.json|use_scaled_rope)")
TOKENS = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (1, 40)).astype(np.int32)
# float32 on both sides, sums in another order: a few units in the last place of logits of magnitude 1 to 10.
CLOSE = 2e-4
PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 64,
    "multiple_of": 8,
    "ffn_dim_multiplier": 0.7,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
WIDE = 64  # int(2 * 4 * 32 / 3) = 85; int(0.7 * 85) = 59; the next multiple of 8


def meta_state(params, seed=0, dtype=torch.float32):
    """Random weights under Meta's names, on a scale that keeps hidden states near one."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        return (torch.randn(rows, columns, generator=generator) * 2 / columns**0.5).to(dtype)

    dim, head = params["dim"], params["dim"] // params["n_heads"]
    shapes = {
        "attention.wq": (dim, dim),
        "attention.wk": (params["n_kv_heads"] * head, dim),
        "attention.wv": (params["n_kv_heads"] * head, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (WIDE, dim),
        "feed_forward.w2": (dim, WIDE),
        "feed_forward.w3": (WIDE, dim),
    }
    state = {"tok_embeddings.weight": matrix(64, dim), "norm.weight": torch.ones(dim, dtype=dtype) * 1.5}
    for layer in range(params["n_layers"]):
        state |= {f"layers.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        state |= {f"layers.{layer}.{name}.weight": torch.rand(dim, generator=generator).to(dtype) + 0.5
                  for name in ("attention_norm", "ffn_norm")}  # fmt: skip
    return state | {"output.weight": matrix(64, dim), "rope.freqs": torch.ones(head // 2)}


def scaled(frequencies):
    """Llama 3.1's frequencies, one after the other as its paper describes them."""
    low, high, old = 1.0, 4.0, 8192.0
    result = []
    for frequency in frequencies.tolist():
        wavelength = 2 * np.pi / frequency
        smooth = min(1.0, max(0.0, (old / wavelength - low) / (high - low)))
        result.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    return torch.tensor(result)


def rotate(x, frequencies):
    """Neighbouring coordinates as complex numbers, turned by position times frequency. x: (rows, heads, head_dim)."""
    angles = torch.outer(torch.arange(x.shape[0]).float(), frequencies)
    turned = (
        torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.view_as_real(turned).reshape(x.shape)


def meta_logits(state, params, tokens):
    """The forward pass of Meta's Llama in float32. tokens: (rows,) -> (rows, vocab)."""
    heads, kv_heads = params["n_heads"], params["n_kv_heads"]
    head = params["dim"] // heads
    frequencies = params["rope_theta"] ** (-torch.arange(0, head, 2).float() / head)
    if params.get("use_scaled_rope"):
        frequencies = scaled(frequencies)

    def norm(x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + params["norm_eps"]) * state[name]

    x = state["tok_embeddings.weight"][tokens]
    for layer in range(params["n_layers"]):

        def weight(part, layer=layer):
            return state[f"layers.{layer}.{part}.weight"].T

        y = norm(x, f"layers.{layer}.attention_norm.weight")
        q = rotate((y @ weight("attention.wq")).reshape(-1, heads, head), frequencies)
        k = rotate((y @ weight("attention.wk")).reshape(-1, kv_heads, head), frequencies)
        v = (y @ weight("attention.wv")).reshape(-1, kv_heads, head)
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5
        scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(tokens), -1)
        x = x + mixed @ weight("attention.wo")
        y = norm(x, f"layers.{layer}.ffn_norm.weight")
        gated = torch.nn.functional.silu(y @ weight("feed_forward.w1")) * (y @ weight("feed_forward.w3"))
        x = x + gated @ weight("feed_forward.w2")
    return (norm(x, "norm.weight") @ state["output.weight"].T).numpy()


def split(state, count, embedding_axis):
    """Model-parallel shards as Meta's training leaves them."""
    axes = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0) | {"wo": 1, "w2": 1}
    axes["tok_embeddings"] = embedding_axis
    shards = [{} for _ in range(count)]
    for name, tensor in state.items():
        axis = axes.get(name.split(".")[-2])
        parts = [tensor] * count if axis is None else [part.clone() for part in tensor.chunk(count, axis)]
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    return shards


def write_meta(folder, params, shards):
    """A Meta directory as torch writes it."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    return folder


def our_logits(path):
    return load_backbone(path, "float32").forward(TOKENS).logits.numpy()[0]


def transformers_logits(path):
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return (
            LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)(torch.from_numpy(TOKENS).long())
            .logits[0]
            .numpy()
        )


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["safetensors", "hf-bin"])
def test_a_llama_3_of_metas_gives_the_same_logits_in_every_model(tmp_path, to):
    state = meta_state(PARAMS)
    source = write_meta(tmp_path / "meta", PARAMS, split(state, 2, 0))
    expected = meta_logits(state, PARAMS, TOKENS[0])
    notes = []
    convert(source, to, tmp_path / "hf", ConvertOptions(shard_size=40_000), notes.append)
    assert len(list((tmp_path / "hf").glob("*-of-*"))) > 2
    np.testing.assert_allclose(transformers_logits(tmp_path / "hf"), expected, atol=CLOSE)
    np.testing.assert_allclose(our_logits(tmp_path / "hf"), expected, atol=CLOSE)
    np.testing.assert_array_equal(our_logits(source), our_logits(tmp_path / "hf"))
    assert any("use_scaled_rope comes without its factor: 8 is assumed" in line for line in notes)
    assert any("131072 is assumed" in line for line in notes)
    assert any("split over the vocabulary" in line for line in notes)
    # The control: the comparison sees the scaling of the rotary frequencies.
    plain = meta_logits(state, {**PARAMS, "use_scaled_rope": False}, TOKENS[0])
    assert np.abs(plain - expected).max() > 10 * CLOSE


@pytest.mark.parametrize(("embedding_axis", "dtype"), [(0, torch.float32), (1, torch.bfloat16)])
def test_shards_are_assembled_bit_for_bit_whichever_way_the_embedding_is_split(tmp_path, embedding_axis, dtype):
    state = meta_state(PARAMS, dtype=dtype)
    whole = open_source(write_meta(tmp_path / "whole", PARAMS, [state]))
    sharded = open_source(write_meta(tmp_path / "sharded", PARAMS, split(state, 2, embedding_axis)))
    assert bits(whole.tensors) == bits(sharded.tensors) and whole.config == sharded.config
    assert any(("over dim" if embedding_axis else "over the vocabulary") in line for line in sharded.notes)


def test_rows_of_one_head_by_hand():
    # Pairs (0 1) and (2 3) become coordinates (0 2) and (1 3): rows 0 1 2 3 are read in the order 0 2 1 3.
    rows = in_memory(np.arange(8, dtype=np.float32).reshape(8, 1))
    assert to_half_split(rows, 4).read().ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    rows = in_memory(np.arange(6, dtype=np.float32).reshape(6, 1))
    assert to_half_split(rows, 6).read().ravel().tolist() == [0, 2, 4, 1, 3, 5]
    assert to_interleaved(to_half_split(rows, 6), 6).read().ravel().tolist() == list(range(6))


def test_a_llama_1_says_little_and_the_tensors_the_rest(tmp_path):
    params = {"dim": 32, "multiple_of": 32, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-06, "vocab_size": -1}
    state = meta_state(params | {"n_kv_heads": 4}, dtype=torch.float16)
    wide = feed_forward_size(32, 32, None)
    for layer in range(2):  # int(2 * 4 * 32 / 3) = 85, rounded up to 96
        for name, shape in (("w1", (wide, 32)), ("w2", (32, wide)), ("w3", (wide, 32))):
            state[f"layers.{layer}.feed_forward.{name}.weight"] = torch.zeros(shape).half()
    raw = read_raw_config(write_meta(tmp_path / "meta", params, split(state, 2, 1)))
    config = raw.parse()
    assert (config.vocab_size, config.intermediate_size, config.num_kv_heads) == (64, 96, 4)
    assert (config.rope_theta, config.rope_scaling, config.max_positions) == (10000.0, None, 2048)
    assert (config.bos_id, config.eos_ids, config.tie_embeddings) == (None, (), False)
    assert raw.config["dtype"] == "float16" and any("2048 is assumed" in line for line in raw.assumed)
    with pytest.warns(UserWarning, match=r"meta: params\.json has no number .* 2048 is assumed"):
        assert read_config(tmp_path / "meta") == config


def test_a_checkpoint_without_output_has_tied_embeddings(tmp_path):
    state = meta_state(PARAMS)
    del state["output.weight"]
    source = open_source(write_meta(tmp_path / "meta", PARAMS, [state]))
    assert source.config.tie_embeddings and "lm_head.weight" not in source.tensors


def test_a_config_beside_params_settles_what_they_leave_open_and_must_agree(tmp_path):
    rope = LLAMA_3_ROPE | {"factor": 32.0}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": WIDE, "max_position_embeddings": 200}
    origin = write_model(tmp_path / "origin", raw_config(rope_scaling=rope, **sizes))
    notes = []
    convert(origin, "meta", tmp_path / "meta", ConvertOptions(dtype="keep"), notes.append)
    assert any("params.json has no field for rope scaling" in line and "32.0" in line for line in notes)
    assert read_config(tmp_path / "meta") == read_config(origin)
    (tmp_path / "meta" / "config.json").rename(tmp_path / "config.json")
    assert read_config(tmp_path / "meta").rope_scaling["factor"] == 8.0
    changed = json.loads((tmp_path / "config.json").read_text()) | {"rope_theta": 10000.0, "num_key_value_heads": 4}
    (tmp_path / "meta" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"do not agree: num_kv_heads 4 and 2; rope_theta 10000\.0 and 500000\.0"):
        load_backbone(tmp_path / "meta")


# Writing -------------------------------------------------------------------------------------------------------------


def test_what_we_write_for_meta_is_the_same_model_under_its_equations(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=200,
            rope_parameters={"rope_theta": 500000.0, **LLAMA_3_ROPE},
        )
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", "meta", tmp_path / "meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params["n_kv_heads"] == 2 and params["use_scaled_rope"] is True
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    expected = transformers_logits(tmp_path / "hf")
    np.testing.assert_allclose(meta_logits(state, params, TOKENS[0]), expected, atol=CLOSE)
    unturned = model.state_dict()["model.layers.1.self_attn.k_proj.weight"]
    control = state | {"layers.1.attention.wk.weight": unturned}
    assert np.abs(meta_logits(control, params, TOKENS[0]) - expected).max() > 100 * CLOSE


def test_tied_embeddings_are_written_once_and_named_twice(tmp_path):
    origin = write_model(tmp_path / "origin", raw_config(tie_word_embeddings=True))
    convert(origin, "meta", tmp_path / "meta")
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()


@pytest.mark.parametrize(
    ("dim", "wide", "fields"),
    [
        (4096, 11008, {"multiple_of": 256}),  # Llama 2 7B
        (4096, 14336, {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),  # Llama 3 8B
        (8192, 28672, {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),  # Llama 3 70B; Llama 2's says 4096
        (2048, 8192, {"multiple_of": 256, "ffn_dim_multiplier": 1.5}),  # Llama 3.2 1B
        (256, 704, {"multiple_of": 704}),
        (256, 100, {"multiple_of": 100, "ffn_dim_multiplier": 100 / 682}),
    ],
)
def test_the_width_of_the_mlp_is_written_as_published(dim, wide, fields):
    params = params_of(small_config(hidden_size=dim, intermediate_size=wide, num_heads=dim // 8, num_kv_heads=2))
    assert {key: params[key] for key in ("multiple_of", "ffn_dim_multiplier") if key in params} == fields
    assert feed_forward_size(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == wide


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    return write_meta(tmp_path / "meta", PARAMS, split(meta_state(PARAMS), 4 // 2, 0))


def rewrite(folder, number, change):
    file = folder / f"consolidated.{number:02d}.pth"
    state = torch.load(file)
    change(state)
    torch.save(state, file)


def test_missing_shards_are_named_the_last_ones_too(sharded):
    (sharded / "consolidated.01.pth").rename(sharded / "consolidated.03.pth")
    with pytest.raises(ValueError, match=r"01\.pth, consolidated\.02\.pth: the model has 4 shards"):
        open_source(sharded)
    (sharded / "consolidated.03.pth").unlink()
    with pytest.raises(ValueError, match=r"is missing consolidated\.01\.pth: the model has 2 shards"):
        open_source(sharded)
    (sharded / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match=r"has no consolidated\.00\.pth"):
        read_config(sharded)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_layers": 3}, r"9 missing: layers\.2\.attention\.wk"),
        ({"n_layers": 1}, r"9 extra: layers\.1\.attention\.wk"),
        ({"moe_args": {}}, "moe_args is not supported; known: dim"),
        ({"dim": None}, "dim is None, expected a positive number"),
        ({"dim": 30}, "dim 30, n_heads 4 and n_kv_heads 2 do not divide"),
        ({"n_kv_heads": 1}, r"attention\.wk\.weight is \(16, 32\) from 2 shards of \(8, 32\), expected \(8, 32\)"),
        ({"vocab_size": 65}, r"tok_embeddings\.weight is \(64, 32\) .* expected \(65, 32\)"),
        ({"multiple_of": 128}, r"has 64 rows in all shards, expected 128 by multiple_of 128"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes'"),
        ({"norm_eps": True}, "norm_eps is True"),
    ],
)
def test_params_that_do_not_fit_are_refused_by_name(sharded, change, match):
    (sharded / "params.json").write_text(json.dumps(PARAMS | change))
    with pytest.raises(ValueError, match=match):
        open_source(sharded)


def test_shards_that_disagree_are_refused_by_name(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "one")
    rewrite(tmp_path / "one", 1, lambda state: state["norm.weight"].add_(1))
    with pytest.raises(ValueError, match=r"one: norm\.weight: it differs between the shards"):
        open_source(tmp_path / "one").tensors["model.norm.weight"].read()
    shutil.copytree(sharded, tmp_path / "two")
    rewrite(tmp_path / "two", 1, lambda state: state.update({"output.weight": torch.zeros(32, 31)}))
    with pytest.raises(ValueError, match=r"output\.weight: its shards do not fit together"):
        open_source(tmp_path / "two")
    rewrite(sharded, 1, lambda state: state.pop("output.weight"))
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth: .*output\.weight is in some of the shards only"):
        open_source(sharded)
