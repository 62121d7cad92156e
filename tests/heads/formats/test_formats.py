"""Heads in other systems' formats: Medusa in PyTorch gives our logits in both directions, and sides are verified."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from backbone.files import lazy
from backbone.files.lazy import in_memory
from heads.checkpoint import load_head
from heads.formats import FORMATS, files, recognize
from heads.formats.medusa import VLLMMedusa
from heads.formats.verify import difference
from runtime import jt
from tests.heads.formats.format_files import (
    DIM,
    VOCAB,
    hidden_states,
    logits_of,
    medusa_heads,
    near,
    read_folder,
    run,
    save_medusa,
    torch_logits,
    write_backbone,
)


@pytest.mark.parametrize(("num_heads", "num_layers"), [(3, 1), (2, 2)])
def test_medusa_of_pytorch_gives_our_logits(tmp_path, folder, small, num_heads, num_layers):
    heads = medusa_heads(num_heads, num_layers)
    source = save_medusa(tmp_path / "medusa", heads, medusa_num_layers=num_layers)
    assert run(source, "gorgon", tmp_path / "ours", backbone=folder, verify=True) == 0
    head, config = load_head(tmp_path / "ours", small)
    assert (config["head_config"]["num_depths"], config["head_config"]["num_layers"]) == (num_heads, num_layers)
    hidden = hidden_states()
    expected = torch_logits(heads, hidden)
    assert near(logits_of(head, hidden), expected)
    assert not near(logits_of(head, hidden), expected[1:] + expected[:1])  # the control: heads in another order


@pytest.mark.parametrize("defect", ["transposed", "swapped", "bias left out"])
def test_a_file_with_a_defect_does_not_give_the_logits(tmp_path, folder, small, defect):
    heads = medusa_heads(2, 1)
    hidden, state = hidden_states(), heads.state_dict()
    expected = torch_logits(heads, hidden)
    if defect == "transposed":
        state["0.0.linear.weight"] = state["0.0.linear.weight"].T.contiguous()
    elif defect == "swapped":
        state["0.1.weight"], state["1.1.weight"] = state["1.1.weight"], state["0.1.weight"]
    else:
        state["1.0.linear.bias"] = torch.zeros(DIM)
    source = save_medusa(tmp_path / "medusa", heads)
    torch.save(state, source / "medusa_lm_head.pt")
    assert run(source, "gorgon", tmp_path / "ours", backbone=folder) == 0
    assert not near(logits_of(load_head(tmp_path / "ours", small)[0], hidden), expected)


@pytest.mark.parametrize("lm_head", ["own", "shared"])
def test_our_head_in_pytorch_gives_our_logits(tmp_path, folder, small, checkpoint, lm_head):
    source = checkpoint(num_depths=3, lm_head=lm_head)
    assert run(source, "medusa", tmp_path / "medusa", backbone=folder, verify=True) == 0
    heads = medusa_heads(3, 1, lm_head == "own", seed=1)
    state = torch.load(tmp_path / "medusa" / "medusa_lm_head.pt", weights_only=True)
    heads.load_state_dict(state, strict=True)
    hidden, borrowed = hidden_states(), None if lm_head == "own" else small.lm_head_weight.numpy()
    expected = torch_logits(heads, hidden, borrowed)
    assert near(logits_of(load_head(source, small)[0], hidden), expected)
    config = json.loads((tmp_path / "medusa" / "config.json").read_text())
    assert (config["medusa_num_heads"], config["version"]) == (3, "1" if lm_head == "own" else "2")
    assert config["base_model_name_or_path"] == str(folder.resolve())
    # What vLLM asks for besides.
    assert (config["hidden_size"], config["vocab_size"], config["medusa_fc_bias"]) == (DIM, VOCAB, True)
    assert config.get("truncated_vocab_size") == (None if lm_head == "own" else 0)  # without heads, it has to refuse


def test_where_config_and_tensors_contradict_the_tensors_decide_and_a_note_is_printed(tmp_path, folder, small, capsys):
    heads = medusa_heads(5, 1).bfloat16()
    source = save_medusa(tmp_path / "medusa", heads, medusa_num_heads=2, version="2")
    assert run(source, "gorgon", tmp_path / "ours", backbone=folder) == 0
    output = capsys.readouterr().err
    assert "medusa_num_heads 2, the tensors hold 5" in output and "version 2, the tensors hold language-model" in output
    head, config = load_head(tmp_path / "ours", small)
    assert head.num_depths == 5 and config["metrics"] == {} and config["imported"]["format"] == "medusa"
    assert any("hold 5" in note for note in config["imported"]["notes"])
    stored = heads.state_dict()
    for name, parameter in head.named_parameters():  # bfloat16 became float32, exactly
        theirs = name.replace("blocks.", "").replace("lm_heads.0.", "0.1.").replace("lm_heads.", "")
        theirs = theirs if theirs in stored else f"{theirs.removesuffix('.weight')}.1.weight"
        assert np.array_equal(parameter.numpy(), stored[theirs].float().numpy()), name


ALL_OWN = [("gorgon", "g"), ("npz", "a.npz"), ("jittor-pkl", "a.jtr"), ("jittor-pkl", "a.pkl")]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in ("mlp", "hydra", "eagle", "lora", "gated_rnn")), ("eagle3", {"draft_vocab_size": 5})],
)
def test_a_checkpoint_survives_single_files_byte_for_byte(tmp_path, folder, checkpoint, name, options):
    source = checkpoint(name, num_depths=2, **options)
    (source / "calibration.json").write_text('{"kind": "calibration"}')
    previous = source
    for to, place in [*ALL_OWN[1:], ALL_OWN[0]]:
        assert run(previous, to, tmp_path / place, backbone=folder) == 0
        assert recognize(tmp_path / place) == to
        previous = tmp_path / place
    names = ["calibration.json", "config.json", "head.safetensors", "provenance.json"]
    assert sorted(path.name for path in previous.iterdir()) == names
    for file in names:
        assert (previous / file).read_bytes() == (source / file).read_bytes(), file


def test_jittor_itself_reads_the_pickle(tmp_path, folder, checkpoint):
    source = checkpoint(num_depths=1)
    assert run(source, "jittor-pkl", tmp_path / "head.pkl", backbone=folder, dtype="float16") == 0
    content = jt.load(str(tmp_path / "head.pkl"))
    assert json.loads(content["config.json"])["head"] == "mlp"
    expected = load_file(source / "head.safetensors")
    assert content.keys() == {*expected, "config.json", "provenance.json"}
    for name, tensor in expected.items():
        assert content[name].dtype == np.float16 and np.array_equal(content[name], tensor.astype(np.float16))


@pytest.mark.parametrize(
    ("to", "lm_head", "merge"),
    [
        ("medusa", "own", False),
        ("medusa", "shared", False),
        ("medusa", "low_rank", True),
        ("vllm-medusa", "own", False),
        ("vllm-medusa", "shared", False),
        ("vllm-medusa", "low_rank", True),
        ("tensorrt-llm-medusa", "own", False),
        ("tensorrt-llm-medusa", "shared", True),
    ],
)
def test_both_sides_are_verified(tmp_path, folder, checkpoint, capsys, to, lm_head, merge):
    source = checkpoint(num_depths=2, lm_head=lm_head, rank=4)
    assert run(source, to, tmp_path / "out", backbone=folder, verify=True, merge=merge) == 0
    output = capsys.readouterr().out
    assert "DIFFERS" not in output and json.loads(output.splitlines()[-1])["verified"] is True
    assert recognize(tmp_path / "out") == to
    assert run(tmp_path / "out", "gorgon", tmp_path / "back", backbone=folder, verify=True) == 0
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["head_config"]["lm_head"] == ("own" if merge else lm_head)


def test_a_shared_head_of_a_float32_backbone_is_compared_with_the_stored_language_model_head(tmp_path):
    backbone = write_backbone(tmp_path / "backbone", np.float32, seed=3)
    source = save_medusa(tmp_path / "medusa", medusa_heads(2, 1, own_lm_heads=False), version="2")
    assert run(source, "vllm-medusa", tmp_path / "out", backbone=backbone, verify=True) == 0
    stored = load_file(backbone / "model.safetensors")["lm_head.weight"]
    assert np.array_equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], stored)


@pytest.mark.parametrize("defect", ["changed", "swapped"])
def test_verify_finds_a_changed_or_swapped_tensor(tmp_path, folder, checkpoint, capsys, monkeypatch, defect):
    def spoiled(path, tensors):
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
        if defect == "changed":
            arrays["blocks.1.layers.0.weight"][3, 4] += 1e-3
        else:
            first, second = "blocks.0.layers.0.weight", "blocks.1.layers.0.weight"
            arrays[first], arrays[second] = arrays[second], arrays[first]
        save_file(arrays, str(path))

    monkeypatch.setattr(files, "write_safetensors", spoiled)
    source = checkpoint(num_depths=2)
    assert run(source, "vllm-medusa", tmp_path / "out", backbone=folder, verify=True) == 1
    output = capsys.readouterr().out
    assert "blocks.1.layers.0.weight" in output and "DIFFERS" in output and "not verified" in output


@pytest.mark.parametrize("crossed", [
    ("blocks.0.0.linear.weight", "blocks.1.0.linear.weight"),
    ("blocks.0.0.linear.bias", "blocks.0.1.linear.bias"),  # shows at depth 0 alone
])  # fmt: skip
def test_verify_finds_a_table_that_maps_names_wrongly_in_both_directions(
    tmp_path, folder, checkpoint, monkeypatch, capsys, crossed
):
    right, names = VLLMMedusa.table, {crossed[0]: crossed[1], crossed[1]: crossed[0]}

    def wrong(self, options, sizes):
        return [piece._replace(ours=names.get(piece.ours, piece.ours)) for piece in right(self, options, sizes)]

    monkeypatch.setattr(VLLMMedusa, "table", wrong)
    source = checkpoint(num_depths=2, num_layers=2)
    assert run(source, "vllm-medusa", tmp_path / "out", backbone=folder, verify=True) == 1
    output = capsys.readouterr().out
    assert "depth 0: " in output and "DIFFERS" in output.split("depth 0: ")[1].splitlines()[0]


def test_the_same_nan_on_both_sides_is_no_difference_and_on_one_is():
    a = in_memory(np.float32([1, np.nan, np.inf]))
    assert difference(a, in_memory(np.float32([1, np.nan, np.inf])))[::2] == (0.0, True)
    largest, _, exact = difference(a, in_memory(np.float32([1, 2, np.inf])))
    assert np.isnan(largest) and not exact


def test_a_long_tensor_is_compared_to_its_end(monkeypatch):
    monkeypatch.setattr(lazy, "BLOCK_BYTES", 64)
    a = np.ones((50, 8), np.float32)
    for row in (0, 25, 49):
        b = a.copy()
        b[row, 3] = 1.5
        assert difference(lazy.in_memory(a), lazy.in_memory(b)) == (0.5, 1.0, False)
    assert difference(lazy.in_memory(a), lazy.in_memory(a.astype(np.float16))) == (0.0, 1.0, True)


def test_rounding_is_reported_and_tolerated_only_up_to_the_tolerance(tmp_path, folder, checkpoint, capsys):
    source = checkpoint(num_depths=1)
    assert run(source, "tensorrt-llm-medusa", tmp_path / "a", backbone=folder, verify=True) == 0
    captured = capsys.readouterr()
    assert "rounding to float16: at most" in captured.err and json.loads(captured.out.splitlines()[-1])["rounding"] > 0
    exact = load_file(source / "head.safetensors")["lm_heads.0.weight"]
    stored = load_file(tmp_path / "a" / "rank0.safetensors")["medusa_heads.0.lm_head.weight"]
    assert np.array_equal(stored, exact.astype(np.float16))
    assert run(source, "tensorrt-llm-medusa", tmp_path / "b", backbone=folder, verify=True, tolerance=1e-7) == 1
    assert run(source, "tensorrt-llm-medusa", tmp_path / "c", backbone=folder, dtype="float32", verify=True) == 0


def test_fields_of_a_published_config_survive_a_round_trip(tmp_path, folder):
    source = save_medusa(tmp_path / "medusa", medusa_heads(2, 1), note="kept", torch_dtype="float32")
    assert run(source, "gorgon", tmp_path / "ours", backbone=folder) == 0
    assert run(tmp_path / "ours", "medusa", tmp_path / "back", backbone=folder) == 0
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["note"] == "kept" and back["base_model_name_or_path"] == "lmsys/vicuna-7b-v1.3"
    first, second = (read_folder(place, "medusa_lm_head.pt") for place in (source, tmp_path / "back"))
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_vllm_files_without_biases_or_with_a_prefix_are_read(tmp_path, folder, small, checkpoint, capsys):
    assert run(checkpoint(num_depths=2), "vllm-medusa", tmp_path / "a", backbone=folder) == 0
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architectures"] == ["MedusaModel"] and config["medusa_fc_bias"] is True
    unbiased = {f"medusa_heads.{name}": tensor for name, tensor in tensors.items() if not name.endswith(".bias")}
    save_file(unbiased, str(tmp_path / "a" / "model.safetensors"))
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "medusa_fc_bias": False}))
    assert run(tmp_path / "a", "gorgon", tmp_path / "b", backbone=folder, verify=True) == 0
    assert "(computed)" in capsys.readouterr().out
    parameters = dict(load_head(tmp_path / "b", small)[0].named_parameters())
    assert not parameters["blocks.0.0.linear.bias"].numpy().any()
    assert np.array_equal(parameters["lm_heads.1.weight"].numpy(), tensors["lm_heads.1.weight"])


def test_a_token_map_of_the_complete_vocabulary_is_ignored_as_in_vllm(tmp_path, folder, checkpoint):
    assert run(checkpoint(num_depths=1), "vllm-medusa", tmp_path / "a", backbone=folder) == 0
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    save_file({**tensors, "token_map": np.arange(VOCAB)[::-1].copy()}, str(tmp_path / "a" / "model.safetensors"))
    assert run(tmp_path / "a", "gorgon", tmp_path / "b", backbone=folder, verify=True) == 0


def test_in_a_folder_with_both_files_the_safetensors_are_read(tmp_path, folder, small, capsys):
    for seed, place in ((0, "a"), (1, "b")):
        save_medusa(tmp_path / place, medusa_heads(1, 1, seed=seed))
    assert (
        run(tmp_path / "a", "medusa", tmp_path / "b" / "medusa_lm_head.safetensors", backbone=folder, overwrite=True)
        == 0
    )
    torch.save(medusa_heads(1, 1, seed=1).state_dict(), tmp_path / "b" / "medusa_lm_head.pt")
    assert run(tmp_path / "b", "gorgon", tmp_path / "ours", backbone=folder) == 0
    assert "medusa_lm_head.pt beside medusa_lm_head.safetensors was not read" in capsys.readouterr().err
    hidden = hidden_states()
    assert near(logits_of(load_head(tmp_path / "ours", small)[0], hidden), torch_logits(medusa_heads(1, 1), hidden))


def test_a_checkpoint_records_that_its_weights_were_stored_in_16_bits(tmp_path, folder, checkpoint):
    assert run(checkpoint(num_depths=1), "npz", tmp_path / "a.npz", backbone=folder, dtype="float16") == 0
    assert run(tmp_path / "a.npz", "gorgon", tmp_path / "b", backbone=folder) == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["imported"] == {"format": "npz", "stored_as": ["float16"]}


def test_every_format_has_a_sentence_and_other_files_have_no_format(tmp_path, folder):
    assert all(sentence and "\n" not in sentence for sentence in FORMATS.values())
    assert recognize(folder) is None and recognize(tmp_path) is None and recognize(tmp_path / "nowhere") is None
