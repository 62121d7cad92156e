"""What every head promises, for every head there is: one recurrence, gradients, checkpoints, and that it can learn."""

import dataclasses
import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from heads.base import Features, Projection
from heads.checkpoint import find_checkpoint, latest_checkpoints, load_head, save_checkpoint, weights_sha256
from heads.registry import available, build, head_class, make_config
from ops.training import cross_entropy
from runtime import jt
from trainer.config import TrainConfig
from trainer.data.tokens import TokenizedData
from trainer.features.cache import OnlineFeatures
from trainer.loss import head_loss, make_batch
from trainer.optim.optimizer import make_optimizer

NAMES = available()
# Options that keep a head small, where it has them.
SMALL = {"num_depths": 3, "inner_size": 24, "hidden_size": 24, "rank": 4, "num_experts": 3, "adapter_rank": 4}
SEQ, DEPTHS = 9, 3


def small_options(name):
    """Those of SMALL that this head knows."""
    known = {field.name for field in dataclasses.fields(head_class(name).Config)}
    return {key: value for key, value in SMALL.items() if key in known}


# Options that make another network of a head; every head is also tested as it comes.
VARIANTS = [
    ("eagle", {"attention_norm": False}),
    ("eagle3", {"token_residual": True}),
    ("gated_rnn", {"cell": "gru"}),
    ("hydra", {"lm_head": "low_rank", "num_layers": 2}),
    ("hydra", {"prefix_layer": True}),
    ("hydra", {"token_norm": False}),
    ("mlp", {"lm_head": "low_rank", "num_layers": 2}),
    ("moe", {"lm_head": "shared", "top_k": 1}),
    ("redrafter", {"lm_head": "shared"}),
]
CASES = [pytest.param((name, {}), id=name) for name in NAMES]
CASES += [pytest.param((n, o), id="-".join([n, *(f"{k}={v}" for k, v in o.items())])) for n, o in VARIANTS]


@pytest.fixture(params=CASES)
def head(request, random_head):
    name, options = request.param
    made = random_head(name, **{**small_options(name), **options})
    assert made.num_depths == DEPTHS
    return made


@pytest.fixture(scope="module")
def token_ids():
    """Drawn from a few tokens, so that they repeat: some heads look for what they have seen."""
    return np.random.default_rng(1).integers(3, 8, (2, SEQ + DEPTHS)).astype(np.int32)


def features_of(backbone, head, token_ids):
    output = backbone.forward(token_ids[:, :SEQ], layers=head.layers)
    return Features(output.hidden, output.layers)


def drafting_features(head, token_ids):
    """What a draft gets to see: of a head that changes its backbone, the changed one's features."""
    return features_of(head.decoding_backbone, head, token_ids)


def rows_of(features, batch, first, last):
    """The features of some rows of one sequence, as a draft gets them: (1, rows, dim)."""
    layers = {index: layer[batch : batch + 1, first:last] for index, layer in features.layers.items()}
    return Features(features.hidden[batch : batch + 1, first:last], layers)


def begun(head, features, token_ids, batch, t, cuts=()):
    """The state after rows 0 to t of one sequence, given at once or in parts."""
    state, edges = None, [0, *cuts, t + 1]
    for first, last in pairwise(edges):
        following = jt.array(token_ids[batch : batch + 1, first + 1 : last + 1])
        state = head.begin(rows_of(features, batch, first, last), following, state)
    return state


def drafted(head, state, tokens):
    """Logits (depth, vocab) of a chain that is told these tokens one after another."""
    logits, root = [], jt.array(np.zeros(1, np.int32))
    for token in tokens:
        scores, state = head.step(state, jt.array(np.array([token], np.int32)), root)
        assert tuple(scores.shape) == (1, head.vocab_size)
        logits.append(scores.numpy()[0])
    return np.stack(logits)


def every_logit(output):
    """The logits of every depth as Vars."""
    return [each.value() if isinstance(each, Projection) else each for each in output.logits]


def teacher_forced(head, features, token_ids):
    """Logits (depth, batch, seq, vocab) of execute at every position."""
    output = head(features, token_ids, np.arange(2 * SEQ, dtype=np.int32))
    return np.stack([logits.numpy() for logits in every_logit(output)]).reshape(DEPTHS, 2, SEQ, -1)


def tolerance(logits):
    """float32 rounding of a few products in a row, for logits of this size."""
    return 1e-5 * max(1.0, float(np.abs(logits).max()))


def test_execute_gives_logits_for_the_wanted_positions_and_scalar_extras(head, backbone, token_ids):
    features = features_of(backbone, head, token_ids)
    head.train()
    everything = teacher_forced(head, features, token_ids).reshape(DEPTHS, 2 * SEQ, -1)
    positions = np.array([1, 4, SEQ, 2 * SEQ - 1], np.int32)
    output = head(features, token_ids, positions)
    assert len(output.logits) == head.num_depths
    for depth, logits in enumerate(every_logit(output)):
        assert tuple(logits.shape) == (4, 64) and logits.dtype == "float32"
        np.testing.assert_allclose(logits.numpy(), everything[depth, positions], atol=tolerance(everything))
        # Control: the position beside it has other logits.
        assert np.abs(logits.numpy() - everything[depth, positions - 1]).max() > 100 * tolerance(everything)
    for term in output.aux.values():
        assert int(term.numel()) == 1 and np.isfinite(term.item())


@pytest.mark.parametrize("training", [True, False])
def test_step_along_the_true_tokens_equals_execute(head, backbone, token_ids, training):
    features = features_of(backbone, head, token_ids)
    head.train() if training else head.eval()
    expected = teacher_forced(head, features, token_ids)
    head.eval()
    for batch, t, cuts in [(0, 0, ()), (0, 5, ()), (1, SEQ - 1, (3, 4)), (1, 3, (1,))]:
        state = begun(head, drafting_features(head, token_ids), token_ids, batch, t, cuts)
        logits = drafted(head, state, token_ids[batch, t + 1 : t + 1 + DEPTHS])
        assert np.abs(logits - expected[:, batch, t]).max() < tolerance(expected), (batch, t, cuts)


def test_the_comparison_notices_shifted_tokens_or_swapped_depths(head, backbone, token_ids):
    features = features_of(backbone, head, token_ids)
    head.eval()
    expected = teacher_forced(head, features, token_ids)[:, 0, 5]
    state = begun(head, features, token_ids, 0, 5)
    if head.parallel:
        wrong = drafted(head, state, token_ids[0, 6 : 6 + DEPTHS])[::-1]
    else:
        wrong = drafted(head, state, token_ids[0, 5 : 5 + DEPTHS])
    assert np.abs(wrong - expected).max() > 100 * tolerance(expected)


def test_the_comparison_notices_features_of_another_row(head, backbone, token_ids):
    features = features_of(backbone, head, token_ids)
    head.eval()
    expected = teacher_forced(head, features, token_ids)[:, 0, 5]
    late = drafted(head, begun(head, features, token_ids, 0, 4), token_ids[0, 6 : 6 + DEPTHS])
    assert np.abs(late - expected).max() > 100 * tolerance(expected)


def test_a_parallel_head_scores_all_depths_as_its_steps_do(head, backbone, token_ids):
    features = features_of(backbone, head, token_ids)
    head.eval()
    state = begun(head, features, token_ids, 0, 5)
    if not head.parallel:
        with pytest.raises(TypeError, match="does not define score_depths"):
            head.score_depths(state, DEPTHS)
        return
    stepped = drafted(head, state, [7] * DEPTHS)  # told nothing that matters
    for depths in range(1, DEPTHS + 1):
        scored = head.score_depths(state, depths).numpy()
        assert scored.shape == stepped[:depths].shape
        assert np.abs(scored - stepped[:depths]).max() < tolerance(stepped)


def test_parents_say_whose_state_a_node_goes_on_from(head, backbone, token_ids):
    features = features_of(backbone, head, token_ids)
    head.eval()
    start = begun(head, features, token_ids, 1, 6)
    root = int(token_ids[1, 7])
    scores, state = head.step(start, jt.array(np.array([root], np.int32)), jt.array(np.zeros(1, np.int32)))
    first = [11, 12, 13]
    scores, state = head.step(state, jt.array(np.array(first, np.int32)), jt.array(np.zeros(3, np.int32)))
    parents, second = [2, 0, 1, 0], [13, 22, 23, 24]  # node 0 repeats its parent
    scores, state = head.step(state, jt.array(np.array(second, np.int32)), jt.array(np.array(parents, np.int32)))
    assert tuple(scores.shape) == (4, 64)
    scores = scores.numpy()
    for node, parent in enumerate(parents):
        alone = drafted(head, start, [root, first[parent], second[node]])[-1]
        assert np.abs(scores[node] - alone).max() < tolerance(scores), node
    if not head.parallel:
        wrong = drafted(head, start, [root, first[0], second[0]])[-1]
        assert np.abs(scores[0] - wrong).max() > 100 * tolerance(scores)


def skip_without_parameters(head, reason):
    """Skip for a head that says it has none; saying so and having some is a mistake."""
    if not head.trained:
        assert head.num_parameters == 0, "trained = False, yet there are parameters"
        pytest.skip(f"a head without parameters {reason}")


def check_gradients(head, backbone, token_ids):
    """A finite gradient that is not zero for every parameter; none of them is the backbone's."""
    features = features_of(backbone, head, token_ids)
    head.train()
    output = head(features, token_ids, np.arange(2 * SEQ, dtype=np.int32))
    weights = np.random.default_rng(0).standard_normal((2 * SEQ, 64)).astype(np.float32)
    loss = sum((logits * jt.array(weights)).sum() for logits in every_logit(output)) + sum(output.aux.values())
    names, parameters = zip(*head.named_parameters(), strict=True)
    for borrowed in (backbone.embedding, backbone.norm, backbone.lm_head_weight):
        assert borrowed.is_stop_grad() and all(p is not borrowed for p in parameters), "a backbone weight is trained"
    for name, grad in zip(names, jt.grad(loss, list(parameters)), strict=True):
        values = grad.numpy()
        assert np.isfinite(values).all() and np.abs(values).max() > 0, f"no gradient reaches {name}"
    assert sum(int(p.numel()) for p in parameters) == head.num_parameters > 0
    assert all(p.dtype == "float32" for p in parameters)


def test_gradients_reach_every_parameter_and_no_backbone_weight(head, backbone, token_ids):
    skip_without_parameters(head, "gets no gradients")
    check_gradients(head, backbone, token_ids)


def test_the_check_of_gradients_notices_an_idle_parameter_and_a_borrowed_one(random_head, backbone, token_ids):
    head = random_head("mlp", num_depths=DEPTHS)
    head.idle = jt.ones((3,))
    with pytest.raises(AssertionError, match="no gradient reaches idle"):
        check_gradients(head, backbone, token_ids)
    head.idle = backbone.lm_head_weight
    with pytest.raises(AssertionError, match="a backbone weight is trained"):
        check_gradients(head, backbone, token_ids)


def tiny_data(count=3, length=14, seed=2):
    random = np.random.default_rng(seed)
    talks = [(random.integers(3, 64, length), np.arange(length) > 2) for _ in range(count)]
    return TokenizedData.of(talks)


def loss_of_all_logits(head, batch):
    """The equation of the loss, with all logits at hand."""
    output, total = head(batch.features, batch.token_ids, batch.positions), 0
    for logits, labels in zip(every_logit(output), batch.labels, strict=True):
        losses, _ = cross_entropy(logits, jt.array(labels))
        total = total + losses.sum() / float((labels >= 0).sum()) / head.num_depths
    return total + sum(output.aux.values())


def test_the_loss_and_its_gradients_are_those_of_all_logits(head, backbone):
    skip_without_parameters(head, "gets no gradients")
    data = tiny_data()
    batch = make_batch(data, range(len(data)), OnlineFeatures(backbone, data, head.layers), head.num_depths)
    head.train()
    parameters = list(head.trainable().values())
    found, expected = (
        [each.numpy() for each in (loss, *jt.grad(loss, parameters))]
        for loss in (head_loss(head, batch, 1.0).total, loss_of_all_logits(head, batch))
    )
    for name, one, other in zip(["loss", *head.trainable()], found, expected, strict=True):
        # float32 rounding of two ways through the same products.
        np.testing.assert_allclose(one, other, atol=2e-5 * max(0.01, np.abs(other).max()), err_msg=name)


def test_held_out_text_ranks_a_token_where_the_draft_ranks_it(head, backbone):
    data = tiny_data(count=1)
    tokens = data.token_ids[None]
    head.eval()
    batch = make_batch(data, [0], OnlineFeatures(backbone, data, head.layers), DEPTHS)
    ranks = np.stack([rank.numpy() for rank in head_loss(head, batch, 1.0).ranks])
    output = head.decoding_backbone.forward(tokens, layers=head.layers)
    features = Features(output.hidden, output.layers)
    expected = np.full(ranks.shape, -1)
    for column, t in enumerate(batch.positions.tolist()):
        told = np.append(tokens[0], [0] * DEPTHS)[t + 1 : t + 1 + DEPTHS]
        padded = np.append(tokens, np.zeros((1, DEPTHS), np.int32), 1)
        logits = drafted(head, begun(head, features, padded, 0, t), told)
        for depth, label in enumerate(batch.labels[:, column].tolist()):
            if label >= 0:
                expected[depth, column] = (logits[depth] > logits[depth][label]).sum()
    # Both multiply in one order, so not even close logits change places.
    np.testing.assert_array_equal(ranks, expected)
    assert (ranks != np.roll(expected, 1, 1)).any()


def check_learning(head, backbone, rate=1e-2):
    """The loss of one batch, seen again and again, falls below half."""
    data = tiny_data()
    batch = make_batch(data, range(len(data)), OnlineFeatures(backbone, data, head.layers), head.num_depths)
    head.train()
    config = TrainConfig(weight_decay=0.0)
    optimizer = make_optimizer(config, head.trainable(), dict.fromkeys(head.trainable(), 1.0))
    losses = []
    for _ in range(60):
        parts = head_loss(head, batch, 1.0)
        losses.append(float(parts.total.item()))
        optimizer.update(jt.grad(parts.total, list(optimizer.parameters.values())), rate)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] / 2, f"not learnt: {losses[0]} to {losses[-1]}"


def test_a_tiny_batch_is_learnt_by_heart(head, backbone):
    skip_without_parameters(head, "learns nothing")
    frozen = [v.numpy().copy() for v in (backbone.embedding, backbone.lm_head_weight, backbone.norm)]
    check_learning(head, backbone)
    for before, now in zip(frozen, (backbone.embedding, backbone.lm_head_weight, backbone.norm), strict=True):
        np.testing.assert_array_equal(before, now.numpy(), err_msg="the backbone was trained too")


def test_the_check_of_learning_notices_a_head_that_is_not_told_the_context(random_head, backbone):
    head = random_head("mlp", num_depths=DEPTHS)
    with pytest.raises(AssertionError, match="not learnt"):
        check_learning(head, backbone, rate=0.0)
    head.select = lambda hidden, positions: jt.zeros((len(positions), head.dim))
    with pytest.raises(AssertionError, match="not learnt"):
        check_learning(head, backbone)


# Checkpoints


def checkpoint_config(head, name, backbone):
    return {
        "head": name,
        "head_config": vars(head.config),
        "backbone": {"fingerprint": backbone.fingerprint, "path": None},
    }


@pytest.fixture(params=NAMES)
def saved(request, random_head, backbone, tmp_path):
    """(head, its checkpoint's directory)."""
    head = random_head(request.param, **small_options(request.param))
    directory = tmp_path / request.param / "run" / "checkpoint"
    save_checkpoint(directory, head, checkpoint_config(head, request.param, backbone), {"utc": "now"})
    return head, directory


def test_a_saved_head_comes_back_bit_for_bit(saved, backbone, token_ids):
    head, directory = saved
    loaded, config = load_head(directory.parent, backbone)  # the run's directory will do
    assert config["head_config"] == vars(head.config) and vars(loaded.config) == vars(head.config)
    own, other = dict(head.named_parameters()), dict(loaded.named_parameters())
    assert own.keys() == other.keys()
    for name in own:
        np.testing.assert_array_equal(own[name].numpy(), other[name].numpy(), err_msg=name)
    features = features_of(backbone, head, token_ids)
    head.eval()
    expected = teacher_forced(head, features, token_ids)
    assert not loaded.is_training()
    np.testing.assert_array_equal(teacher_forced(loaded, features, token_ids), expected)
    if not own:
        return
    # Control: the last bit of one number makes two heads differ.
    parameter = own[min(own)]
    parameter.update(np.nextafter(parameter.numpy(), np.inf, dtype=np.float32))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(parameter.numpy(), other[min(own)].numpy())


def test_saving_again_replaces_the_checkpoint_and_leaves_nothing_beside_it(saved, backbone):
    head, directory = saved
    skip_without_parameters(head, "saves the same file again")
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


def test_a_checkpoint_of_another_backbone_is_refused(saved):
    _, directory = saved
    other = SimpleNamespace(fingerprint="0123456789abcdef", path="elsewhere")
    with pytest.raises(ValueError, match=r"was trained on backbone .*, this is 0123456789abcdef \(elsewhere\)"):
        load_head(directory, other)


def test_parameters_that_do_not_fit_are_each_named(saved, backbone):
    head, directory = saved
    skip_without_parameters(head, "has none that could be missing or misshapen")
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
    skip_without_parameters(head, "has none that could be of another type")
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
def test_a_config_that_is_not_ours_is_named(backbone, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json (cannot be read|is not a head checkpoint)"):
        load_head(tmp_path, backbone)


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in"):
        find_checkpoint(tmp_path)
    assert latest_checkpoints(tmp_path / "nowhere") == {}


# The registry


def test_every_head_is_found_by_its_folder_and_explains_its_options():
    assert {"mlp", "gated_rnn"} <= set(NAMES)
    for name in NAMES:
        assert head_class(name).__doc__
        for field in dataclasses.fields(head_class(name).Config):
            assert field.metadata.get("help"), f"{name}.{field.name} has no sentence for --help"


def test_an_unknown_head_is_answered_with_the_nearest_one(backbone):
    with pytest.raises(ValueError, match=r"Unknown head 'gatedrnn'\. Did you mean 'gated_rnn'\? Available: .*mlp"):
        build("gatedrnn", {}, backbone)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_answered_with_the_nearest_one(name, backbone):
    with pytest.raises(ValueError, match=r"'num_depth'.* Did you mean 'num_depths'"):
        build(name, {"num_depth": 2}, backbone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["3", 2.5, None, True])
def test_an_option_of_another_type_is_refused(name, value):
    with pytest.raises(ValueError, match=r"--head\.num_depths takes int"):
        make_config(name, {"num_depths": value})


@pytest.mark.parametrize("name", NAMES)
def test_a_head_without_depths_is_refused(name, backbone):
    with pytest.raises(ValueError, match="at least one token, got num_depths=0"):
        build(name, {"num_depths": 0}, backbone)
