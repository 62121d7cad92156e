"""Checkpoints of every head: they come back bit for bit, appear atomically, and are refused when they do not fit."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from heads.base import Features
from heads.checkpoint import find_checkpoint, latest_checkpoints, load_head, save_checkpoint, weights_sha256
from heads.registry import available
from tests.heads.parity import ROWS, draw_text, logits_of, small_options


def checkpoint_config(head, name, backbone):
    return {
        "head": name,
        "head_config": vars(head.config),
        "backbone": {"fingerprint": backbone.fingerprint, "path": None},
    }


def skip_without_parameters(head):
    if not head.trained:
        pytest.skip("a head without parameters")


@pytest.fixture(params=available())
def saved(request, random_head, backbone, tmp_path):
    """(head, its checkpoint's directory)."""
    head = random_head(request.param, **small_options(request.param))
    directory = tmp_path / request.param / "run" / "checkpoint"
    save_checkpoint(directory, head, checkpoint_config(head, request.param, backbone), {"utc": "now"})
    return head, directory


def test_a_saved_head_comes_back_bit_for_bit(saved, backbone):
    head, directory = saved
    loaded, config = load_head(directory.parent, backbone)  # the folder of the run
    assert config["head_config"] == vars(head.config) and vars(loaded.config) == vars(head.config)
    own, other = dict(head.named_parameters()), dict(loaded.named_parameters())
    assert own.keys() == other.keys()
    for name in own:
        np.testing.assert_array_equal(own[name].numpy(), other[name].numpy(), err_msg=name)
    assert not loaded.is_training()
    head.eval()
    ids = draw_text()[1]
    output = backbone.forward(ids[:, :ROWS], layers=head.layers)
    features = Features(output.hidden, output.layers)
    for mine, theirs in zip(*(logits_of(each(features, ids, np.arange(ROWS))) for each in (head, loaded)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_saving_again_replaces_the_checkpoint_and_leaves_nothing_beside_it(saved, backbone):
    head, directory = saved
    skip_without_parameters(head)
    before = weights_sha256(directory)
    parameter = head.parameters()[0]
    parameter.update(parameter + 1)
    save_checkpoint(directory, head, json.loads((directory / "config.json").read_text()), {})
    assert weights_sha256(directory) != before
    assert [path.name for path in directory.parent.iterdir()] == ["checkpoint"]
    assert latest_checkpoints(directory.parents[2]) == {directory.parents[1].name: directory}


def test_a_failed_save_leaves_the_old_checkpoint(saved):
    head, directory = saved
    before = weights_sha256(directory)
    with pytest.raises(TypeError):
        save_checkpoint(directory, head, {"head": object()}, {})
    assert weights_sha256(directory) == before
    assert [path.name for path in directory.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_parameter_that_is_not_finite_is_named(saved, backbone, number):
    head, directory = saved
    skip_without_parameters(head)
    name, parameter = next((n, p) for n, p in head.named_parameters() if str(p.dtype) == "float32")
    numbers = parameter.numpy()
    numbers.reshape(-1)[-1] = number
    parameter.update(numbers)
    save_checkpoint(directory, head, json.loads((directory / "config.json").read_text()), {})
    with pytest.raises(ValueError, match=f"head.safetensors: {re.escape(name)} holds 1 number.* not finite"):
        load_head(directory, backbone)


def test_a_checkpoint_of_another_backbone_is_refused(saved):
    _, directory = saved
    other = SimpleNamespace(fingerprint="0123456789abcdef", path="elsewhere")
    with pytest.raises(ValueError, match=r"was trained on backbone .*, this is 0123456789abcdef \(elsewhere\)"):
        load_head(directory, other)


def test_parameters_that_do_not_fit_are_each_named(saved, backbone):
    head, directory = saved
    skip_without_parameters(head)
    tensors = load_file(directory / "head.safetensors")
    names = sorted(tensors)
    del tensors[names[0]]
    tensors["stranger"] = np.zeros(2, np.float32)
    tensors[names[1]] = np.zeros((1, 2, 3), np.float32)
    save_file(tensors, directory / "head.safetensors")
    with pytest.raises(ValueError, match="does not fit head") as caught:
        load_head(directory, backbone)
    for part in (f"missing {names[0]}", "unexpected stranger", f"{names[1]} is [1, 2, 3], expected ["):
        assert part in str(caught.value)


def test_parameters_of_another_type_are_named(saved, backbone):
    head, directory = saved
    skip_without_parameters(head)
    tensors = load_file(directory / "head.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, directory / "head.safetensors")
    with pytest.raises(ValueError, match="is float16, expected float32"):
        load_head(directory, backbone)


def test_a_truncated_file_is_named(saved, backbone):
    _, directory = saved
    path = directory / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"head\.safetensors cannot be read"):
        load_head(directory, backbone)


@pytest.mark.parametrize("text", ["{", "[]", '{"head": "mlp"}', "\xff"])
def test_a_config_that_is_not_of_a_checkpoint_is_named(backbone, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json (line 1: not valid JSON|holds a list|is not)"):
        load_head(tmp_path, backbone)


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in"):
        find_checkpoint(tmp_path)
    assert latest_checkpoints(tmp_path / "nowhere") == {}
