"""A chain drafted in one call is the chain that ``begin`` and ``step`` draft, for every head with a chain.py."""

import numpy as np
import pytest

from heads.base import Features
from heads.chains import chain_of, write
from heads.registry import available, build, head_class, head_folder
from ops.draft import Tape
from ops.select import argmax
from runtime import jt

DEPTHS, ROWS = 3, 7
WRITTEN = [
    ("gated_rnn", {"inner_size": 24}),
    ("gated_rnn", {"cell": "gru"}),
    ("hydra", {}),
    ("hydra", {"lm_head": "low_rank", "rank": 4, "num_layers": 2}),
    ("hydra", {"token_norm": False, "lm_head": "shared"}),
    ("hydra", {"draft_vocab_size": 20}),
    ("lora", {"adapter_rank": 4}),
    ("mlp", {"num_layers": 2}),
    ("mlp", {"lm_head": "low_rank", "rank": 4}),
    ("redrafter", {"num_layers": 2}),
    ("redrafter", {"lm_head": "shared"}),
]
WITH_CHAIN = {name for name in available() if (head_folder(name) / "chain.py").is_file()}
WRITTEN += [(name, {}) for name in sorted(WITH_CHAIN - {name for name, _ in WRITTEN})]  # heads from elsewhere
CASES = [pytest.param(name, options, id=f"{name}-{options}") for name, options in WRITTEN]


@pytest.fixture
def text():
    """(hidden (1, rows, dim) Var, roots (rows,))."""
    random = np.random.default_rng(1)
    return jt.array(random.standard_normal((1, ROWS, 32)).astype(np.float32)), random.integers(0, 64, ROWS).tolist()


def step_by_step(head, hidden, row, root, num_depths=DEPTHS):
    """The best guess after the best guess, as trees are drafted."""
    following, tokens = jt.array(np.full((1, row + 1), root, np.int32)), [root]
    state = head.begin(Features(hidden[:, : row + 1]), following)
    for depth in range(num_depths):
        if head.parallel:
            logits = head.score_depths(state, num_depths)[depth : depth + 1]
        else:
            token, parent = (jt.array(np.array([each], np.int32)) for each in (tokens[-1], 0))
            logits, state = head.step(state, token, parent)
        column = int(argmax(logits).numpy()[0])
        tokens.append(column if head.draft_vocab is None else int(head.draft_vocab[column]))
    return tokens


def agreeing(head, text, dtype="float32", shift=0):
    """The number of rows whose chain is the one drafted step by step from the row ``shift`` further on."""
    (hidden, roots), chain = text, chain_of(head, DEPTHS, dtype)
    return sum(
        chain(hidden, row, root).numpy()[0].tolist() == step_by_step(head, hidden, (row + shift) % ROWS, root)
        for row, root in enumerate(roots)
    )


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_chain_in_one_call_is_the_one_drafted_step_by_step(random_head, text, name, options):
    head = random_head(name, num_depths=DEPTHS, **options)
    if head.draft_vocab is not None:
        head.drafted.update(np.random.default_rng(2).permutation(64)[: len(head.draft_vocab)].astype(np.int32))
    head.eval()
    assert agreeing(head, text) == ROWS
    assert agreeing(head, text, shift=1) < ROWS  # control: the features of another row are noticed
    assert agreeing(head, text, "float16") >= ROWS - 2  # rounding may turn a guess or two


@pytest.mark.parametrize("name", sorted(set(available()) - WITH_CHAIN))
def test_a_head_without_the_file_drafts_step_by_step(backbone, name):
    assert chain_of(build(name, {}, backbone), 2, "float16") is None


def test_a_prefix_layer_looks_back_and_has_no_chain(backbone):
    assert chain_of(build("hydra", {"prefix_layer": True}, backbone), 2, "float16") is None


def test_a_subclass_from_elsewhere_does_not_use_the_chain_of_its_parent(backbone):
    class Changed(head_class("mlp")):
        """Its networks may be others than those that the chain writes."""

    assert chain_of(Changed(Changed.Config(), backbone), 2, "float16") is None


def test_a_chain_lasts_until_parameters_change(random_head, text):
    head = random_head("gated_rnn", num_depths=DEPTHS, inner_size=24)
    head.eval()
    first = chain_of(head, DEPTHS, "float32")
    assert chain_of(head, DEPTHS, "float32") is first and chain_of(head, DEPTHS, "float16") is not first
    names = set(dict(head.named_parameters()))
    for change in (head.train, head.forget_packed):
        change()
        weight = head.joint.weight
        weight.update(jt.array(np.random.default_rng(5).standard_normal(weight.shape).astype(np.float32)))
        head.forget_packed()
        head.eval()
        assert chain_of(head, DEPTHS, "float32") is not first
        assert agreeing(head, text) == ROWS
        first = chain_of(head, DEPTHS, "float32")
    assert set(dict(head.named_parameters())) == names


def test_weights_changed_by_training_are_drafted_with(random_head, text):
    head = random_head("redrafter", num_depths=DEPTHS)
    head.eval()
    before = chain_of(head, DEPTHS, "float32")
    head.train()
    hidden, roots = text
    ids = np.array([[*roots, *[0] * DEPTHS]], np.int32)
    head(Features(hidden), ids, np.arange(ROWS))  # what trains drops the packed copies
    weight = head.output.weight
    weight.update(jt.array(weight.numpy()[::-1].copy()))
    head.eval()
    assert agreeing(head, text) == ROWS
    rows = range(ROWS)
    old, new = (
        [chain(hidden, row, roots[row]).numpy().tolist() for row in rows]
        for chain in (before, chain_of(head, DEPTHS, "float32"))
    )
    assert old != new


def test_a_head_in_training_mode_makes_a_new_chain_each_time(random_head):
    head = random_head("mlp", num_depths=DEPTHS)
    head.train()
    assert chain_of(head, 2, "float16") is not chain_of(head, 2, "float16")


def test_a_module_without_a_form_on_a_tape_is_named():
    with pytest.raises(TypeError, match="through Dropout"):
        write(Tape(32), jt.nn.Dropout(), Tape(32).hidden)
