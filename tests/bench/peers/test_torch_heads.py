"""Heads and steps in PyTorch compute the losses, gradients, updates and features of ours."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbone.tokenizer import EMBEDDED
from bench.peers.torch_heads import HEADS, Padding, build_head, collate
from bench.peers.torch_trainer import ADAMW, CachedFeatures, OnlineFeatures, TorchTrainer, unpadded_attention
from heads.base import Features
from heads.registry import build
from runtime import jt
from tests.small import small_backbone
from trainer.config import TrainConfig
from trainer.data.tokens import TokenizedData, batches
from trainer.features import shards
from trainer.features.cache import backbone_features, open_cache
from trainer.fit import stage_optimizer
from trainer.loss import Objective
from trainer.step import gradients

RELATIVE = 1e-5  # of losses and gradients: both sum a few hundred float32 products, in different orders
LENGTHS = (9, 30, 5, 17, 2, 12)  # one too short to carry a label at any depth
SCALE = 0.3  # of the parameters: large enough that every one of them matters


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(1)
    return TokenizedData.of((random.integers(3, 64, n), random.random(n) < 0.7) for n in LENGTHS)


@pytest.fixture(scope="module")
def hidden(data):
    return np.random.default_rng(2).standard_normal((int(data.offsets[-1]), 32), np.float32)


def rows_of(hidden, data, indices):
    return np.concatenate([hidden[data.offsets[i] : data.offsets[i + 1]] for i in indices])


def our_source(hidden, data):
    def source(indices):
        return Features(jt.array(rows_of(hidden, data, indices)[None]), {}, tuple(data.lengths[list(indices)].tolist()))

    return source


def their_source(hidden, data):
    return lambda batch, indices: torch.from_numpy(rows_of(hidden, data, indices))


def both_heads(name, backbone):
    """Our head with random parameters, and PyTorch's with the same ones."""
    ours, random = build(name, {}, backbone), np.random.default_rng(3)
    for parameter in ours.trainable().values():
        parameter.update(jt.array(random.standard_normal(tuple(parameter.shape)).astype(np.float32) * SCALE))
    ours.train()
    frozen = backbone.embedding.numpy().astype(np.float32), backbone.lm_head_weight.numpy()
    theirs = build_head(name, vars(ours.config), backbone.config, *frozen)
    theirs.load_state_dict({key: torch.from_numpy(p.numpy().copy()) for key, p in ours.trainable().items()})
    return ours, theirs


def config_of(name, **changes):
    return TrainConfig(head=name, loss="ce", max_steps=4, learning_rate=0.01, tokens_per_step=10_000, **changes)


def our_gradients(head, data, hidden, config):
    """(losses per depth, gradients by name) of all conversations, in the order of the first batch."""
    (indices,) = batches(data, config.tokens_per_step)
    parameters = head.trainable()
    source = our_source(hidden, data)
    grads, found, _ = gradients(head, list(parameters.values()), data, indices, source, config, Objective())
    return found.losses, dict(zip(parameters, (g.numpy() for g in grads), strict=True))


def their_gradients(head, data, hidden, config, batch=None, options=None):
    (indices,) = batches(data, config.tokens_per_step)
    batch = batch or collate(data, indices, head.num_depths)
    head.zero_grad()
    total, losses = head.loss(their_source(hidden, data)(batch, indices), batch, config.depth_weight, options)
    total.backward()
    return losses.tolist(), {name: p.grad.numpy().copy() for name, p in head.named_parameters()}


def apart(found, expected):
    """The largest difference of any gradient, as a share of the largest number in it."""
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in expected)


# The heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients_of_pytorch_are_ours(name, backbone, data, hidden):
    ours, theirs = both_heads(name, backbone)
    config = config_of(name)
    losses, grads = our_gradients(ours, data, hidden, config)
    for options in (None, torch.nn.LinearCrossEntropyOptions()):  # all logits at once, and in chunks
        found = their_gradients(theirs, data, hidden, config, options=options)
        np.testing.assert_allclose(found[0], losses, rtol=RELATIVE)
        assert apart(found[1], grads) < RELATIVE
    # The control: heads that read the token after the right one.
    (indices,) = batches(data, config.tokens_per_step)
    batch = collate(data, indices, theirs.num_depths)
    late = dataclasses.replace(batch, tokens=batch.tokens.roll(-1))
    wrong = their_gradients(theirs, data, hidden, config, late)
    if ours.parallel:  # it reads no token
        assert wrong[0] == pytest.approx(losses)
        wrong = their_gradients(theirs, data, hidden, config, dataclasses.replace(batch, positions=batch.positions - 1))
    assert not np.allclose(wrong[0], losses, rtol=100 * RELATIVE) and apart(wrong[1], grads) > 100 * RELATIVE


def test_a_draft_sees_the_features_of_its_conversation_up_to_itself(backbone, data, hidden):
    _, theirs = both_heads("eagle", backbone)
    (indices,) = batches(data, 10_000)
    batch = collate(data, indices, theirs.num_depths)
    rows = torch.from_numpy(rows_of(hidden, data, indices))
    chosen = int((batch.ends - batch.positions).argmax())  # early in the longest conversation
    with torch.no_grad():
        before = torch.stack(theirs.states(rows, batch)[0])
        position = int(batch.positions[chosen])
        changed = rows.clone()
        changed[position] += 1
        after = torch.stack(theirs.states(changed, batch)[0])
    moved = (before != after).any(-1)  # (depths, num)
    sees = (batch.positions >= position) & (batch.positions < int(batch.ends[chosen]))
    assert 5 < int(sees.sum()) < len(sees) - 5
    assert (moved == sees).all()


def test_options_that_are_not_written_in_pytorch_are_refused(backbone):
    options = {"num_depths": 2, "num_layers": 1, "lm_head": "shared"}
    with pytest.raises(ValueError, match=r"has no lm_head='shared', only lm_head='own'"):
        build_head("mlp", options, backbone.config, np.zeros((64, 32)), np.zeros((64, 32)))
    with pytest.raises(ValueError, match=r"Unknown head of the comparison 'mpl'. Did you mean 'mlp'"):
        build_head("mpl", options, backbone.config, np.zeros((64, 32)), np.zeros((64, 32)))


def test_rows_are_padded_and_come_back():
    padding = Padding(torch.tensor([2, 0, 3]))
    rows = torch.arange(1.0, 6.0)
    assert padding.pad(rows).tolist() == [[1, 2, 1], [1, 1, 1], [3, 4, 5]]  # filled up with the first row
    assert padding.unpad(padding.pad(rows)).tolist() == rows.tolist()


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_updates_of_pytorch_are_ours(name, backbone, data, hidden):
    """Three updates. AdamW divides by the size of the gradient, so a number whose gradient is near its eps of 1e-8 may
    go another way: the tolerance is on the norm of all that the updates changed."""

    def trained(form, **changes):
        theirs = both_heads(name, backbone)[1]
        trainer = TorchTrainer(config_of(name, **changes), theirs, data, their_source(hidden, data), form)
        for _ in range(3):
            tokens, losses = trainer.step()
        assert tokens == sum(LENGTHS) and len(losses) == theirs.num_depths
        return {key: p.detach().numpy() for key, p in theirs.named_parameters()}

    ours, config = both_heads(name, backbone)[0], config_of(name)
    before = {key: p.numpy().copy() for key, p in ours.trainable().items()}
    (stage,) = ours.stages()
    optimizer = stage_optimizer(config, ours, stage)
    rates = [0.01, 0.01 * (0.05 + 0.95 * 0.75), 0.01 * (0.05 + 0.95 * 0.25)]  # half a cosine over 4 steps, to 5%
    for rate in rates:
        grads = our_gradients(ours, data, hidden, config)[1]
        grads = [jt.array(grads[name]) for name in optimizer.parameters]
        assert optimizer.update(grads, rate) > config.clip
    expected = {key: p.numpy() for key, p in ours.trainable().items()}

    def distance(found, other):
        return np.sqrt(sum(float(((found[key] - other[key]) ** 2).sum()) for key in expected))

    changed = distance(before, expected)
    for form in ADAMW:
        assert distance(trained(form), expected) < 1e-3 * changed
    assert distance(trained("fused", weight_decay=0.0), expected) > 1e-2 * changed  # the controls: other updates show
    assert distance(trained("fused", schedule="constant"), expected) > 1e-2 * changed


# Features ------------------------------------------------------------------------------------------------------------


def test_the_hidden_states_of_transformers_are_ours():
    from backbone.model import load_backbone

    random = np.random.default_rng(0)
    data = TokenizedData.of((random.integers(3, 4096, n), np.ones(n, bool)) for n in (7, 40, 1, 23))
    order = [2, 0, 3, 1]
    ours = backbone_features(load_backbone(dtype="float32"), data, order, ()).hidden.numpy()[0]
    source = OnlineFeatures(EMBEDDED)
    theirs = source(collate(data, order, 2), order).numpy()
    assert np.abs(theirs - ours).max() < 1e-4  # the states spread by 1, over 6 layers
    merged = dataclasses.replace(data, offsets=data.offsets[[0, 4]], weights=None)  # the control: one conversation
    assert np.abs(source(collate(merged, [0], 2), [0]).numpy() - theirs).max() > 0.1


def test_unpadded_attention_serves_grouped_queries():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    lengths = [4, 5]
    found, weights = unpadded_attention(None, q, k, v, None, Padding(torch.tensor(lengths)), scaling=0.5)
    assert weights is None
    parts = []
    for one in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True):
        scores = one[0] @ one[1].repeat_interleave(2, 1).transpose(2, 3) * 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -torch.inf)
        parts.append(F.softmax(scores, 3) @ one[2].repeat_interleave(2, 1))
    torch.testing.assert_close(found, torch.cat(parts, 2).transpose(1, 2))


def test_pytorch_reads_the_feature_cache_as_we_do(backbone, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 25)
    ours = open_cache(backbone, "no tokenizer", data, (), tmp_path)
    store = ours.store
    assert store.num_shards > 2
    files = [(str(store.path(("hidden", i))), store.num_rows(i)) for i in range(store.num_shards)]
    theirs = CachedFeatures(files, backbone.config.hidden_size, data.offsets)
    for indices in ([5, 0, 3], [1], [4, 2]):
        found = theirs(None, indices)
        assert found.dtype == torch.float32
        assert (found.numpy() == ours(indices).hidden.numpy()[0]).all()
