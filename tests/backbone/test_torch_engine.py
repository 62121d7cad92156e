"""The torch engine computes what ours does, in every way that training and decoding ask for it."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from backbone import torch_engine
from backbone.engines import load_engine, prepare_engine
from backbone.model import load_backbone
from backbone.torch_engine import MOST_PADDING, PlanShape, TorchBackbone, similar
from decoding.generate import generate, generate_autoregressive
from decoding.tree import Tree, default_tree
from heads.checkpoint import load_head, save_checkpoint
from heads.registry import build
from ops.row_plan import RowPlan
from runtime import jt
from runtime.entry import run_entry
from tests.backbone.models import LLAMA_3_ROPE
from tests.backbone.passes import prefilled, rows, run_pass, tree_behind_a_prefix
from tests.small import draw_weights, path_to, save_hugging_face, small_config
from tests.trainer.runs import start
from trainer.data.tokens import TokenizedData
from trainer.features.cache import backbone_features

ROOT = Path(__file__).resolve().parents[2]
# Of the largest number: both sum float32 in another order, and 1e-6 was seen; the defects below give 1e-2 and more.
TOLERANCE = 1e-4
LLAMA_3 = {**LLAMA_3_ROPE, "original_max_position_embeddings": 64}
KINDS = {
    "grouped queries": {},
    "llama3 rope": {"rope_scaling": LLAMA_3},
    "mistral": {"model_type": "mistral"},
    "tied": {"tie_embeddings": True},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The small backbone on disk."""
    return save_hugging_face(tmp_path_factory.mktemp("small") / "model", small_config(), draw_weights(small_config()))


@pytest.fixture(scope="module")
def ours(directory):
    return load_backbone(directory, "float32")


@pytest.fixture(scope="module")
def theirs(directory):
    return TorchBackbone(directory, "float32")


def text(count, seed=0):
    """Random tokens, (1, count) int32."""
    return np.random.default_rng(seed).integers(0, 64, (1, count)).astype(np.int32)


def difference(a, b):
    """The largest, as a share of the largest number."""
    a, b = (each if isinstance(each, np.ndarray) else each.numpy() for each in (a, b))
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32, (a.shape, b.shape, a.dtype, b.dtype)
    return float(np.abs(a - b).max() / np.abs(b).max())


# What a pass computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_compute_the_same_and_give_the_weights_the_same_name(kind, tmp_path):
    config = small_config(**KINDS[kind])
    path = save_hugging_face(tmp_path / "model", config, draw_weights(config))
    own, other = load_engine("jittor", path, "float32"), load_engine("torch", path, "float32")
    assert own.fingerprint == other.fingerprint and own.config == other.config
    assert (own.storage, other.storage) == ("float32", "torch-float32")
    ids, layers = text(40), tuple(range(config.num_layers + 1))
    a, b = (each.forward(ids, layers=layers) for each in (own, other))
    assert difference(b.hidden, a.hidden) < TOLERANCE and difference(b.logits, a.logits) < TOLERANCE
    assert set(b.layers) == set(layers)
    for index in layers:
        assert difference(b.layers[index], a.layers[index]) < TOLERANCE, index
    np.testing.assert_array_equal(b.chosen.numpy(), a.chosen.numpy())
    assert b.chosen.numpy().dtype == np.int32


def test_the_comparison_notices_other_rotary_positions(tmp_path, ours):
    rope = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    other = TorchBackbone(
        save_hugging_face(tmp_path / "model", small_config(), draw_weights(small_config()), **rope), "float32"
    )
    ids = text(40)
    assert difference(other.forward(ids).logits, ours.forward(ids).logits) > 100 * TOLERANCE
    assert other.fingerprint != ours.fingerprint


def test_weights_in_float16_are_rounded_as_ours_and_multiplied_in_float32(directory, ours):
    own, other = load_backbone(directory, "float16"), TorchBackbone(directory, "float16")
    assert other.storage == "torch-float16" and other.fingerprint == own.fingerprint
    ids = text(40)
    exact, a, b = (each.forward(ids).logits for each in (ours, own, other))
    # What is left between them is our cache, which is float16 too: far less than rounding the weights makes.
    assert difference(b, a) < difference(a, exact) / 2
    matrix = other.model.model.layers[0].mlp.up_proj.weight.numpy()
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, matrix.astype(np.float16).astype(np.float32))


def test_what_heads_borrow_is_what_they_borrow_from_ours(ours, theirs):
    ids, hidden = np.array([3, 1, 60], np.int32), np.random.default_rng(0).standard_normal((3, 32), np.float32)
    np.testing.assert_array_equal(theirs.embed(jt.array(ids)).numpy(), ours.embed(jt.array(ids)).numpy())
    hidden = jt.array(hidden)
    np.testing.assert_array_equal(theirs.lm_logits(hidden).numpy(), ours.lm_logits(hidden).numpy())
    np.testing.assert_array_equal(theirs.lm_head_weight.numpy(), ours.lm_head_weight.numpy())
    for a, b in zip(theirs.rotary_tables(20), ours.rotary_tables(20), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_logits_come_for_all_rows_for_the_last_or_not_at_all(ours, theirs):
    ids = text(9)
    every, last, none = (theirs.forward(ids, logits=wanted) for wanted in ("all", "last", None))
    assert every.logits.shape == [1, 9, 64] and last.logits.shape == [1, 1, 64]
    assert none.logits is None and none.chosen is None
    assert difference(last.logits.numpy()[:, 0], every.logits.numpy()[:, -1]) < TOLERANCE
    assert int(last.chosen.numpy()[0, 0]) == int(every.chosen.numpy()[0, -1])
    packed = theirs.forward(ids, attend=RowPlan.sequences([4, 5]), logits="last").logits
    assert difference(packed, ours.forward(ids, attend=RowPlan.sequences([4, 5]), logits="last").logits) < TOLERANCE


# Trees and the cache --------------------------------------------------------------------------------------------------


def tree_error(backbone, seed):
    """The largest difference of a row of a random tree from its path run alone."""
    parents, base = tree_behind_a_prefix(seed)
    prefix, nodes = text(base, seed), text(len(parents), seed + 100)
    cache = prefilled(backbone, prefix)
    tree = run_pass(backbone, nodes, cache, parents)
    worst = 0.0
    for row in range(len(parents)):
        alone = rows(backbone.forward(np.concatenate([prefix, nodes[:, path_to(parents, row)]], 1)))
        worst = max(worst, *(difference(a[row : row + 1], b[-1:]) for a, b in zip(tree, alone, strict=True)))
    return worst


@pytest.mark.parametrize("seed", range(6))
def test_each_row_of_a_tree_is_its_path_run_alone(theirs, seed):
    assert tree_error(theirs, seed) < TOLERANCE


def test_a_mask_that_lets_siblings_see_each_other_is_noticed(theirs, monkeypatch):
    def causal(self):
        return torch.full((self.plan.num_rows, self.plan.num_rows), -65504.0).triu(1)

    monkeypatch.setattr(PlanShape, "among", property(causal))
    assert max(tree_error(theirs, seed) for seed in range(6)) > 100 * TOLERANCE


def test_the_mask_is_the_one_of_the_worked_example():
    shape = PlanShape(RowPlan([-1, 0, 0]))
    mask = shape.mask(1, torch.float32, "cpu").numpy()
    sees = [[True, True, False, False], [True, True, True, False], [True, True, False, True]]
    assert (mask == 0).tolist() == [[sees]]
    assert (mask[mask != 0] == -65504).all()


@pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 13, 2, 17]])
def test_cached_equals_uncached(theirs, chunks):
    ids, cache, parts = text(40), theirs.new_cache(40), []
    for count in chunks:
        parts.append(run_pass(theirs, ids[:, cache.length : cache.length + count], cache))
        cache.commit(np.arange(count))
    for got, want in zip(zip(*parts, strict=True), rows(theirs.forward(ids)), strict=True):
        assert difference(np.concatenate(got), want) < TOLERANCE


def test_continuing_after_a_commit_equals_running_the_text_from_scratch(theirs):
    parents = np.array([-1, 0, 0, 1, 2])
    prefix, nodes, more = text(6), text(5, 1), text(3, 2)
    expected = rows(theirs.forward(np.concatenate([prefix, nodes[:, [0, 2, 4]], more], 1)))[0][-3:]
    for path, same in (([0, 2, 4], True), ([0, 1, 3], False), ([0, 1, 4], False), ([0, 2, 3], False)):
        cache = prefilled(theirs, prefix)
        run_pass(theirs, nodes, cache, parents)
        cache.commit(path)
        assert cache.length == 9 and cache.room == 55
        assert (difference(run_pass(theirs, more, cache)[0], expected) < TOLERANCE) == same, path
    for length in (6, 0):  # without a commit, what ran before is dropped
        cache.rewind(length)
        expected = rows(theirs.forward(np.concatenate([prefix[:, :length], more], 1)))[0][length:]
        assert difference(run_pass(theirs, more, cache)[0], expected) < TOLERANCE


# Features -------------------------------------------------------------------------------------------------------------


def talks(lengths):
    ids = [np.random.default_rng(n).integers(0, 64, n).astype(np.int32) for n in lengths]
    return TokenizedData.of((each, np.ones(len(each), bool)) for each in ids)


def test_packed_sequences_have_the_features_that_each_has_alone(ours, theirs):
    data = talks([5, 30, 6, 1, 29, 6])
    packed = backbone_features(theirs, data, range(6), (0, 1))
    own = backbone_features(ours, data, range(6), (0, 1))
    assert packed.lengths == own.lengths and packed.hidden.shape == [1, 77, 32]
    assert difference(packed.hidden, own.hidden) < TOLERANCE
    start = 0
    for index, length in enumerate(packed.lengths):
        alone = backbone_features(theirs, data, [index], (0, 1))
        for got, want in ((packed.hidden, alone.hidden), *((packed.layers[i], alone.layers[i]) for i in (0, 1))):
            assert difference(got.numpy()[:, start : start + length], want) < TOLERANCE
        start += length
    # One sequence of them all: every one but the first would see those before it.
    joined = theirs.forward(data.token_ids[None], attend=RowPlan.chain(77), logits=None).hidden
    assert difference(joined, packed.hidden) > 100 * TOLERANCE


def test_a_batch_is_its_sequences(theirs):
    ids = np.concatenate([text(17, seed) for seed in range(3)])
    output = theirs.forward(ids, layers=(1,))
    assert output.logits.shape == [3, 17, 64]
    for row in range(3):
        alone = theirs.forward(ids[row : row + 1], layers=(1,))
        assert difference(output.logits.numpy()[row], alone.logits.numpy()[0]) < TOLERANCE
        assert difference(output.layers[1].numpy()[row], alone.layers[1].numpy()[0]) < TOLERANCE


def test_sequences_of_about_the_same_length_share_a_padded_batch():
    assert [group.tolist() for group in similar(np.array([10, 3, 9, 10]))] == [[0, 3, 2], [1]]
    lengths = np.random.default_rng(0).integers(1, 500, 60)
    groups = similar(lengths)
    assert sorted(np.concatenate(groups).tolist()) == list(range(60)) and len(groups) < 30
    assert all(lengths[g].max() * len(g) <= MOST_PADDING * lengths[g].sum() for g in groups)


def test_training_on_its_features_goes_as_on_ours(ours, theirs, tmp_path):
    losses = []
    for name, backbone in (("ours", ours), ("theirs", theirs)):
        result, _, records, _ = start(backbone, tmp_path / name, max_steps=6)
        losses.append([*(loss for record in records for loss in record["loss"]), *result.best.loss])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[0][0] > 1.2 * losses[0][-1]  # it learned something


# Decoding -------------------------------------------------------------------------------------------------------------


def random_head(name, backbone, **options):
    """Every parameter moved off its start, the same way for every backbone."""
    head = build(name, options, backbone)
    random = np.random.default_rng(0)
    for _, parameter in sorted(head.named_parameters()):
        start = parameter.numpy()
        noise = random.standard_normal(start.shape) * 0.5 / max(1, start.shape[-1]) ** 0.5
        parameter.update(jt.array((start + noise).astype(np.float32)))
    return head


@pytest.mark.parametrize("name", ["mlp", "gated_rnn", "eagle3", "prompt_lookup"])
def test_greedy_tree_decoding_equals_autoregressive_decoding_token_for_token(theirs, name):
    head = random_head(name, theirs, num_depths=3)
    found = []
    for seed in range(3):
        prompt = text(5, seed)[0]
        baseline = generate_autoregressive(theirs, prompt, max_new_tokens=40)
        found.append(generate(theirs, head, prompt, default_tree(12, 3), max_new_tokens=40))
        assert found[-1].token_ids == baseline.token_ids
    if name == "prompt_lookup":  # the small backbone soon repeats itself
        assert sum(each.num_passes for each in found) < 3 * 39


@pytest.mark.parametrize(("name", "first"), [("gated_rnn", "jittor"), ("eagle", "torch"), ("hydra", "torch")])
def test_a_checkpoint_of_one_engine_decodes_the_same_with_the_other(ours, theirs, tmp_path, name, first):
    backbones = {"jittor": ours, "torch": theirs}
    head = random_head(name, backbones[first], num_depths=3)
    used = {"fingerprint": backbones[first].fingerprint, "path": None}
    config = {"head": name, "head_config": dataclasses.asdict(head.config), "backbone": used}
    save_checkpoint(tmp_path / "checkpoint", head, config, {})
    given = {}
    for engine, backbone in backbones.items():
        loaded = load_head(tmp_path / "checkpoint", backbone)[0]
        texts = [generate(backbone, loaded, text(6, s)[0], default_tree(10, 3), max_new_tokens=30) for s in range(3)]
        given[engine] = [(each.token_ids, each.accepted_per_pass, each.accepted_by_depth) for each in texts]
    assert given["jittor"] == given["torch"]


def test_a_pass_hands_over_to_jittor_what_is_asked_for_alone(theirs, monkeypatch):
    copied, real = [], torch_engine.to_jittor
    monkeypatch.setattr(torch_engine, "to_jittor", lambda x: copied.append(tuple(x.shape)) or real(x))
    generate_autoregressive(theirs, text(5)[0], max_new_tokens=4)
    assert copied == []
    head = random_head("mlp", theirs, num_depths=2)
    generate(theirs, head, text(5)[0], Tree.chain(2), max_new_tokens=4)
    assert set(copied) == {(1, 5, 32), (1, 3, 32)}  # hidden states; no logits


# What is refused ------------------------------------------------------------------------------------------------------


def test_without_torch_there_is_one_clear_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_entry(lambda arguments: prepare_engine("torch"), []) == 2
    line = "--backbone-engine torch needs PyTorch: pip install -r requirements-torch.txt"
    assert capsys.readouterr().err == f"error: {line}\n"
    prepare_engine("jittor")  # which needs none


def test_without_bitsandbytes_8_and_4_bits_are_refused(directory, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else known(name))
    for bits in ({"load_in_8bit": True}, {"load_in_4bit": True}):
        with pytest.raises(ValueError, match=r"torch need bitsandbytes.*: pip install bitsandbytes"):
            TorchBackbone(directory, "float32", **bits)
    with pytest.raises(ValueError, match="exclude each other"):
        TorchBackbone(directory, "float32", load_in_8bit=True, load_in_4bit=True)


def test_what_cannot_be_served_is_refused_in_words(directory, ours, theirs, tmp_path):
    with pytest.raises(ValueError, match=r"Unknown --backbone-engine 'troch'\. Did you mean 'torch'\?"):
        load_engine("troch", directory)
    with pytest.raises(ValueError, match="dtype must be one of float16, float32"):
        TorchBackbone(directory, "bfloat16")
    with pytest.raises(ValueError, match="a head that adapts the backbone needs; use --backbone-engine jittor"):
        build("lora", {}, theirs)
    with pytest.raises(ValueError, match="a cache of its own, got a KVCache"):
        theirs.forward(text(3), cache=ours.new_cache(8))
    lanes = RowPlan.after([RowPlan.chain(2), RowPlan.chain(2)], [0, 8], [0, 0])
    with pytest.raises(ValueError, match=r"several texts in one cache \(--batch-size\) need --backbone-engine jittor"):
        theirs.forward(text(4), cache=theirs.new_cache(16), attend=lanes)
    with pytest.raises(ValueError, match="has layers 0 to 2, got"):
        theirs.forward(text(3), layers=(3,))
    with pytest.raises(ValueError, match="logits must be"):
        theirs.forward(text(3), logits="some")
    tensors = draw_weights(small_config())
    tensors["model.norm.weight"][0] = np.inf
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite in float32"):
        TorchBackbone(save_hugging_face(tmp_path / "infinite", small_config(), tensors), "float32")
    for name in ("params.json", "consolidated.00.pth"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"weight_convert\.py \S+ --to safetensors --out DIR"):
        TorchBackbone(tmp_path, "float32")
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight"):
        TorchBackbone(save_hugging_face(tmp_path / "incomplete", small_config(), tensors), "float32")


def test_an_entry_that_knows_its_engine_loads_torch_before_jittor():
    program = """
import os, sys
from trainer.config import parse
config = parse(["--head", "mlp", "--backbone-engine", "torch"])
names = list(sys.modules)
assert config.backbone_engine == "torch" and names.index("torch") < names.index("jittor")
import runtime
print(runtime.jt.array([2.0]).numpy()[0] + sys.modules["torch"].tensor([1.0]).item(), os.environ["GOMP_SPINCOUNT"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["3.0", "2000"], done.stderr
