"""The contract of heads, for every head that is found: one recurrence, gradients, and that it can learn."""

from itertools import pairwise

import numpy as np
import pytest

from heads.base import Features, Projection
from heads.registry import available
from ops.training import cross_entropy
from runtime import jt
from tests.heads.parity import DEPTHS, logits_of, small_options
from trainer.config import TrainConfig
from trainer.data.tokens import TokenizedData
from trainer.features.cache import OnlineFeatures
from trainer.loss import head_loss, make_batch
from trainer.optim.optimizer import AdamW

NAMES = available()
SEQ = 9

# Options that change the network of a head; every head is also tested with its defaults.
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
    """Drawn from a few tokens, so that they repeat: some heads look for repetitions."""
    return np.random.default_rng(1).integers(3, 8, (2, SEQ + DEPTHS)).astype(np.int32)


def features_of(backbone, head, token_ids):
    output = backbone.forward(token_ids[:, :SEQ], layers=head.layers)
    return Features(output.hidden, output.layers)


def drafting_features(head, token_ids):
    """The features that a draft reads; a head may change its backbone."""
    return features_of(head.decoding_backbone, head, token_ids)


def rows_of(features, batch, first, last):
    """The features of some rows of one sequence, (1, rows, dim), as ``begin`` reads them."""
    layers = {index: layer[batch : batch + 1, first:last] for index, layer in features.layers.items()}
    return Features(features.hidden[batch : batch + 1, first:last], layers)


def begun(head, features, token_ids, batch, t, cuts=()):
    """The state after rows 0 to t of one sequence, given at once or cut into parts."""
    state, edges = None, [0, *cuts, t + 1]
    for first, last in pairwise(edges):
        following = jt.array(token_ids[batch : batch + 1, first + 1 : last + 1])
        state = head.begin(rows_of(features, batch, first, last), following, state)
    return state


def drafted(head, state, tokens):
    """Logits (depth, vocab) of a chain of these tokens."""
    logits, root = [], jt.array(np.zeros(1, np.int32))
    for token in tokens:
        scores, state = head.step(state, jt.array(np.array([token], np.int32)), root)
        assert tuple(scores.shape) == (1, head.vocab_size)
        logits.append(scores.numpy()[0])
    return np.stack(logits)


def logit_vars(output):
    """The logits of every depth as Vars, for gradients."""
    return [each.value() if isinstance(each, Projection) else each for each in output.logits]


def teacher_forced(head, features, token_ids):
    """Logits (depth, batch, seq, vocab) of execute at every position."""
    output = head(features, token_ids, np.arange(2 * SEQ, dtype=np.int32))
    return np.stack(logits_of(output)).reshape(DEPTHS, 2, SEQ, -1)


def tolerance(logits):
    """float32 rounding of a few products in a row, for logits of this size."""
    return 1e-5 * max(1.0, float(np.abs(logits).max()))


def test_execute_gives_logits_at_the_positions_and_scalar_extras(head, backbone, token_ids):
    features = features_of(backbone, head, token_ids)
    head.train()
    everything = teacher_forced(head, features, token_ids).reshape(DEPTHS, 2 * SEQ, -1)
    positions = np.array([1, 4, SEQ, 2 * SEQ - 1], np.int32)
    output = head(features, token_ids, positions)
    assert len(output.logits) == head.num_depths
    for depth, logits in enumerate(logits_of(output)):
        assert logits.shape == (4, 64) and logits.dtype == np.float32
        np.testing.assert_allclose(logits, everything[depth, positions], atol=tolerance(everything))
        # Control: the position before it has other logits.
        assert np.abs(logits - everything[depth, positions - 1]).max() > 100 * tolerance(everything)
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
        pytest.skip("not a parallel head")
    stepped = drafted(head, state, [7] * DEPTHS)  # any tokens
    for depths in range(1, DEPTHS + 1):
        scored = head.score_depths(state, depths).numpy()
        assert scored.shape == stepped[:depths].shape
        assert np.abs(scored - stepped[:depths]).max() < tolerance(stepped)


def test_a_node_continues_the_state_of_its_parent(head, backbone, token_ids):
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
    """Skip for a head that is not trained, which must have no parameters."""
    if not head.trained:
        assert head.num_parameters == 0, "trained = False, but there are parameters"
        pytest.skip(f"a head without parameters {reason}")


def check_gradients(head, backbone, token_ids):
    """Every parameter has a finite gradient that is not zero, and none is the backbone's."""
    features = features_of(backbone, head, token_ids)
    head.train()
    output = head(features, token_ids, np.arange(2 * SEQ, dtype=np.int32))
    weights = np.random.default_rng(0).standard_normal((2 * SEQ, 64)).astype(np.float32)
    loss = sum((logits * jt.array(weights)).sum() for logits in logit_vars(output)) + sum(output.aux.values())
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
    """The equation of the loss, from all logits."""
    output, total = head(batch.features, batch.token_ids, batch.positions), 0
    for logits, labels in zip(logit_vars(output), batch.labels, strict=True):
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
        padded = np.append(tokens, np.zeros((1, DEPTHS), np.int32), 1)
        logits = drafted(head, begun(head, features, padded, 0, t), padded[0, t + 1 : t + 1 + DEPTHS])
        for depth, label in enumerate(batch.labels[:, column].tolist()):
            if label >= 0:
                expected[depth, column] = (logits[depth] > logits[depth][label]).sum()
    # Both multiply in the same order, so even close logits keep their ranks.
    np.testing.assert_array_equal(ranks, expected)
    assert (ranks != np.roll(expected, 1, 1)).any()


def check_learning(head, backbone, rate=1e-2):
    """The loss of one batch falls below half in sixty updates."""
    data = tiny_data()
    batch = make_batch(data, range(len(data)), OnlineFeatures(backbone, data, head.layers), head.num_depths)
    head.train()
    config = TrainConfig(weight_decay=0.0)
    optimizer = AdamW(config, head.trainable(), dict.fromkeys(head.trainable(), 1.0), ())
    losses = []
    for _ in range(60):
        parts = head_loss(head, batch, 1.0)
        losses.append(float(parts.total.item()))
        optimizer.update(jt.grad(parts.total, list(optimizer.parameters.values())), rate)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] / 2, f"not learned: {losses[0]} to {losses[-1]}"


def test_a_tiny_batch_is_learned_by_heart(head, backbone):
    skip_without_parameters(head, "learns nothing")
    frozen = [v.numpy().copy() for v in (backbone.embedding, backbone.lm_head_weight, backbone.norm)]
    check_learning(head, backbone)
    for before, now in zip(frozen, (backbone.embedding, backbone.lm_head_weight, backbone.norm), strict=True):
        np.testing.assert_array_equal(before, now.numpy(), err_msg="the backbone was trained too")


def test_the_check_of_learning_notices_a_head_that_does_not_read_the_context(random_head, backbone):
    head = random_head("mlp", num_depths=DEPTHS)
    with pytest.raises(AssertionError, match="not learned"):
        check_learning(head, backbone, rate=0.0)
    head.select = lambda hidden, positions: jt.zeros((len(positions), head.dim))
    with pytest.raises(AssertionError, match="not learned"):
        check_learning(head, backbone)
