"""Every text of a batch gets the tokens that it gets alone, bit for bit, whatever its neighbors do."""

import numpy as np
import pytest

from backbone.cache import BatchCache, CacheFull
from decoding.generate import generate, generate_autoregressive, generate_batch
from decoding.rules import Greedy, Lossless, Typical
from decoding.sampling import Sampler
from decoding.tree import Tree, default_tree
from heads.registry import build
from ops.row_plan import RowPlan
from tests.small import small_backbone

# Eight prompts of different lengths; in the repeating ones drafts are accepted.
PROMPTS = [
    [3, 14, 15, 9, 26],
    [5],
    [7, 8, 9] * 9,
    list(range(3, 43)),
    [11, 11, 11, 11],
    [60, 2, 33, 4, 21, 60, 2, 33, 4],
    [19, 20] * 6,
    [44, 3, 17],
]
TREE = default_tree(8, 3)
NUM_NEW = 24


@pytest.fixture(scope="module")
def small():
    return small_backbone()


@pytest.fixture(scope="module", params=["mlp", "gated_rnn", "eagle", "prompt_lookup"])
def head(small, request):
    """A parallel head, a recurrent one, one with its own cache, and one whose guesses are accepted."""
    head = build(request.param, {"num_depths": 4}, small)
    head.eval()
    return head


def lanes(backbone, max_length, num=8):
    return BatchCache(backbone.config, num, max_length, "float32")


def fields(generation):
    """All fields of a Generation except the timers."""
    return {name: value for name, value in vars(generation).items() if name != "timers"}


def test_a_batch_of_8_gives_each_prompt_what_it_gets_alone(small, head):
    together = generate_batch(small, head, PROMPTS, TREE, max_new_tokens=NUM_NEW, stop_ids=[2])
    alone = [generate(small, head, prompt, TREE, max_new_tokens=NUM_NEW, stop_ids=[2]) for prompt in PROMPTS]
    assert [fields(each) for each in together] == [fields(each) for each in alone]
    assert len({len(each.token_ids) for each in alone}) > 1  # texts end at different times
    assert len({each.num_passes for each in alone}) > 1


def test_the_baseline_in_a_batch_is_the_baseline_alone(small):
    together = generate_batch(small, None, PROMPTS, TREE, max_new_tokens=NUM_NEW)
    alone = [generate_autoregressive(small, prompt, max_new_tokens=NUM_NEW) for prompt in PROMPTS]
    assert [fields(each) for each in together] == [fields(each) for each in alone]


@pytest.mark.parametrize("kind", [Lossless, Typical])
def test_drawn_texts_are_those_drawn_alone(small, kind):
    head = build("prompt_lookup", {"num_depths": 4}, small)

    def rules():
        return [kind(Sampler(0.3), seed=seed) for seed in range(len(PROMPTS))]

    together = generate_batch(small, head, PROMPTS, TREE, max_new_tokens=NUM_NEW, rules=rules())
    alone = [
        generate(small, head, prompt, TREE, max_new_tokens=NUM_NEW, rule=rule)
        for prompt, rule in zip(PROMPTS, rules(), strict=True)
    ]
    assert [fields(each) for each in together] == [fields(each) for each in alone]


def test_a_text_whose_lane_is_nearly_full_continues_without_a_head_and_then_ends(small):
    head = build("prompt_lookup", {"num_depths": 4}, small)
    together = generate_batch(small, head, PROMPTS, TREE, max_new_tokens=NUM_NEW, cache=lanes(small, 48))
    for prompt, result in zip(PROMPTS, together, strict=True):
        alone = generate(small, head, prompt, TREE, max_new_tokens=NUM_NEW, cache=small.new_cache(48))
        assert fields(result) == fields(alone)
    assert {each.finish_reason for each in together} == {"length", "cache"}


def test_a_cache_can_be_reused_for_another_batch(small):
    cache = lanes(small, 100)
    first = generate_batch(small, None, PROMPTS, TREE, max_new_tokens=NUM_NEW, cache=cache)
    generate_batch(small, None, PROMPTS[::-1][:3], TREE, max_new_tokens=5, cache=cache)
    again = generate_batch(small, None, PROMPTS, TREE, max_new_tokens=NUM_NEW, cache=cache)
    assert [fields(each) for each in again] == [fields(each) for each in first]


def test_the_comparison_notices_the_lane_of_a_neighbor(small, monkeypatch):
    """The control: rows that see one slot too far to the left change every text but the first."""
    true_after = RowPlan.after.__func__

    def shifted(cls, plans, starts, lengths):
        plan = true_after(cls, plans, starts, lengths)
        meta = plan.meta_array.copy()
        meta[:, 2] = np.maximum(meta[:, 2] - 1, 0)
        plan._hold(meta, plan.extras_array)
        return plan

    monkeypatch.setattr(RowPlan, "after", classmethod(shifted))
    together = generate_batch(small, None, PROMPTS, TREE, max_new_tokens=NUM_NEW)
    monkeypatch.undo()
    alone = [generate_autoregressive(small, prompt, max_new_tokens=NUM_NEW) for prompt in PROMPTS]
    assert [a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True)].count(False) >= 4


def test_the_stages_of_a_batch_add_up_to_its_total(small):
    head = build("mlp", {}, small)
    timers = generate_batch(small, head, PROMPTS, TREE, max_new_tokens=8)[0].timers
    stages = [seconds for name, seconds in vars(timers).items() if name != "total_s"]
    assert sum(stages) == pytest.approx(timers.total_s, rel=1e-9) and min(stages) > 0


def test_invalid_batches_are_refused(small):
    with pytest.raises(ValueError, match="got 0 and 0"):
        generate_batch(small, None, [], TREE, max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_batch(small, None, [[3], []], TREE, max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt 0 holds tokens 3 to 64"):
        generate_batch(small, None, [[3, 64], [4]], TREE, max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt 1 has 9 tokens, the cache 8 rows"):
        generate_batch(small, None, [[3], [4] * 9], TREE, max_new_tokens=4, cache=lanes(small, 8))
    with pytest.raises(ValueError, match="the cache has 1 lanes, there are 2 prompts"):
        generate_batch(small, None, [[3], [4]], TREE, max_new_tokens=4, cache=lanes(small, 8, 1))
    with pytest.raises(ValueError, match="rules of one kind"):
        generate_batch(small, None, [[3], [4]], TREE, max_new_tokens=4, rules=[Greedy(), Lossless(Sampler())])
    with pytest.raises(ValueError, match="the tree has depth 9"):
        generate_batch(small, build("mlp", {}, small), [[3]], Tree.chain(9), max_new_tokens=4)


def test_a_lane_keeps_the_committed_rows(small):
    cache = BatchCache(small.config, 2, 10, "float32")
    for counts in ((3, 2), (4, 4)):
        plan = cache.plan([0, 1], [RowPlan.chain(n) for n in counts])
        ids = np.arange(3, 3 + sum(counts))[None].astype(np.int32)
        small.forward(ids, cache=cache.slots, attend=plan).hidden.sync()
        before = [each.copy() for each in (cache.slots.data.numpy(), cache.lengths)]
        cache.commit([np.arange(counts[0]), [1, 3]] if counts == (4, 4) else [np.arange(n) for n in counts])
    assert cache.lengths.tolist() == [7, 4]
    data = cache.slots.data.numpy()
    np.testing.assert_array_equal(data[:, :, :, :7], before[0][:, :, :, :7])
    np.testing.assert_array_equal(data[:, :, :, [12, 13]], before[0][:, :, :, [13, 15]])
    with pytest.raises(CacheFull, match="lane 1 holds 4 of 10 rows, 7 more do not fit"):
        cache.plan([1], [RowPlan.chain(7)])
    cache.plan([0], [RowPlan.chain(2)])
    with pytest.raises(ValueError, match=r"cannot commit rows \[0, 2\] of the 2 rows of lane 0"):
        cache.commit([[0, 2]])
    with pytest.raises(ValueError, match="at least one lane"):
        BatchCache(small.config, 0, 10, "float32")
