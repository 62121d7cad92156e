"""Hydra's and EAGLE-1's files, for heads of ours without the norms that the published ones do not have."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from heads.checkpoint import load_head
from heads.formats import recognize
from runtime import jt
from tests.heads.formats.format_files import (
    DIM,
    ROWS,
    VOCAB,
    EagleLayer,
    change_head,
    hidden_states,
    logits_of,
    near,
    run,
)

DEPTHS = 2  # of Hydra
EAGLE_DEPTHS = 3  # that are compared; random weights amplify the rounding errors of the depths before


def token_ids(depths):
    return np.random.default_rng(3).integers(0, VOCAB, ROWS + depths).astype(np.int32)


# EAGLE-1 -------------------------------------------------------------------------------------------------------------


def save_eagle(folder, layer, embedding, **config):
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value for name, value in layer.state_dict().items() if "rotary" not in name}
    torch.save({"embed_tokens.weight": torch.from_numpy(embedding), **state}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**layer.config(), **config}))
    return folder


def eagle_logits(layer, hidden, tokens, embedding, lm_head):
    """EAGLE-1 as it drafts under the true tokens: after every row its own outputs replace features."""
    logits = [[] for _ in range(EAGLE_DEPTHS)]
    with torch.no_grad():
        for t in range(len(hidden)):
            features = torch.from_numpy(hidden[: t + 1])
            for depth in range(EAGLE_DEPTHS):
                embedded = torch.from_numpy(embedding[tokens[1 : len(features) + 1]])
                y = layer(features, embedded)[-1:]
                features = torch.cat([features, y])
                logits[depth].append((y.numpy() @ lm_head.T)[0])
    return [np.stack(rows) for rows in logits]


@pytest.fixture
def ends(folder):
    """The backbone's embedding and language-model head, (vocab, dim) float32 each."""
    tensors = load_file(folder / "model.safetensors")
    return tuple(tensors[name].astype(np.float32) for name in ("model.embed_tokens.weight", "lm_head.weight"))


def test_eagle_1_of_pytorch_gives_our_logits(tmp_path, folder, small, ends):
    layer = EagleLayer()
    source = save_eagle(tmp_path / "eagle", layer, ends[0])
    assert recognize(source) == "eagle"
    assert run(source, "gorgon", tmp_path / "ours", backbone=folder, verify=True) == 0
    head, _ = load_head(tmp_path / "ours", small)
    hidden, tokens = hidden_states(), token_ids(head.num_depths)
    ours = logits_of(head, hidden, tokens)[:EAGLE_DEPTHS]
    assert near(ours, eagle_logits(layer, hidden, tokens, *ends))
    assert not near(ours, eagle_logits(layer, hidden, np.roll(tokens, 1), *ends))  # the control: tokens one off


@pytest.mark.parametrize("defect", ["k and v", "gate and up", "feature and token"])
def test_a_part_in_the_wrong_place_does_not_give_the_logits(tmp_path, folder, small, ends, defect):
    layer = EagleLayer()
    hidden, tokens = hidden_states(), token_ids(6)
    expected = eagle_logits(layer, hidden, tokens, *ends)
    inner = layer.layers[0]
    with torch.no_grad():
        if defect == "feature and token":
            layer.fc.weight.copy_(layer.fc.weight.roll(DIM, 1))
        else:
            mlp, attention = inner.mlp, inner.self_attn
            pair = (attention.k_proj, attention.v_proj) if defect == "k and v" else (mlp.gate_proj, mlp.up_proj)
            first = pair[0].weight.clone()
            pair[0].weight.copy_(pair[1].weight)
            pair[1].weight.copy_(first)
    source = save_eagle(tmp_path / "eagle", layer, ends[0])
    assert run(source, "gorgon", tmp_path / "ours", backbone=folder) == 0
    assert not near(logits_of(load_head(tmp_path / "ours", small)[0], hidden, tokens)[:EAGLE_DEPTHS], expected)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_our_eagle_comes_back_from_its_files(tmp_path, folder, small, checkpoint, ends, file):
    source = checkpoint("eagle", attention_norm=False)
    assert run(source, "eagle", tmp_path / "eagle" / file, backbone=folder, verify=True) == 0
    assert run(tmp_path / "eagle", "gorgon", tmp_path / "back", backbone=folder, verify=True) == 0
    assert (tmp_path / "back" / "head.safetensors").read_bytes() == (source / "head.safetensors").read_bytes()
    if file.endswith(".bin"):  # its own code, and vLLM's: no bias, and the file's embedding
        config = json.loads((tmp_path / "eagle" / "config.json").read_text())
        layer, state = EagleLayer(1, config["bias"]), torch.load(tmp_path / "eagle" / file, weights_only=True)
        embedding = state.pop("embed_tokens.weight").numpy()
        layer.load_state_dict(state, strict=True)
        assert layer.fc.bias is None and np.ptp(embedding - ends[0], 0).max() < 1e-5  # one shift for every token
        hidden, tokens = hidden_states(), token_ids(6)
        ours = logits_of(load_head(source, small)[0], hidden, tokens)[:EAGLE_DEPTHS]
        assert near(ours, eagle_logits(layer, hidden, tokens, embedding, ends[1]))
        assert not near(ours, eagle_logits(layer, hidden, tokens, *ends))  # the control: the bias is lost


def with_zeros(source, backbone, name, columns=slice(None)):
    """The checkpoint with zeros in columns of a parameter."""

    def change(head):
        parameter = dict(head.named_parameters())[name]
        numbers = parameter.numpy().copy()
        numbers[..., columns] = 0
        parameter.update(jt.array(numbers))

    return change_head(source, backbone, change)


def test_a_head_without_a_bias_is_written_with_the_backbones_embedding(tmp_path, folder, small, checkpoint, ends):
    source = with_zeros(checkpoint("eagle", attention_norm=False), small, "join.bias")
    assert run(source, "eagle", tmp_path / "eagle", backbone=folder, verify=True) == 0
    state = torch.load(tmp_path / "eagle" / "pytorch_model.bin", weights_only=True)
    assert np.array_equal(state["embed_tokens.weight"].numpy(), ends[0]) and "fc.bias" not in state
    config = json.loads((tmp_path / "eagle" / "config.json").read_text())
    assert config["bias"] is False and "folded_fc_bias" not in config
    assert run(tmp_path / "eagle", "gorgon", tmp_path / "back", backbone=folder, verify=True) == 0
    assert (tmp_path / "back" / "head.safetensors").read_bytes() == (source / "head.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-12])  # the smaller ones drown in the rounding of the embedding
def test_a_bias_in_the_embedding_survives_16_bits(tmp_path, folder, small, checkpoint, dtype, size):
    def shrink(head):
        head.join.bias.update(jt.array(np.float32(size) * head.join.bias.numpy()))

    source = change_head(checkpoint("eagle", attention_norm=False), small, shrink)
    assert run(source, "eagle", tmp_path / "eagle", backbone=folder, dtype=dtype, verify=True) == 0
    assert run(tmp_path / "eagle", "gorgon", tmp_path / "back", backbone=folder) == 0
    bias, back = (load_file(place / "head.safetensors")["join.bias"] for place in (source, tmp_path / "back"))
    assert bias.any() and np.array_equal(bias, back)


@pytest.mark.parametrize(("rows", "shift", "bias", "words"), [
    (slice(3, 4), 0.5, None, "embed_tokens.weight is not that of the backbone .* plus a bias"),
    (slice(None), 0.5, None, "folded_fc_bias is not the bias that embed_tokens.weight carries"),
    (slice(None), 0.0, [0.5], "has 32 numbers"),
    (slice(None), 0.0, [True] * DIM, "has 32 numbers"),
    (slice(None), 0.0, [float(i) for i in range(DIM)], "folded_fc_bias is not the bias"),
])  # fmt: skip
def test_a_bias_that_the_embedding_does_not_carry_is_refused(tmp_path, folder, checkpoint, rows, shift, bias, words):
    assert run(checkpoint("eagle", attention_norm=False), "eagle", tmp_path / "eagle", backbone=folder) == 0
    file, place = tmp_path / "eagle" / "pytorch_model.bin", tmp_path / "eagle" / "config.json"
    state, config = torch.load(file, weights_only=True), json.loads(place.read_text())
    state["embed_tokens.weight"][rows] += shift
    torch.save(state, file)
    place.write_text(json.dumps({**config, "folded_fc_bias": bias or config["folded_fc_bias"]}))
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "eagle", "gorgon", tmp_path / "back", backbone=folder)


def test_a_bias_that_no_shift_of_the_embedding_gives_is_refused(tmp_path, folder, small, checkpoint):
    source = with_zeros(checkpoint("eagle", attention_norm=False), small, "join.weight", slice(DIM))
    with pytest.raises(ValueError, match=r"the bias of this head .* is outside what its join.weight makes"):
        run(source, "eagle", tmp_path / "eagle", backbone=folder)


@pytest.mark.parametrize(("config", "words"), [
    ({"rope_theta": 5000.0}, "rope_theta 5000.0 .backbone: 10000.0."),
    ({"num_attention_heads": 2, "num_key_value_heads": 2}, "num_heads 2 .backbone: 4."),
    ({"num_hidden_layers": 2}, "2 layers .ours has 1."),
    ({"qkv_bias": True}, "qkv_bias true"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 .backbone: 1e-06."),
    ({"bias": False}, "1 extra: fc.bias"),
])  # fmt: skip
def test_an_eagle_of_other_settings_is_refused_with_both(tmp_path, folder, ends, config, words):
    source = save_eagle(tmp_path / "eagle", EagleLayer(), ends[0], **config)
    with pytest.raises(ValueError, match=words):
        run(source, "gorgon", tmp_path / "out", backbone=folder)


def test_an_eagle_with_another_embedding_or_without_a_config_is_refused(tmp_path, folder, ends):
    source = save_eagle(tmp_path / "eagle", EagleLayer(), ends[0] + np.float32(0.5))
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight is not that of the backbone .* largest difference 0\.5"
    ):
        run(source, "gorgon", tmp_path / "out", backbone=folder)
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing; it has the number of attention heads"):
        run(source, "gorgon", tmp_path / "out", backbone=folder)


def test_an_eagle_head_of_ours_that_norms_attentions_input_is_not_written(tmp_path, folder, checkpoint):
    source = checkpoint("eagle")
    with pytest.raises(ValueError, match=r"norms attention's input .norm\.weight., EAGLE-1's layer does not"):
        run(source, "eagle", tmp_path / "out", backbone=folder)


# Hydra ---------------------------------------------------------------------------------------------------------------


class HydraBlock(torch.nn.Module):
    """R x + SiLU(L x), under the names of Hydra's files; R is the identity for a block that takes nothing in."""

    def __init__(self, conditions=0):
        super().__init__()
        self.linear = torch.nn.Linear(DIM * (conditions + 1), DIM)
        self.res_connection = torch.nn.Linear(DIM * (conditions + 1), DIM) if conditions else torch.nn.Identity()

    def forward(self, x):
        return self.res_connection(x) + torch.nn.functional.silu(self.linear(x))


class HydraHeads(torch.nn.Module):
    """Grounded mlp heads; the module that embeds tokens is saved with them."""

    def __init__(self, num_layers, embedding):
        super().__init__()
        torch.manual_seed(0)
        self.input_embed_fn = torch.nn.Embedding(VOCAB, DIM, _weight=torch.from_numpy(embedding))
        self.hydra_mlp = torch.nn.ModuleList(
            [
                torch.nn.Sequential(HydraBlock(i + 1), *[HydraBlock() for _ in range(num_layers - 1)])
                for i in range(DEPTHS)
            ]
        )
        self.hydra_lm_head = torch.nn.ModuleList([torch.nn.Linear(DIM, VOCAB) for _ in range(DEPTHS)])
        for linear in self.hydra_lm_head:
            torch.nn.init.zeros_(linear.bias)

    def forward(self, hidden, tokens):
        x, logits = hidden, []
        for i in range(DEPTHS):
            x = torch.cat([x, self.input_embed_fn(tokens[1 + i : 1 + i + len(hidden)])], 1)
            logits.append(self.hydra_lm_head[i](self.hydra_mlp[i](x)))
        return logits


def save_hydra(folder, heads, num_layers, **config):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(heads.state_dict(), folder / "hydra_lm_head.pt")
    fields = {"hydra_num_heads": DEPTHS, "hydra_num_layers": num_layers, "hydra_head_arch": "mlp",
            "grounded_heads": True, "hidden_state_offset": 0}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**fields, **config}))
    return folder


def hydra_logits(heads, hidden, tokens):
    with torch.no_grad():
        return [y.numpy() for y in heads(torch.from_numpy(hidden), torch.from_numpy(tokens.astype(np.int64)))]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_hydra_of_pytorch_gives_our_logits_in_both_directions(tmp_path, folder, small, ends, num_layers):
    heads = HydraHeads(num_layers, ends[0])
    source = save_hydra(tmp_path / "hydra", heads, num_layers)
    assert recognize(source) == "hydra"
    assert run(source, "gorgon", tmp_path / "ours", backbone=folder, verify=True) == 0
    head, config = load_head(tmp_path / "ours", small)
    assert (config["head_config"]["num_depths"], config["head_config"]["num_layers"]) == (DEPTHS, num_layers)
    hidden, tokens = hidden_states(), token_ids(DEPTHS)
    expected = hydra_logits(heads, hidden, tokens)
    assert near(logits_of(head, hidden, tokens), expected)
    assert not near(logits_of(head, hidden, np.roll(tokens, 1)), expected)  # the control: tokens one off
    assert run(tmp_path / "ours", "hydra", tmp_path / "back", backbone=folder, verify=True) == 0
    first, second = (torch.load(place / "hydra_lm_head.pt") for place in (source, tmp_path / "back"))
    assert second.keys() == first.keys() - {"input_embed_fn.weight"}
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_the_two_halves_of_hydras_first_block_are_distinguished(tmp_path, folder, small, ends):
    heads = HydraHeads(1, ends[0])
    hidden, tokens = hidden_states(), token_ids(DEPTHS)
    expected = hydra_logits(heads, hidden, tokens)
    first = heads.hydra_mlp[0][0]
    first.linear, first.res_connection = first.res_connection, first.linear
    source = save_hydra(tmp_path / "hydra", heads, 1)
    assert run(source, "gorgon", tmp_path / "ours", backbone=folder) == 0
    assert not near(logits_of(load_head(tmp_path / "ours", small)[0], hidden, tokens), expected)


@pytest.mark.parametrize(("config", "words"), [
    ({"hydra_head_arch": "prefix-mlp"}, "hydra_head_arch of config.json is prefix-mlp"),
    ({"grounded_heads": False}, "grounded_heads of config.json is False"),
    ({"hidden_state_offset": 1}, "hidden_state_offset of config.json is 1"),
])  # fmt: skip
def test_a_hydra_of_another_architecture_is_refused(tmp_path, folder, ends, config, words):
    source = save_hydra(tmp_path / "hydra", HydraHeads(1, ends[0]), 1, **config)
    with pytest.raises(ValueError, match=words):
        run(source, "gorgon", tmp_path / "out", backbone=folder)


def test_a_hydra_with_a_trained_bias_is_refused(tmp_path, folder, ends):
    heads = HydraHeads(1, ends[0])
    torch.nn.init.constant_(heads.hydra_lm_head[1].bias, 0.1)
    source = save_hydra(tmp_path / "hydra", heads, 1)
    with pytest.raises(ValueError, match=r"hydra_lm_head\.1\.bias is not zero; our language-model heads have no bias"):
        run(source, "gorgon", tmp_path / "out", backbone=folder)


@pytest.mark.parametrize(("options", "words"), [
    ({}, "norms the embeddings .token_norm.weight."),
    ({"token_norm": False, "prefix_layer": True}, "Hydra's mlp heads have no prefix layer"),
    ({"token_norm": False, "lm_head": "shared"}, "lm_head is shared; pass --merge"),
    ({"token_norm": False, "num_layers": 3}, r"repeats one residual block, but blocks\.0\.2\.linear\.weight"),
])  # fmt: skip
def test_a_hydra_head_that_the_format_cannot_hold_is_refused(tmp_path, folder, checkpoint, options, words):
    source = checkpoint("hydra", num_depths=DEPTHS, **options)
    with pytest.raises(ValueError, match=words):
        run(source, "hydra", tmp_path / "out", backbone=folder)
