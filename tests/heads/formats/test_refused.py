"""What cannot be converted exactly is refused, naming the file, the tensor or the setting."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from backbone.model import load_backbone
from heads.checkpoint import save_checkpoint
from heads.formats import recognize
from heads.registry import available, build
from tests.heads.formats.format_files import DIM, VOCAB, medusa_heads, run, save_medusa, write_backbone


@pytest.fixture
def medusa(tmp_path):
    return save_medusa(tmp_path / "medusa", medusa_heads(2, 1))


@pytest.fixture
def ours(tmp_path, folder, medusa):
    """A checkpoint of an mlp head."""
    assert run(medusa, "gorgon", tmp_path / "ours", backbone=folder) == 0
    return tmp_path / "ours"


def changed_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def changed_tensors(folder, file, drop=(), **changes):
    tensors = {name: tensor for name, tensor in load_file(folder / file).items() if name not in drop}
    save_file({**tensors, **changes}, str(folder / file))


def refused(source, to, out, folder, words, **changes):
    """The conversion raises ValueError with these words, and leaves nothing."""
    with pytest.raises(ValueError, match=words):
        run(source, to, out, backbone=folder, **changes)
    assert not out.exists() and not [path for path in out.parent.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_a_truncated_file_is_named(tmp_path, folder, medusa, file):
    if file.endswith(".safetensors"):
        assert run(medusa, "medusa", tmp_path / "other" / file, backbone=folder) == 0
        medusa = tmp_path / "other"
    path = medusa / file
    path.write_bytes(path.read_bytes()[:-2000])
    refused(medusa, "gorgon", tmp_path / "out", folder, file)


@pytest.mark.parametrize("to", ["a.npz", "a.pkl"])
def test_a_truncated_single_file_is_named(tmp_path, folder, ours, to):
    assert run(ours, "npz" if to.endswith("npz") else "jittor-pkl", tmp_path / to, backbone=folder) == 0
    path = tmp_path / to
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "gorgon", tmp_path / "out", folder, to)


@pytest.mark.parametrize("to", ["gorgon", "medusa", "npz", "jittor-pkl", "vllm-medusa"])
def test_numbers_that_are_not_finite_are_named(tmp_path, folder, medusa, to):
    state = torch.load(medusa / "medusa_lm_head.pt")
    state["1.0.linear.bias"][2] = float("nan")
    torch.save(state, medusa / "medusa_lm_head.pt")
    words = r"medusa_lm_head\.pt: .*1.* holds 1 number\(s\) that are not finite"
    refused(medusa, to, tmp_path / ("out.npz" if to == "npz" else "out.pkl" if "pkl" in to else "out"), folder, words)


def test_missing_and_unknown_tensors_are_named(tmp_path, folder, medusa):
    state = torch.load(medusa / "medusa_lm_head.pt")
    del state["0.0.linear.bias"], state["1.1.weight"]
    state["extra.weight"] = torch.zeros(2)
    torch.save(state, medusa / "medusa_lm_head.pt")
    words = r"2 missing: 0\.0\.linear\.bias, 1\.1\.weight; 1 extra: extra\.weight"
    refused(medusa, "gorgon", tmp_path / "out", folder, words)


def test_a_head_missing_in_the_middle_is_named(tmp_path, folder):
    medusa = save_medusa(tmp_path / "medusa", medusa_heads(3, 1))
    state = torch.load(medusa / "medusa_lm_head.pt")
    torch.save({k: v for k, v in state.items() if not k.startswith("1.")}, medusa / "medusa_lm_head.pt")
    refused(medusa, "gorgon", tmp_path / "out", folder, r"3 missing: 1\.0\.linear\.bias")


def test_float64_is_refused(tmp_path, folder, medusa):
    torch.save(medusa_heads(1, 1).double().state_dict(), medusa / "medusa_lm_head.pt")
    refused(medusa, "gorgon", tmp_path / "out", folder, "is float64; expected one of")


@pytest.mark.parametrize(("changes", "words"), [
    ({"hidden_size": 48, "num_heads": 6}, "width 32 and vocabulary 64; the backbone .* has width 48 and vocabulary 64"),
    ({"vocab_size": 80}, "width 32 and vocabulary 64; the backbone .* has width 32 and vocabulary 80"),
])  # fmt: skip
def test_a_head_of_another_width_or_vocabulary_is_refused(tmp_path, medusa, changes, words):
    other = write_backbone(tmp_path / "other", **changes)
    refused(medusa, "gorgon", tmp_path / "out", other, words)


def test_a_head_trained_on_another_backbone_is_refused_when_a_checkpoint_is_written(tmp_path, folder, ours):
    other = write_backbone(tmp_path / "other", seed=5)
    assert run(ours, "npz", tmp_path / "a.npz", backbone=other) == 0  # needs no backbone
    refused(tmp_path / "a.npz", "gorgon", tmp_path / "out", other, "trained on backbone .* pass --backbone")


def test_a_checkpoint_whose_weights_were_changed_is_refused(tmp_path, folder, ours):
    changed_tensors(ours, "head.safetensors", **{"lm_heads.0.weight": np.zeros((VOCAB, DIM), np.float32)})
    refused(ours, "medusa", tmp_path / "out", folder, "head.safetensors is damaged")


def test_a_head_of_ours_is_not_written_for_a_backbone_of_another_width(tmp_path, ours):
    other = write_backbone(tmp_path / "other", hidden_size=48, num_heads=6)
    refused(ours, "medusa", tmp_path / "out", other, "the head belongs to a backbone of width 32 .* has width 48")


def test_a_shared_language_model_head_is_not_taken_from_another_backbone(tmp_path, folder):
    medusa = save_medusa(tmp_path / "medusa", medusa_heads(2, 1, own_lm_heads=False), version="2")
    assert run(medusa, "gorgon", tmp_path / "ours", backbone=folder) == 0
    other = write_backbone(tmp_path / "other", seed=5)
    for merge in (False, True):
        refused(tmp_path / "ours", "vllm-medusa", tmp_path / "out", other, "trained on backbone", merge=merge)


def test_a_language_model_head_of_low_rank_needs_merge(tmp_path, folder, ours):
    backbone = load_backbone(folder)
    head = build("mlp", {"num_depths": 1, "lm_head": "low_rank", "rank": 2}, backbone)
    config = {"head": "mlp", "head_config": vars(head.config), "backbone": {"fingerprint": backbone.fingerprint}}
    save_checkpoint(tmp_path / "low", head, config, {})
    for to in ("medusa", "vllm-medusa", "tensorrt-llm-medusa"):
        refused(tmp_path / "low", to, tmp_path / "out", folder, "low rank .* pass --merge")


def test_a_shared_language_model_head_needs_merge_where_each_depth_has_one(tmp_path, folder):
    medusa = save_medusa(tmp_path / "medusa", medusa_heads(2, 1, own_lm_heads=False), version="2")
    refused(medusa, "tensorrt-llm-medusa", tmp_path / "out", folder, "shares the backbone's; pass --merge")


def test_two_different_blocks_per_depth_are_refused_where_the_original_code_ties_them(tmp_path, folder, capsys):
    medusa = save_medusa(tmp_path / "medusa", medusa_heads(2, 2), medusa_num_layers=2)
    assert run(medusa, "gorgon", tmp_path / "ours", backbone=folder) == 0
    assert "0.1.linear.weight differs from that of block 0" in capsys.readouterr().err
    refused(tmp_path / "ours", "medusa", tmp_path / "out", folder, "repeats one block, but blocks.0.1.linear.weight")
    for to in ("vllm-medusa", "tensorrt-llm-medusa"):
        assert run(tmp_path / "ours", to, tmp_path / to, backbone=folder, verify=True) == 0


def test_equal_blocks_are_written_for_the_original_code(tmp_path, folder):
    heads = medusa_heads(1, 2)
    heads[0][1] = heads[0][0]
    medusa = save_medusa(tmp_path / "medusa", heads, medusa_num_layers=2)
    assert run(medusa, "vllm-medusa", tmp_path / "vllm", backbone=folder) == 0
    assert run(tmp_path / "vllm", "medusa", tmp_path / "back", backbone=folder) == 0


@pytest.mark.parametrize(("config", "drop", "tensors", "words"), [
    ({"truncated_vocab_size": 16}, (), {"token_map": np.arange(16)}, "score 16 tokens of 64"),
    ({"logit_scale": 0.5}, (), {}, "logit_scale is 0.5"),
    ({"medusa_fc_bias": False}, (), {}, "holds biases, but its config.json does not set medusa_fc_bias"),
    ({}, ("blocks.1.layers.0.bias",), {}, r"1 missing: blocks\.1\.layers\.0\.bias"),
    ({"original_lm_head": True}, (), {}, "original_lm_head true, and it holds .* per depth; correct"),
    ({}, (), {"lm_head.weight": np.zeros((VOCAB, DIM), np.float32)}, "original_lm_head false, and it holds lm_head"),
    ({"original_lm_head": True}, ("lm_heads.0.weight", "lm_heads.1.weight"),
     {"lm_head.weight": np.zeros((VOCAB, DIM), np.float32)}, "lm_head.weight is not that of the backbone"),
])  # fmt: skip
def test_a_vllm_file_that_computes_something_else_is_refused(tmp_path, folder, ours, config, drop, tensors, words):
    assert run(ours, "vllm-medusa", tmp_path / "vllm", backbone=folder) == 0
    changed_config(tmp_path / "vllm", **config)
    changed_tensors(tmp_path / "vllm", "model.safetensors", drop, **tensors)
    refused(tmp_path / "vllm", "gorgon", tmp_path / "out", folder, words)


@pytest.mark.parametrize(("config", "words"), [
    ({"mapping": {"world_size": 2}}, "split over 2 ranks"),
    ({"quantization": {"quant_algo": "FP8"}}, "quantized .FP8."),
    ({"hidden_act": "gelu"}, "activation is gelu"),
])  # fmt: skip
def test_a_tensorrt_llm_file_that_computes_something_else_is_refused(tmp_path, folder, ours, config, words):
    assert run(ours, "tensorrt-llm-medusa", tmp_path / "trt", backbone=folder) == 0
    changed_config(tmp_path / "trt", **config)
    refused(tmp_path / "trt", "gorgon", tmp_path / "out", folder, words)


def test_the_backbones_part_of_a_tensorrt_llm_checkpoint_is_not_read(tmp_path, folder, ours, capsys):
    assert run(ours, "tensorrt-llm-medusa", tmp_path / "trt", backbone=folder) == 0
    part = {"transformer.ln_f.weight": np.ones(DIM, np.float16), "lm_head.weight": np.ones((VOCAB, DIM), np.float16)}
    changed_tensors(tmp_path / "trt", "rank0.safetensors", **part)
    assert run(tmp_path / "trt", "gorgon", tmp_path / "out", backbone=folder, verify=True) == 0
    assert "2 tensors of the backbone in rank0.safetensors were not read" in capsys.readouterr().err


class Hostile:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", ["a.jtr", "medusa_lm_head.pt"])
def test_a_hostile_pickle_is_refused_by_name_and_does_nothing(tmp_path, folder, file):
    bait, path = tmp_path / "bait", tmp_path / "hostile" / file
    path.parent.mkdir()
    if file.endswith(".pt"):
        torch.save({"0.0.linear.weight": torch.zeros(2), "hook": Hostile(bait)}, path)
    else:
        path.write_bytes(pickle.dumps({"config.json": "{}", "hook": Hostile(bait)}))
    for source in (path, path.parent):
        if source.is_file() or file.endswith(".pt"):
            with pytest.raises(ValueError, match=rf"{file} is not loaded: its pickle names \w+\.open"):
                recognize(source)
            refused(source, "gorgon", tmp_path / "out", folder, r"names \w+\.open")
    assert not bait.exists()
    pickle.loads(pickle.dumps(Hostile(bait))).close()  # the control: it would have
    assert bait.exists()


def test_arrays_of_objects_are_refused(tmp_path, folder):
    np.savez(tmp_path / "a.npz", **{"config.json": np.array("{}"), "x": np.array([{}], object)})
    refused(tmp_path / "a.npz", "gorgon", tmp_path / "out", folder, "a.npz cannot be read")


def test_a_single_file_without_a_config_says_so(tmp_path, folder):
    np.savez(tmp_path / "a.npz", **{"blocks.0.0.linear.weight": np.zeros((DIM, DIM), np.float32)})
    assert recognize(tmp_path / "a.npz") is None
    refused(tmp_path / "a.npz", "gorgon", tmp_path / "out", folder, "not a head in a known format")
    refused(tmp_path / "a.npz", "gorgon", tmp_path / "out", folder, "so the head is unknown", source_format="npz")


@pytest.mark.parametrize("config", [[], {}, {"head": "mlp", "head_config": {}, "backbone": None}, {"head": 3}])
def test_a_config_that_is_not_of_a_head_is_refused(tmp_path, folder, config):
    np.savez(tmp_path / "a.npz", **{"config.json": np.array(json.dumps(config)), "x": np.zeros(2, np.float32)})
    refused(tmp_path / "a.npz", "gorgon", tmp_path / "out", folder, "its entry config.json is not that of a head")


def test_a_file_without_tensors_is_refused(tmp_path, folder):
    np.savez(tmp_path / "a.npz", **{"config.json": np.array("{}")})
    refused(tmp_path / "a.npz", "gorgon", tmp_path / "out", folder, "holds no parameters")


def test_numbers_beyond_float16_are_refused_and_nothing_is_left(tmp_path, folder):
    heads = medusa_heads(1, 1)
    with torch.no_grad():
        heads[0][0].linear.bias[3] = 1e6
    medusa = save_medusa(tmp_path / "medusa", heads)
    refused(medusa, "tensorrt-llm-medusa", tmp_path / "out", folder, r"linear\.bias holds 1e\+06, more than float16")
    assert run(medusa, "tensorrt-llm-medusa", tmp_path / "out", backbone=folder, dtype="bfloat16") == 0


@pytest.mark.parametrize(("to", "dtype", "words"), [
    ("gorgon", "float16", "a checkpoint holds float32"),
    ("npz", "bfloat16", "NumPy has no bfloat16"),
    ("jittor-pkl", "bfloat16", "no bfloat16"),
    ("medusa", "float8", "Unknown dtype 'float8'. Did you mean"),
    ("medus", None, "Unknown format of heads 'medus'. Did you mean 'medusa'"),
])  # fmt: skip
def test_unknown_dtypes_and_formats_are_refused(tmp_path, folder, medusa, to, dtype, words):
    refused(medusa, to, tmp_path / "out", folder, words, dtype=dtype)


def test_a_format_refuses_other_heads(tmp_path, folder):
    for name in available():
        if name != "mlp":
            weights = {"head": name, "head_config": {}, "backbone": {}}
            entries = {"config.json": np.array(json.dumps(weights)), "x": np.zeros(2, np.float32)}
            np.savez(tmp_path / "a.npz", **entries)
            refused(tmp_path / "a.npz", "medusa", tmp_path / "out", folder, f"{name} computes something else")


def test_only_a_head_is_replaced_and_only_with_overwrite(tmp_path, folder, medusa):
    out = tmp_path / "out"
    assert run(medusa, "gorgon", out, backbone=folder) == 0
    with pytest.raises(ValueError, match="pass --overwrite"):
        run(medusa, "vllm-medusa", out, backbone=folder)
    assert run(medusa, "vllm-medusa", out, backbone=folder, overwrite=True) == 0
    (out / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(ValueError, match=r"thesis\.tex, which is not part of a head"):
        run(medusa, "gorgon", out, backbone=folder, overwrite=True)
    assert (out / "thesis.tex").read_text() == "irreplaceable"
    with pytest.raises(ValueError, match="is the source; choose another"):
        run(medusa, "medusa", medusa, backbone=folder, overwrite=True)
    with pytest.raises(ValueError, match="names a file; expected a folder, or medusa_lm_head"):
        run(medusa, "medusa", tmp_path / "x.pt", backbone=folder)
