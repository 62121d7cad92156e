"""Weights arrive as they were saved, from every container, and a file that is damaged or missing is named."""

import dataclasses
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from backbone.config import read_config
from backbone.tokenizer import EMBEDDED
from backbone.weights import (
    EMBEDDING,
    LM_HEAD,
    Fingerprint,
    check_names,
    drop_tied_head,
    expected_shapes,
    fingerprint,
    open_file,
    read_backbone,
    read_tensors,
    tensor_shapes,
)


def save_sharded(directory, state, single, with_index=True):
    """Two shards as Hugging Face names them: even tensors in the first, odd ones in the second."""
    save = save_file if single.endswith("safetensors") else torch.save
    stem, suffix = single.rsplit(".", 1)
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        save({name: state[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if with_index:
        (directory / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SINGLES = ["model.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("single", SINGLES)
@pytest.mark.parametrize("shape", ["one file", "shards", "shards without index"])
def test_files_and_shards_give_back_what_was_saved(tmp_path, state, single, shape, assert_same):
    if shape == "one file":
        (save_file if single.endswith("safetensors") else torch.save)(state, tmp_path / single)
    else:
        save_sharded(tmp_path, state, single, with_index=shape == "shards")
    assert_same(read_tensors(tmp_path), state)
    assert tensor_shapes(tmp_path) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_names_select_tensors_and_unknown_names_are_refused(tmp_path, state, assert_same):
    save_sharded(tmp_path, state, "model.safetensors")
    assert_same(read_tensors(tmp_path, ["b.weight", "a.weight"]), {k: state[k] for k in ("a.weight", "b.weight")})
    with pytest.raises(ValueError, match=r"is missing nobody\.weight"):
        list(read_tensors(tmp_path, ["a.weight", "nobody.weight"]))


def test_reading_is_lazy_one_tensor_at_a_time(tmp_path, state):
    save_sharded(tmp_path, state, "pytorch_model.bin")
    reader = read_tensors(tmp_path)
    next(reader)
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002\.bin cannot be read"):
        list(reader)


# Damaged files


@pytest.mark.parametrize("single", SINGLES)
def test_truncated_and_corrupted_files_are_refused_by_name(tmp_path, state, single):
    (save_file if single.endswith("safetensors") else torch.save)(state, tmp_path / single)
    whole = (tmp_path / single).read_bytes()
    damaged = [whole[:0], whole[:7], whole[: len(whole) // 2], whole[:-1], b"\xff" * len(whole)]
    for data in damaged:
        (tmp_path / single).write_bytes(data)
        for read in (lambda: list(read_tensors(tmp_path)), lambda: tensor_shapes(tmp_path)):
            with pytest.raises(ValueError, match=single):
                read()


def test_a_tensor_that_the_index_promises_must_be_in_its_shard(tmp_path, state):
    save_sharded(tmp_path, state, "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    for read in (lambda: list(read_tensors(tmp_path)), lambda: tensor_shapes(tmp_path)):
        with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is missing ghost"):
            read()


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for number in (1, 2):
        save_file({"a": torch.ones(2)}, tmp_path / f"model-{number:05d}-of-00002.safetensors")
    for read in (lambda: list(read_tensors(tmp_path)), lambda: tensor_shapes(tmp_path)):
        with pytest.raises(ValueError, match="a is in another file as well"):
            read()


@pytest.mark.parametrize("escape", ["../outside.safetensors", "/etc/passwd", "..", "a/../../b", "..\\b", "", 3])
def test_an_index_cannot_point_outside_its_folder(tmp_path, escape):
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": escape}}))
    with pytest.raises(ValueError, match=r"index\.json places a in .* outside its own folder"):
        list(read_tensors(inside))


def test_an_index_cannot_reach_outside_through_a_link_but_a_download_cache_may_link_to_its_blobs(tmp_path):
    cache = tmp_path / "models--x"
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    name = "model-00001-of-00001.safetensors"
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    save_file({"a": torch.ones(2)}, blobs / "5feceb66")
    (snapshot / name).symlink_to("../../blobs/5feceb66")
    assert dict(read_tensors(snapshot))["a"].tolist() == [1.0, 1.0]
    save_file({"a": torch.ones(2)}, tmp_path / "secret")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(tmp_path / "secret")
    with pytest.raises(
        ValueError, match=r"index\.json places a in .* outside its own folder; .* not a link to .*secret"
    ):
        list(read_tensors(snapshot))
    # A link inside the folder is no way out.
    (snapshot / name).unlink()
    save_file({"a": torch.ones(2)}, snapshot / "real.safetensors")
    (snapshot / name).symlink_to("real.safetensors")
    assert dict(read_tensors(snapshot))["a"].tolist() == [1.0, 1.0]


def test_directories_without_weights_are_refused(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"not weights")
    (tmp_path / "consolidated.safetensors").write_bytes(b"the Meta layout, read elsewhere")
    with pytest.raises(ValueError, match="has no weights"):
        list(read_tensors(tmp_path))
    with pytest.raises(ValueError, match="is not a directory"):
        list(read_tensors(tmp_path / "nowhere"))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        list(read_tensors(tmp_path))


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("single", SINGLES)
def test_every_missing_shard_is_named(tmp_path, state, single, with_index):
    save_sharded(tmp_path, state, single, with_index)
    stem, suffix = single.rsplit(".", 1)
    gone = [tmp_path / f"{stem}-{number:05d}-of-00002.{suffix}" for number in ((1, 2) if with_index else (2,))]
    for path in gone:
        path.unlink()
    for read in (lambda: list(read_tensors(tmp_path)), lambda: tensor_shapes(tmp_path)):
        with pytest.raises(ValueError, match=", ".join(path.name for path in gone)):
            read()


def test_a_pipe_and_a_device_are_no_weights(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", Path("/dev/zero")):
        with pytest.raises(ValueError, match=rf"{path} is a (pipe|device), expected a regular file"):
            open_file(path)


def test_a_safetensors_file_that_names_a_tensor_twice_is_refused(tmp_path):
    entry = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [%d, %d]}'
    header = ("{" + entry % (0, 1) + ", " + entry % (0, 1) + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x01")
    with pytest.raises(ValueError, match=r"model\.safetensors: it holds 'a' twice"):
        tensor_shapes(tmp_path)


def test_a_file_is_known_by_its_content_whatever_it_is_called(tmp_path, state, assert_same):
    torch.save(state, tmp_path / "model.safetensors")
    assert_same(read_tensors(tmp_path), state)
    (tmp_path / "model.safetensors").unlink()
    save_file(state, tmp_path / "pytorch_model.bin")
    assert_same(read_tensors(tmp_path), state)
    (tmp_path / "pytorch_model.bin").write_text("weights, honestly")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .* neither safetensors nor torch\.save's format"):
        tensor_shapes(tmp_path)


# Names, shapes, ties and fingerprints


@pytest.fixture
def small_config():
    config = read_config(EMBEDDED)
    return dataclasses.replace(
        config, vocab_size=7, hidden_size=8, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
    )


def test_expected_shapes_are_those_of_transformers(small_config):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=7,
            hidden_size=8,
            intermediate_size=6,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
        )
    )
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected_shapes(small_config) == theirs
    tied = expected_shapes(dataclasses.replace(small_config, tie_embeddings=True))
    assert tied == {name: shape for name, shape in theirs.items() if name != LM_HEAD}


def test_the_embedded_weights_match_their_config():
    config = read_config(EMBEDDED)
    shapes = expected_shapes(config)
    found = {name: tensor.shape for name, tensor in read_backbone(EMBEDDED, config)}
    assert found == shapes
    with pytest.raises(ValueError, match=r"tiny-vicuna: .*9 extra: .*model\.layers\.5"):
        next(read_backbone(EMBEDDED, dataclasses.replace(config, num_layers=5)))


def test_every_wrong_name_and_shape_is_in_one_error(small_config):
    expected = expected_shapes(small_config)
    found = {**expected, "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    check_names(found, expected)
    del found["model.norm.weight"]
    found["lora.weight"] = (1,)
    found[EMBEDDING] = (8, 8)
    with pytest.raises(ValueError) as caught:
        check_names(found, expected)
    message = str(caught.value)
    assert "1 missing: model.norm.weight" in message and "1 extra: lora.weight" in message
    assert "model.embed_tokens.weight is (8, 8), expected (7, 8)" in message and "inv_freq" not in message
    with pytest.raises(ValueError, match=r"21 missing: .* and 11 more"):
        check_names({}, expected)


def test_a_tied_checkpoint_may_carry_an_equal_head_only(tmp_path, small_config):
    tied = dataclasses.replace(small_config, tie_embeddings=True)
    state = {name: torch.randn(shape) for name, shape in expected_shapes(small_config).items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"differs from model\.embed_tokens\.weight"):
        list(read_backbone(tmp_path, tied))
    state[LM_HEAD] = state[EMBEDDING].clone()
    save_file(state, tmp_path / "model.safetensors")
    assert {name for name, _ in read_backbone(tmp_path, tied)} == expected_shapes(tied).keys()
    assert LM_HEAD in {name for name, _ in read_backbone(tmp_path, small_config)}
    both = [(EMBEDDING, np.ones(2)), (LM_HEAD, np.ones(2))]
    for order in (both, both[::-1]):
        assert [name for name, _ in drop_tied_head(order, tied)] == [EMBEDDING]


def test_fingerprints_ignore_the_order_and_notice_every_difference(small_config):
    tensors = [("a", np.arange(6.0).reshape(2, 3)), ("b", np.ones(2, dtype=ml_dtypes.bfloat16))]
    first = fingerprint(small_config, tensors)
    assert first == fingerprint(small_config, tensors[::-1]) and len(first) == 16 and int(first, 16) >= 0
    others = [
        [("a", tensors[0][1]), ("c", tensors[1][1])],
        [("a", tensors[0][1].reshape(3, 2)), tensors[1]],
        [("a", tensors[0][1].astype(np.float32)), tensors[1]],
        [("a", tensors[0][1] + np.eye(2, 3) * 1e-15), tensors[1]],
        [("a", tensors[0][1]), ("b", tensors[1][1].view(np.uint16))],
        tensors[:1],
    ]
    assert len({first, *(fingerprint(small_config, other) for other in others)}) == 1 + len(others)
    assert fingerprint(dataclasses.replace(small_config, rope_theta=5e5), tensors) != first
    contiguous = Fingerprint(small_config)
    contiguous.add("a", np.ascontiguousarray(tensors[0][1].T))
    transposed = Fingerprint(small_config)
    transposed.add("a", tensors[0][1].T)
    assert contiguous.hexdigest() == transposed.hexdigest()
