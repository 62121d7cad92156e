"""A backbone passes through every format and comes back bit for bit; what a format cannot hold is refused by name."""

import errno
import json
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from backbone.config import read_config
from backbone.files import lazy
from backbone.formats import ConvertOptions, containers, convert, open_source, recognize, verify
from backbone.weights import EMBEDDING, LM_HEAD, expected_shapes, fingerprint, read_backbone
from tests.backbone.models import LLAMA_3_ROPE, TOKENIZER, bits, raw_config, write_model

FORMATS = ("safetensors", "hf-bin", "meta", "jittor-pkl")
KEEP = ConvertOptions(dtype="keep")


def target(folder, name, to):
    return folder / (f"{name}.pkl" if to == "jittor-pkl" else name)


@st.composite
def models(draw):
    """(config.json, dtype, shard size, bytes read at once) of backbones that every format can hold."""
    groups, kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([2, 4, 6]))
    heads = groups * kv_heads
    raw = raw_config(
        vocab_size=draw(st.integers(2, 20)),
        hidden_size=heads * head_dim,
        intermediate_size=draw(st.integers(1, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6, 3.3e-6])),
        rope_theta=draw(st.sampled_from([10000.0, 500000.0, 1e6])),
        rope_scaling=draw(st.sampled_from([None, LLAMA_3_ROPE, LLAMA_3_ROPE | {"factor": 32.0}])),
        tie_word_embeddings=draw(st.booleans()),
    )
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    return raw, dtype, draw(st.integers(1, 4000)), draw(st.sampled_from([1, 100, 1 << 24]))


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
@settings(max_examples=6, deadline=None)
@given(model=models())
def test_every_ordered_pair_of_formats_gives_back_every_bit(first, second, model):
    raw, dtype, shard_size, at_once = model
    if dtype == torch.bfloat16 and "jittor-pkl" in (first, second):
        dtype = torch.float32  # NumPy's pickles have no bfloat16
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", at_once)
        folder, options = Path(folder), ConvertOptions(dtype="keep", shard_size=shard_size)
        origin = write_model(folder / "origin", raw, dtype)
        middle, end = target(folder, "middle", first), target(folder, "end", second)
        convert(origin, first, middle, options)
        convert(middle, second, end, options)
        before, after = open_source(origin), open_source(end)
        assert recognize(middle) == first and recognize(end) == after.layout == second
        assert bits(after.tensors) == bits(before.tensors)
        assert after.raw.config == raw and after.raw.generation == {"eos_token_id": [2, 3]}
        files = {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in after.files.items()}
        assert files == TOKENIZER
        config = read_config(end)
        assert config == before.config and config.eos_ids == (2, 3)
        # What the loader sees is one and the same backbone, so that heads trained on one run on the other.
        marks = {fingerprint(config, read_backbone(place, config)) for place in (origin, middle, end)}
        assert len(marks) == 1


def test_the_pairs_can_fail():
    with tempfile.TemporaryDirectory() as folder:
        origin = write_model(Path(folder) / "origin", raw_config())
        convert(origin, "hf-bin", Path(folder) / "bin", KEEP)
        file = Path(folder) / "bin" / "pytorch_model.bin"
        state = torch.load(file)
        state["model.norm.weight"][3] += 1
        torch.save(state, file)
        assert bits(open_source(Path(folder) / "bin").tensors) != bits(open_source(origin).tensors)


# Types ---------------------------------------------------------------------------------------------------------------


def test_rounding_is_reported_and_verified_against_the_narrower_type(tmp_path, capsys):
    origin = write_model(tmp_path / "origin", raw_config(), torch.float32)
    done = convert(origin, "safetensors", tmp_path / "half", ConvertOptions(dtype="float16"))
    exact, rounded = open_source(origin).tensors, open_source(tmp_path / "half").tensors
    errors = {n: float(np.abs(t.read() - rounded[n].read().astype(np.float32)).max()) for n, t in exact.items()}
    assert done.rounding == max(errors.values()) > 0 and errors[done.rounding_in] == done.rounding
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    assert done.dtypes == {"float16": len(exact)}
    assert verify(origin, None, tmp_path / "half", "safetensors")
    assert not verify(origin, None, tmp_path / "half", "safetensors", 1e-6)
    assert "above the allowed" in capsys.readouterr().out
    # Back to a wider type nothing more is lost.
    back = convert(tmp_path / "half", "hf-bin", tmp_path / "back", ConvertOptions(dtype="float32"))
    assert back.rounding == 0 and verify(tmp_path / "half", None, tmp_path / "back", "hf-bin", 0.0)


def test_verify_sees_one_wrong_number_and_one_that_is_none(tmp_path, capsys):
    origin = write_model(tmp_path / "origin", raw_config())
    for value in (0.5, float("nan")):
        convert(origin, "safetensors", tmp_path / "copy", ConvertOptions(overwrite=True))
        assert verify(origin, None, tmp_path / "copy", "safetensors")
        state = load_file(tmp_path / "copy" / "model.safetensors")
        state["model.layers.1.mlp.up_proj.weight"][2, 3] = value
        save_file(state, tmp_path / "copy" / "model.safetensors")
        capsys.readouterr()
        with pytest.raises(ValueError, match="finite") if value != value else pytest.MonkeyPatch.context():
            assert not verify(origin, None, tmp_path / "copy", "safetensors")
        lines = [line for line in capsys.readouterr().out.splitlines() if "above the allowed 0" in line]
        assert lines[0].startswith("model.layers.1.mlp.up_proj.weight")


def test_a_backbone_that_is_not_finite_is_refused_by_name(tmp_path):
    origin = write_model(tmp_path / "origin", raw_config())
    state = load_file(origin / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(state, origin / "model.safetensors")
    for to in ("safetensors", "hf-bin", "meta", "jittor-pkl"):
        with pytest.raises(ValueError, match=r"origin: model\.layers\.1\.mlp\.up_proj\.weight holds 1 number"):
            convert(origin, to, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_rope_scaling_beside_rope_parameters_is_kept_or_refused(tmp_path):
    both = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    llama_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for scaling in ({"rope_type": "linear", "factor": 4.0}, {**llama_3, "original_max_position_embeddings": 8}):
        name = scaling["rope_type"]
        origin = write_model(tmp_path / name, {**raw_config(), **both, "rope_scaling": scaling})
        if name == "linear":
            with pytest.raises(ValueError, match="no field for rope scaling"):
                convert(origin, "meta", tmp_path / "out")
            continue
        convert(origin, "meta", tmp_path / "out")
        assert json.loads((tmp_path / "out" / "params.json").read_text())["use_scaled_rope"] is True
        assert read_config(tmp_path / "out") == read_config(origin) and read_config(origin).rope_scaling == scaling
        assert verify(origin, None, tmp_path / "out", "meta")


def test_a_number_too_large_for_float16_is_refused_by_name(tmp_path):
    origin = write_model(tmp_path / "origin", raw_config(), torch.float32)
    state = load_file(origin / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight"][1, 1] = 70000.0
    save_file(state, origin / "model.safetensors")
    for to in ("safetensors", "jittor-pkl"):
        with pytest.raises(ValueError, match=r"mlp\.down_proj\.weight holds 70000, more than float16"):
            convert(origin, to, tmp_path / "out", ConvertOptions(dtype="float16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin"]
    convert(origin, "safetensors", tmp_path / "out", ConvertOptions(dtype="bfloat16"))


def test_pickles_are_float16_by_default(tmp_path):
    origin = write_model(tmp_path / "origin", raw_config(), torch.bfloat16)
    assert convert(origin, "jittor-pkl", tmp_path / "a.pkl").dtypes.keys() == {"float16"}
    assert convert(origin, "jittor-pkl", tmp_path / "b.pkl", ConvertOptions(dtype="float32")).rounding == 0
    for dtype in ("keep", "bfloat16"):
        with pytest.raises(ValueError, match="no bfloat16"):
            convert(origin, "jittor-pkl", tmp_path / "c.pkl", ConvertOptions(dtype=dtype))
    # In a folder the tokenizer is beside it, where load_tokenizer finds it.
    convert(origin, "jittor-pkl", tmp_path / "folder")
    names = {path.name for path in (tmp_path / "folder").iterdir()}
    assert names == {"backbone.pkl", "config.json", "generation_config.json", *TOKENIZER}
    assert read_config(tmp_path / "folder" / "backbone.pkl") == read_config(tmp_path / "folder")


# Complete or not at all ----------------------------------------------------------------------------------------------


def test_a_place_that_is_read_only_is_not_taken_for_a_full_one(tmp_path, monkeypatch):
    origin = write_model(tmp_path / "origin", raw_config())
    monkeypatch.setattr("os.access", lambda folder, mode: Path(folder) != tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))  # as of a mounted image
    with pytest.raises(ValueError, match=rf"out cannot be written: {tmp_path} is read-only; choose another --out"):
        convert(origin, "safetensors", tmp_path / "out")


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_fills_up_is_one_clear_error_and_leaves_nothing(tmp_path, to):
    origin = write_model(tmp_path / "origin", raw_config(intermediate_size=4000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the system refuses to write more into a file
    try:
        with pytest.raises(ValueError, match=r"too large while writing .* nothing was written: free some space"):
            convert(origin, to, target(tmp_path, "out", to), KEEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin"]


def test_a_full_disk_is_reported_in_the_systems_words_and_beforehand_where_possible(tmp_path, monkeypatch):
    origin = write_model(tmp_path / "origin", raw_config())
    convert(origin, "safetensors", tmp_path / "out", KEEP)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(tensor, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="No space left on device while writing"):
        patch.setattr(containers, "_stream", full)
        convert(origin, "safetensors", tmp_path / "out", ConvertOptions(overwrite=True))
    # The earlier conversion is untouched.
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin", "out"]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"needs 6\.24e-06 GB, .* has 1e-06 GB left"):
        convert(origin, "safetensors", tmp_path / "other", KEEP)


def test_a_target_that_exists_is_replaced_on_request_only_and_only_if_it_is_a_backbone(tmp_path):
    origin = write_model(tmp_path / "origin", raw_config())
    convert(origin, "meta", tmp_path / "out", KEEP)
    with pytest.raises(ValueError, match="out exists; choose another place or pass --overwrite"):
        convert(origin, "safetensors", tmp_path / "out", KEEP)
    replace = ConvertOptions(dtype="keep", overwrite=True)
    convert(origin, "safetensors", tmp_path / "out", replace)
    assert recognize(tmp_path / "out") == "safetensors" and not (tmp_path / "out" / "params.json").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"dear")
    (tmp_path / "letter.pkl").write_bytes(b"dear")
    for to, precious in (("safetensors", "photos"), ("jittor-pkl", "letter.pkl")):
        with pytest.raises(ValueError, match="is not what --overwrite would replace"):
            convert(origin, to, tmp_path / precious, replace)
    for out in (origin, tmp_path, tmp_path / "origin" / ".." / "origin"):
        with pytest.raises(ValueError, match="would replace the source"):
            convert(origin, "hf-bin", out, replace)
    with pytest.raises(ValueError, match="looks like a file"):
        convert(origin, "safetensors", tmp_path / "x.safetensors", KEEP)


# What a format cannot hold, and what is no backbone ------------------------------------------------------------------


def test_tied_and_old_checkpoints_lose_only_what_follows_from_the_config(tmp_path):
    origin = write_model(tmp_path / "origin", raw_config(tie_word_embeddings=True))
    state = load_file(origin / "model.safetensors")
    state |= {LM_HEAD: state[EMBEDDING].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(state, origin / "model.safetensors")
    notes = []
    convert(origin, "hf-bin", tmp_path / "out", KEEP, notes.append)
    assert any("1 rotary buffers are left out" in line for line in notes)
    assert any("lm_head.weight is left out" in line for line in notes)
    assert set(torch.load(tmp_path / "out" / "pytorch_model.bin")) == set(expected_shapes(read_config(origin)))
    state[LM_HEAD][0, 0] += 1
    save_file(state, origin / "model.safetensors")
    with pytest.raises(ValueError, match="differs from"):
        convert(origin, "hf-bin", tmp_path / "other", KEEP)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "no field for rope scaling"),
        ({"head_dim": 8}, "head_dim 8 times 4 heads is not hidden_size 16"),
    ],
)
def test_meta_refuses_what_params_json_has_no_field_for(tmp_path, change, match):
    origin = write_model(tmp_path / "origin", raw_config(**change))
    with pytest.raises(ValueError, match=match):
        convert(origin, "meta", tmp_path / "out", KEEP)
    assert not (tmp_path / "out").exists()
    convert(origin, "jittor-pkl", tmp_path / "out.pkl", KEEP)


def test_backbones_and_heads_are_distinguished_by_their_tensors(tmp_path):
    origin = write_model(tmp_path / "origin", raw_config())
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_text((origin / "config.json").read_text())
    save_file({"layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}, head / "model.safetensors")
    torch.save({"0.0.linear.weight": torch.ones(2, 2)}, tmp_path / "medusa_lm_head.pt")
    np.savez(tmp_path / "head.npz", weight=np.ones(2))
    for path in (head, tmp_path / "medusa_lm_head.pt", tmp_path / "head.npz"):
        assert recognize(path) is None
        with pytest.raises(ValueError, match="has no backbone"):
            open_source(path)
    with pytest.raises(ValueError, match="pass its folder"):
        recognize(origin / "model.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        recognize(tmp_path / "nowhere")
    (origin / "model.safetensors").rename(origin / "weights-of-mine.safetensors")
    assert recognize(origin) == "safetensors"
    with pytest.raises(ValueError, match=r"Unknown format 'hf-bim'\. Did you mean 'hf-bin'"):
        convert(origin, "hf-bim", tmp_path / "out")


def test_the_source_format_can_be_chosen_where_there_are_several(tmp_path):
    both = write_model(tmp_path / "both", raw_config())
    torch.save(
        {name: torch.zeros_like(t) for name, t in load_file(both / "model.safetensors").items()},
        both / "pytorch_model.bin",
    )
    zeros = open_source(both, "hf-bin").tensors
    assert not any(tensor.read().any() for tensor in zeros.values())
    assert recognize(both) == "safetensors" and open_source(both).tensors[EMBEDDING].read().any()
    done = convert(both, "safetensors", tmp_path / "out", ConvertOptions(source_format="hf-bin"))
    assert done.source_format == "hf-bin" and not open_source(tmp_path / "out").tensors[EMBEDDING].read().any()
    assert verify(both, "hf-bin", tmp_path / "out", "safetensors")
