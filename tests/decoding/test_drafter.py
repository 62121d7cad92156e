"""Chains drafted in one call: the text is the baseline's, and the drafts are those made step by step."""

import numpy as np
import pytest

from backbone.cache import BatchCache
from decoding.drafter import ChainDrafter, StepDrafter, make_drafter
from decoding.generate import generate, generate_autoregressive, generate_batch
from decoding.rules import Greedy, Lossless
from decoding.sampling import Sampler
from decoding.tree import DynamicTree, Tree
from heads.registry import build
from runtime import jt
from tests.small import small_backbone

PROMPTS = [[3, 14, 15, 9, 26], [5], [7, 8, 9] * 9, [60, 2, 33, 4, 21, 60, 2, 33, 4]]
NUM_NEW = 40
NAMES = {"hydra": {"num_layers": 2}, "gated_rnn": {"inner_size": 24}, "mlp": {}, "redrafter": {}}


@pytest.fixture(scope="module", params=["float16", "float32"])
def small(request):
    return small_backbone(request.param)


@pytest.fixture(params=NAMES)
def head(request, small):
    """A head near its initial value, where it repeats the backbone's last token, which is sometimes right."""
    made, random = build(request.param, {"num_depths": 3, **NAMES[request.param]}, small), np.random.default_rng(3)
    for _, parameter in sorted(made.named_parameters()):
        noise = random.standard_normal(parameter.shape) * 0.2 / max(1, parameter.shape[-1]) ** 0.5
        parameter.update(jt.array((parameter.numpy() + noise).astype(np.float32)))
    made.eval()
    return made


def counts(generation):
    return generation.token_ids, generation.accepted_per_pass, generation.reached_by_depth


@pytest.mark.parametrize(("num_drafts", "draft_dtype"), [(1, "float32"), (3, "float16")])
def test_greedy_decoding_with_a_chain_in_one_call_gives_the_baselines_text(small, head, num_drafts, draft_dtype):
    tree, accepted = Tree.chain(num_drafts), 0
    assert isinstance(make_drafter(head, tree, Greedy(), draft_dtype), ChainDrafter)
    for prompt in PROMPTS:
        baseline = generate_autoregressive(small, prompt, max_new_tokens=NUM_NEW)
        found = generate(small, head, prompt, tree, max_new_tokens=NUM_NEW, draft_dtype=draft_dtype)
        assert found.token_ids == baseline.token_ids
        accepted += sum(found.accepted_by_depth)
    assert accepted > 0  # else only misses were tested


def take_the_last_row(drafter, output, rows, following):
    """Continue from the last row of the pass, accepted or not."""
    drafter.hidden, drafter.row = output.hidden, drafter.tree.num_nodes - 1


def test_the_drafts_are_those_made_step_by_step(small, head, monkeypatch):
    tree = Tree.chain(3)
    found = [generate(small, head, p, tree, max_new_tokens=NUM_NEW, draft_dtype="float32") for p in PROMPTS]
    with monkeypatch.context() as patch:
        patch.setattr("decoding.drafter.chain_of", lambda head, num_depths, dtype: None)
        steps = [generate(small, head, p, tree, max_new_tokens=NUM_NEW) for p in PROMPTS]
    assert [counts(each) for each in found] == [counts(each) for each in steps]
    with monkeypatch.context() as patch:  # control: after another row it drafts something else
        patch.setattr(ChainDrafter, "accept", take_the_last_row)
        wrong = [generate(small, head, p, tree, max_new_tokens=NUM_NEW, draft_dtype="float32") for p in PROMPTS]
    assert [each.token_ids for each in wrong] == [each.token_ids for each in found]
    assert [counts(each) for each in wrong] != [counts(each) for each in found]


def test_a_batch_drafts_for_each_text_what_it_gets_alone(small, head):
    tree, rules = Tree.chain(2), {"max_new_tokens": NUM_NEW, "stop_ids": [2]}
    cache = BatchCache(small.config, len(PROMPTS), 90, small.dtype)
    together = generate_batch(small, head, PROMPTS, tree, cache=cache, **rules)
    assert [counts(each) for each in together] == [counts(generate(small, head, p, tree, **rules)) for p in PROMPTS]


def test_a_drawn_text_is_the_one_drawn_without_drafts(small, head):
    rules = {"max_new_tokens": 20, "rule": Lossless(Sampler(0.8), seed=5)}
    baseline = generate_autoregressive(small, PROMPTS[2], **rules)
    for dtype in ("float16", "float32"):
        found = generate(small, head, PROMPTS[2], Tree.chain(2), draft_dtype=dtype, **rules)
        assert found.token_ids == baseline.token_ids


def test_a_text_continues_without_drafts_when_the_chain_no_longer_fits(small, head):
    cache = small.new_cache(30)
    found = generate(small, head, PROMPTS[0], Tree.chain(3), max_new_tokens=NUM_NEW, cache=cache)
    baseline = generate_autoregressive(small, PROMPTS[0], max_new_tokens=NUM_NEW, cache=small.new_cache(30))
    assert found.finish_reason == baseline.finish_reason == "cache"
    assert found.token_ids == baseline.token_ids


def test_other_trees_and_drawn_drafts_are_drafted_step_by_step(small, head):
    sampled = Lossless(Sampler(1.0), sampled=True)
    shapes = [
        (Tree.from_paths([[0], [1]]), Greedy()),
        (Tree.from_paths([[1]]), Greedy()),
        (DynamicTree(3, 2), Greedy()),
    ]
    for tree, rule in [*shapes, (Tree.chain(2), sampled)]:
        assert isinstance(make_drafter(head, tree, rule, "float16"), StepDrafter)


def test_an_unknown_dtype_is_refused(small, head):
    with pytest.raises(ValueError, match="draft_dtype must be one of float16, float32, got 'int8'"):
        generate(small, head, PROMPTS[0], Tree.chain(1), max_new_tokens=4, draft_dtype="int8")
