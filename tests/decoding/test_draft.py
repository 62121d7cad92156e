"""A drafted tree holds, at every node, the head's guess of that rank after the node's own path."""

from types import SimpleNamespace

import numpy as np
import pytest

from decoding.draft import DraftPlan, draft, draft_plan
from decoding.tree import Tree
from heads.base import Features
from runtime import jt

FOUR = Tree.from_paths([[0], [1], [1, 0]])


@pytest.fixture(autouse=True)
def no_gradients():
    with jt.no_grad():
        yield


def begun(head, prompt, continuation):
    """The head's state for a draft right after the prompt. Fake heads do not read features."""
    features = Features(jt.zeros((1, len(prompt), head.dim)))
    following = np.array([[*prompt[1:], continuation[0]]], np.int32)
    return head.begin(features, jt.array(following))


def best(logits, rank):
    return int(np.lexsort((np.arange(len(logits)), -logits))[rank])


def node_by_node(head, state, root, tree):
    """The draft by definition: for each node alone, step from the root along its path and take its rank."""
    tokens = [root]
    for path in tree.paths:
        here, token = state, root
        for rank in path:
            logits, here = head.step(here, jt.array(np.array([token], np.int32)), jt.array(np.zeros(1, np.int32)))
            token = best(logits.numpy()[0], rank)
        tokens.append(token)
    return tokens


def test_the_plan_of_the_worked_example():
    plan = DraftPlan(FOUR)
    assert [s.parents.numpy().tolist() for s in plan.steps] == [[0], [0]]
    assert [s.source.numpy().tolist() for s in plan.steps] == [[0], [1]]
    assert [s.num_candidates for s in plan.steps] == [2, 1]
    assert plan.tokens.tolist() == [0, 1, 2]
    assert plan.parallel_tokens.tolist() == [0, 1, 2]  # [a b], [c d] -> a, b, c
    assert draft_plan(FOUR) is draft_plan(Tree.from_paths(FOUR.paths))


def test_the_worked_example_by_hand(backbone):
    """Ten words; after token t the head wants t + 1, then t + 2, ..."""

    def step(state, token_ids, parents):
        assert state.numpy()[parents.numpy()].tolist() == expected.pop(0)
        wants = np.stack([-((np.arange(10) - t - 1) % 10) for t in token_ids.numpy()]).astype(np.float32)
        return jt.array(wants), token_ids

    expected = [[-5], [7]]  # the state of the root's parent row, then that of the root
    head = SimpleNamespace(parallel=False, draft_vocab=None, step=step)
    # Root 7: its best are 8 and 9; after node 2 (token 9) comes 0.
    assert draft(head, jt.array(np.array([-5], np.int32)), 7, FOUR).tolist() == [7, 8, 9, 0]
    assert expected == []


def test_a_parallel_head_by_hand():
    rows = jt.array(np.array([[0, 1, 5, 3], [9, 1, 2, 3], [7, 7, 7, 7]], np.float32))
    head = SimpleNamespace(parallel=True, draft_vocab=None, score_depths=lambda state, depths: rows[:depths])
    tokens = draft(head, None, 6, FOUR)
    assert tokens.tolist() == [6, 2, 3, 0] and tokens.dtype == np.int32


def test_columns_of_a_draft_vocabulary_are_read_as_its_tokens():
    vocab = np.array([3, 10, 20, 30], np.int32)
    rows = jt.array(np.array([[0, 1, 5, 3], [9, 1, 2, 3], [7, 7, 7, 7]], np.float32))
    head = SimpleNamespace(parallel=True, draft_vocab=vocab, score_depths=lambda state, depths: rows[:depths])
    assert draft(head, None, 6, FOUR).tolist() == [6, 20, 30, 3]

    def step(state, token_ids, parents):
        steps.append(token_ids.numpy().tolist())
        return rows[:1], state

    steps = []
    head = SimpleNamespace(parallel=False, draft_vocab=vocab, step=step)
    assert draft(head, jt.array(np.zeros(1, np.int32)), 6, FOUR).tolist() == [6, 20, 30, 20]
    assert steps == [[6], [30]]  # the next step gets tokens, not columns


def test_a_lone_root_needs_no_head():
    assert draft(None, None, 5, Tree.autoregressive()).tolist() == [5]


def test_every_node_is_drafted_after_its_own_path(backbone, mixing_head, prompts, tree):
    head, prompt = mixing_head(backbone), prompts[4]
    state = begun(head, prompt, [11])
    tokens = draft(head, state, 11, tree)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == node_by_node(head, state, 11, tree)


def test_control_a_wrong_parent_is_noticed(backbone, mixing_head, prompts):
    tree = Tree.from_paths([[0], [1], [0, 0], [1, 0], [0, 0, 0], [1, 0, 0]])
    head, prompt = mixing_head(backbone), prompts[4]
    state, plan = begun(head, prompt, [11]), draft_plan(tree)
    right = plan.steps[2].parents
    assert right.numpy().tolist() == [0, 1]
    try:
        plan.steps[2].parents = jt.array(np.array([1, 0], np.int32))
        assert draft(head, state, 11, tree).tolist() != node_by_node(head, state, 11, tree)
    finally:
        plan.steps[2].parents = right


def test_only_nodes_with_children_are_scored(backbone, make_head, prompts, continuations, tree):
    prompt, continuation = prompts[4], continuations["float32"][4]
    head = make_head("sequential-all", backbone, prompt, continuation)
    draft(head, begun(head, prompt, continuation), continuation[0], tree)
    inner = np.array(tree.has_children)
    assert head.rows_scored == [int(inner[tree.depths == depth].sum()) for depth in range(tree.depth)]


def test_a_parallel_head_is_called_once(backbone, make_head, prompts, continuations, tree):
    prompt, continuation = prompts[4], continuations["float32"][4]
    head = make_head("parallel-all", backbone, prompt, continuation)
    tokens = draft(head, begun(head, prompt, continuation), continuation[0], tree)
    assert head.calls == 1
    for node, path in enumerate(tree.paths, start=1):
        assert (tokens[node] == continuation[len(path)]) == (path[-1] == 0)
