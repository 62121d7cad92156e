"""EAGLE-3's files and those of speculators: the published layer in PyTorch gives our logits, in both directions."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from backbone.model import load_backbone
from heads.base import Features
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
    near,
    random_checkpoint,
    run,
    write_backbone,
)

LAYERS = (1, 3, 5)  # of six
DEPTHS, DRAFTED = 3, 20
FORMATS = {"eagle3": "pytorch_model.bin", "speculators": "model.safetensors"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A backbone with three different layers to fuse, on disk."""
    return write_backbone(tmp_path_factory.mktemp("deep") / "backbone", num_layers=6)


@pytest.fixture(scope="module")
def backbone(deep):
    return load_backbone(deep)


def our_checkpoint(folder, backbone, **options):
    """An eagle3 checkpoint that drafts some tokens that are not the first ones."""
    source = random_checkpoint(folder / "checkpoint", "eagle3", backbone, num_depths=DEPTHS, **options)
    counts = np.random.default_rng(5).permutation(VOCAB)
    return change_head(source, backbone, lambda head: head.choose_tokens(counts))


class Eagle3Model(EagleLayer):
    """EAGLE-3's network under the names of its files: a layer over [norm(e); norm(g)] whose residual is g."""

    def __init__(self, drafted: int):
        super().__init__()
        layer = self.layers[0]
        for name in "qkv":
            rows = getattr(layer.self_attn, f"{name}_proj").weight.shape[0]
            setattr(layer.self_attn, f"{name}_proj", torch.nn.Linear(2 * DIM, rows, bias=False))
        layer.input_layernorm, layer.hidden_norm, self.norm = (
            LlamaRMSNorm(DIM, self.llama.rms_norm_eps) for _ in range(3)
        )
        self.midlayer, self.fc = layer, torch.nn.Linear(3 * DIM, DIM, bias=False)
        self.lm_head = torch.nn.Linear(DIM, drafted, bias=False)
        del self.layers
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.eval()

    def forward(self, features, embedded):
        """features, embedded: (rows, dim) -> (rows, dim)."""
        layer, rows = self.midlayer, len(features)
        x = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(features)], 1)[None]
        mask = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
        tables = self.rotary(x, torch.arange(rows)[None])
        a = features + layer.self_attn(x, position_embeddings=tables, attention_mask=mask)[0][0]
        return a + layer.mlp(layer.post_attention_layernorm(a))

    def state(self):
        return {name: value for name, value in self.state_dict().items() if "rotary" not in name}


def inputs():
    """Hidden states by layer, (rows, dim) each, and the tokens around them."""
    layers = {index: hidden_states(seed=index) for index in LAYERS}
    return layers, np.random.default_rng(3).integers(0, VOCAB, ROWS + DEPTHS).astype(np.int32)


def ours(head, layers, tokens):
    features = Features(
        jt.array(hidden_states()[None]), {index: jt.array(each[None]) for index, each in layers.items()}
    )
    return [each.value().numpy() for each in head(features, tokens[None], np.arange(ROWS)).logits]


def theirs(model, layers, tokens, embedding):
    """The model as it drafts under the true tokens: after every row its own outputs replace features."""
    logits = [[] for _ in range(DEPTHS)]
    with torch.no_grad():
        fused = model.fc(torch.from_numpy(np.concatenate([layers[index] for index in LAYERS], 1)))
        for t in range(ROWS):
            features = fused[: t + 1]
            for depth in range(DEPTHS):
                y = model(features, torch.from_numpy(embedding[tokens[1 : len(features) + 1]]))[-1:]
                features = torch.cat([features, y])
                logits[depth].append(model.lm_head(model.norm(y)).numpy()[0])
    return [np.stack(rows) for rows in logits]


def embedding_of(folder):
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)


def tensors_of(folder):
    """The tensors of a written folder, as torch or safetensors reads them."""
    file = folder / FORMATS["eagle3"]
    if file.is_file():
        return {name: value.numpy() for name, value in torch.load(file, weights_only=True).items()}
    return load_file(folder / FORMATS["speculators"])


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("drafted", [0, DRAFTED])
def test_our_head_in_pytorch_gives_our_logits_and_comes_back(tmp_path, deep, backbone, to, drafted):
    source = our_checkpoint(tmp_path, backbone, draft_vocab_size=drafted)
    assert run(source, to, tmp_path / "out", backbone=deep, verify=True) == 0
    assert recognize(tmp_path / "out") == to
    head, state = load_head(source, backbone)[0], tensors_of(tmp_path / "out")
    d2t, t2d, embedding = state.pop("d2t", None), state.pop("t2d", None), state.pop("embed_tokens.weight", None)
    assert (embedding is not None) == (to == "speculators")
    model = Eagle3Model(drafted or VOCAB)
    renamed = {name.replace("layers.0.", "midlayer."): torch.from_numpy(each) for name, each in state.items()}
    missing, extra = model.load_state_dict(renamed, strict=False)
    assert not extra and all("rotary" in name for name in missing)
    layers, tokens = inputs()
    expected = theirs(model, layers, tokens, embedding_of(deep))
    assert near(ours(head, layers, tokens), expected)
    assert not near(ours(head, layers, np.roll(tokens, 1)), expected)  # the control: tokens one off
    if drafted:  # vLLM's arithmetic, and the mask of the drafted tokens
        assert d2t.dtype == np.int64 and np.array_equal(np.arange(drafted) + d2t, head.draft_vocab)
        assert t2d.dtype == bool and np.array_equal(np.flatnonzero(t2d), head.draft_vocab)
        assert d2t.any()  # the control: not the first tokens
    else:
        assert d2t is None and t2d is None
    assert run(tmp_path / "out", "gorgon", tmp_path / "back", backbone=deep, verify=True) == 0
    assert (tmp_path / "back" / "head.safetensors").read_bytes() == (source / "head.safetensors").read_bytes()


@pytest.mark.parametrize("defect", ["norms", "k and v", "order of layers"])
def test_a_part_in_the_wrong_place_does_not_give_the_logits(tmp_path, deep, backbone, defect):
    source = our_checkpoint(tmp_path, backbone)
    assert run(source, "speculators", tmp_path / "out", backbone=deep) == 0
    state = tensors_of(tmp_path / "out")
    del state["embed_tokens.weight"]
    layer = "layers.0."
    pairs = {"norms": ("input_layernorm", "hidden_norm"), "k and v": ("self_attn.k_proj", "self_attn.v_proj")}
    if defect in pairs:
        first, second = (f"{layer}{name}.weight" for name in pairs[defect])
        state[first], state[second] = state[second], state[first]
    else:
        state["fc.weight"] = np.roll(state["fc.weight"], DIM, 1)
    model = Eagle3Model(VOCAB)
    model.load_state_dict(
        {name.replace(layer, "midlayer."): torch.from_numpy(each) for name, each in state.items()}, strict=False
    )
    layers, tokens = inputs()
    head = load_head(source, backbone)[0]
    assert not near(ours(head, layers, tokens), theirs(model, layers, tokens, embedding_of(deep)))


def test_the_configs_say_what_vllm_asks_for(tmp_path, deep, backbone):
    source = our_checkpoint(tmp_path, backbone, draft_vocab_size=DRAFTED)
    for to in FORMATS:
        assert run(source, to, tmp_path / to, backbone=deep) == 0
    own, spec = config_of(tmp_path / "eagle3"), config_of(tmp_path / "speculators")
    assert own["architectures"] == ["LlamaForCausalLMEagle3"] and own["model_type"] == "llama"
    assert own["draft_vocab_size"] == spec["draft_vocab_size"] == DRAFTED and own["vocab_size"] == VOCAB
    assert own["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == list(LAYERS)
    assert spec["eagle_aux_hidden_state_layer_ids"] == list(LAYERS)
    assert spec["speculators_model_type"] == "eagle3" and spec["norm_before_residual"] is False
    method = spec["speculators_config"]["proposal_methods"][0]
    assert method["speculative_tokens"] == DEPTHS
    assert spec["speculators_config"]["verifier"]["name_or_path"] == str(deep)  # absolute
    layer = spec["transformer_layer_config"]
    for config in (own, layer):
        assert config["num_hidden_layers"] == 1 and config["hidden_size"] == DIM and config["num_key_value_heads"] == 2


def test_llama_3s_rotary_embedding_is_that_of_the_head(tmp_path, capsys):
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    folder = write_backbone(tmp_path / "backbone", num_layers=6, rope_scaling=scaling)
    source = our_checkpoint(tmp_path, load_backbone(folder))
    assert run(source, "eagle3", tmp_path / "out", backbone=folder, verify=True) == 0
    assert config_of(tmp_path / "out")["rope_scaling"] == scaling
    assert "EAGLE-3's own code refuses it" in capsys.readouterr().err
    change_config(tmp_path / "out", rope_scaling=None)  # the control
    with pytest.raises(ValueError, match=r"rope_scaling None .backbone: .*llama3"):
        run(tmp_path / "out", "gorgon", tmp_path / "back", backbone=folder)


@pytest.mark.parametrize("to", FORMATS)
def test_a_head_with_the_token_in_its_residual_is_refused_with_the_reason(tmp_path, deep, backbone, to):
    source = our_checkpoint(tmp_path, backbone, token_residual=True)
    with pytest.raises(ValueError, match=r"token_residual, residual.weight.*--head.token_residual false"):
        run(source, to, tmp_path / "out", backbone=deep)
    assert not (tmp_path / "out").exists()


def test_a_head_that_fuses_a_layer_twice_is_refused(tmp_path, folder, small):
    source = our_checkpoint(tmp_path, small)
    with pytest.raises(ValueError, match=r"fuses the layers \(1, 1, 1\)"):
        run(source, "eagle3", tmp_path / "out", backbone=folder)


def test_a_note_says_where_eagle_3s_own_code_fuses_other_layers(tmp_path, deep, backbone, capsys):
    source = our_checkpoint(tmp_path, backbone)
    assert run(source, "eagle3", tmp_path / "out", backbone=deep) == 0
    assert "EAGLE-3's own code fuses (2, 3, 3) of 6" in capsys.readouterr().err


@pytest.mark.parametrize(("to", "config", "words"), [
    ("eagle3", {"norm_before_residual": True}, "norm_before_residual true"),
    ("eagle3", {"norm_before_fc": True}, "norm_before_fc True"),
    ("eagle3", {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state False"),
    ("eagle3", {"eagle_config": None}, r"layers \[2, 3, 3\] .ours fuses \[1, 3, 5\]"),
    ("eagle3", {"target_hidden_size": 64}, "target_hidden_size 64"),
    ("eagle3", {"num_attention_heads": 2}, "num_heads 2 .backbone: 4"),
    ("eagle3", {"eagle_config": 3}, "eagle_config is 3, expected an object"),
    ("eagle3", {"eagle_aux_hidden_state_layer_ids": 3}, "layer_ids is 3, expected a list"),
    ("eagle3", {"eagle_aux_hidden_state_layer_ids": None, "use_aux_hidden_state": None}, None),
    ("speculators", {"norm_before_residual": None}, None),
    ("speculators", {"speculators_model_type": "peagle"}, "expected speculators_model_type eagle3 .* got peagle"),
    ("speculators", {"transformer_layer_config": None}, "config.json: expected .* got eagle3 and NoneType"),
    ("speculators", {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, r"layers \[1, 2, 3\]"),
])  # fmt: skip
def test_files_of_another_equation_are_refused(tmp_path, deep, backbone, to, config, words):
    assert run(our_checkpoint(tmp_path, backbone), to, tmp_path / "out", backbone=deep) == 0
    change_config(tmp_path / "out", **config)
    if words is None:  # a null decides nothing
        assert run(tmp_path / "out", "gorgon", tmp_path / "back", backbone=deep) == 0
        return
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "out", "gorgon", tmp_path / "back", backbone=deep)


def test_a_missing_norm_before_residual_means_true_in_speculators_files(tmp_path, deep, backbone):
    assert run(our_checkpoint(tmp_path, backbone), "speculators", tmp_path / "out", backbone=deep) == 0
    config = config_of(tmp_path / "out")
    del config["norm_before_residual"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="norm_before_residual true or missing"):
        run(tmp_path / "out", "gorgon", tmp_path / "back", backbone=deep)


def test_an_embedding_with_nan_is_not_the_backbones(tmp_path, deep, backbone):
    assert run(our_checkpoint(tmp_path, backbone), "speculators", tmp_path / "out", backbone=deep) == 0
    tensors = tensors_of(tmp_path / "out")
    tensors["embed_tokens.weight"][3, 1] = np.nan
    save_file(tensors, tmp_path / "out" / FORMATS["speculators"])
    with pytest.raises(ValueError, match=r"embed_tokens.weight is not that of the backbone .* largest difference nan"):
        run(tmp_path / "out", "gorgon", tmp_path / "back", backbone=deep)


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop("d2t"), "d2t is missing; its language-model head has 20 rows of 64"),
    (lambda t: t["d2t"].__setitem__(-1, VOCAB), "d2t does not give 20 tokens from 0 to 63"),
    (lambda t: t["t2d"].__setitem__(slice(None), False), "d2t and t2d name different tokens"),
    (lambda t: t.update(d2t=t["d2t"].astype(np.float32)), "d2t is float32"),
    (lambda t: t.pop("norm.weight"), "missing: norm.weight"),
    (lambda t: t.update({name: t[name][:0] for name in ("d2t", "lm_head.weight")}), "lm_head.weight has no rows"),
])  # fmt: skip
def test_a_damaged_draft_vocabulary_is_refused(tmp_path, deep, backbone, change, words):
    source = our_checkpoint(tmp_path, backbone, draft_vocab_size=DRAFTED)
    assert run(source, "eagle3", tmp_path / "out", backbone=deep) == 0
    tensors = {name: np.array(each) for name, each in tensors_of(tmp_path / "out").items()}
    change(tensors)
    torch.save({name: torch.from_numpy(each) for name, each in tensors.items()}, tmp_path / "out" / FORMATS["eagle3"])
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "out", "gorgon", tmp_path / "back", backbone=deep)
