"""Greedy decoding: a tree's text is the baseline's, whatever the head guesses, and the counts and the cache are
right."""

import itertools
import sys
import time
from dataclasses import astuple

import numpy as np
import pytest

from decoding.generate import Generation, first_difference, generate, generate_autoregressive, logit_gap
from decoding.loop import count_depths
from decoding.text import Text
from decoding.tree import Tree, default_tree
from ops.row_plan import RowPlan
from runtime import jt
from tests.fake_heads import FAKES, TREES

NUM_NEW = 48
CHAIN = Tree.chain(4)


def uncached(backbone, prompt, num_new):
    """Greedy decoding by definition: the whole text in one causal pass for every token."""
    ids = list(prompt)
    for _ in range(num_new):
        ids.append(int(backbone.forward(np.array([ids], np.int32)).logits.numpy()[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def case(backbone, prompts, continuations, make_head):
    """case(fake, prompt number) -> (head, prompt, known continuation), in float32."""

    def make(name, number):
        prompt, continuation = prompts[number], continuations["float32"][number]
        return make_head(name, backbone, prompt, continuation), prompt, continuation

    return make


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_baseline_is_greedy_decoding(backbones, prompts, continuations, dtype):
    for number in (0, 8):
        assert continuations[dtype][number][:12] == uncached(backbones[dtype], prompts[number], 12)


# Every fake head, every tree with a parallel and a sequential one, both dtypes.
COMBINATIONS = list(zip(FAKES, itertools.cycle(TREES), itertools.cycle(["float32", "float16"]), strict=False))


@pytest.mark.parametrize(("fake", "name", "dtype"), [*COMBINATIONS, ("mixing", "gap", "float16")])
def test_greedy_tree_decoding_equals_autoregressive(backbones, prompts, continuations, make_head, fake, name, dtype):
    for number in (1, 6, 8):
        head = make_head(fake, backbones[dtype], prompts[number], continuations[dtype][number])
        result = generate(backbones[dtype], head, prompts[number], TREES[name], max_new_tokens=NUM_NEW)
        assert result.token_ids == continuations[dtype][number][:NUM_NEW]
        assert result.finish_reason == "length"
        assert sum(result.accepted_per_pass) == NUM_NEW - 1 and len(result.accepted_per_pass) == result.num_passes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_prompt_gives_the_baselines_text_when_guesses_are_right_at_varying_ranks(
    backbones, prompts, continuations, make_head, dtype
):
    passes = 0
    for prompt, continuation in zip(prompts, continuations[dtype], strict=True):
        head = make_head("sequential-mixed", backbones[dtype], prompt, continuation)
        result = generate(backbones[dtype], head, prompt, default_tree(16, 4), max_new_tokens=NUM_NEW)
        assert result.token_ids == continuation[:NUM_NEW]
        passes += result.num_passes
    assert passes < 0.8 * len(prompts) * (NUM_NEW - 1)  # many branches were accepted


@pytest.mark.parametrize(("kind", "name"), [("sequential", "pair"), ("parallel", "chain"), ("sequential", "default")])
def test_a_head_that_always_agrees_emits_the_whole_depth_and_the_bonus(backbone, case, kind, name):
    (head, prompt, continuation), tree = case(f"{kind}-all", 4), TREES[name]
    assert [0] * tree.depth in tree.paths
    num_new = 1 + 6 * (tree.depth + 1)
    result = generate(backbone, head, prompt, tree, max_new_tokens=num_new)
    assert result.token_ids == continuation[:num_new]
    assert result.accepted_per_pass == [tree.depth + 1] * 6
    assert result.accept_length == tree.depth + 1
    assert result.reached_by_depth == result.accepted_by_depth == [6] * tree.depth


def test_a_head_that_never_agrees_emits_only_the_bonus(backbone, case, tree):
    head, prompt, _ = case("sequential-none" if tree.is_chain else "parallel-none", 4)
    result = generate(backbone, head, prompt, tree, max_new_tokens=20)
    assert result.accepted_per_pass == [1] * 19 and result.accept_length == 1.0
    assert result.reached_by_depth == [19] + [0] * (tree.depth - 1)
    assert result.accepted_by_depth == [0] * tree.depth


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_a_head_right_for_two_tokens_gives_an_exact_prefix(backbone, case, kind):
    head, prompt, _ = case(f"{kind}-prefix", 4)
    result = generate(backbone, head, prompt, CHAIN, max_new_tokens=1 + 5 * 3)
    assert result.accepted_per_pass == [3] * 5
    assert result.reached_by_depth == [5, 5, 5, 0] and result.accepted_by_depth == [5, 5, 0, 0]


def test_the_baseline_emits_one_token_per_pass(backbone, prompts):
    result = generate_autoregressive(backbone, prompts[0], max_new_tokens=9)
    assert result.num_passes == 8 and result.accepted_per_pass == [1] * 8 and result.accept_length == 1.0
    assert result.reached_by_depth == result.accepted_by_depth == [] and result.prompt_tokens == 1
    assert result.timers.draft_s == 0.0 and result.text is None


def test_one_new_token_needs_no_pass(backbone, case):
    head, prompt, continuation = case("sequential-all", 3)
    for result in (
        generate(backbone, head, prompt, CHAIN, max_new_tokens=1),
        generate_autoregressive(backbone, prompt, max_new_tokens=1),
    ):
        assert (result.token_ids, result.num_passes, result.accept_length) == (continuation[:1], 0, None)
        assert result.finish_reason == "length"


def test_a_stop_token_inside_an_accepted_path_ends_the_text(backbone, case):
    for number in range(12):
        head, prompt, continuation = case("sequential-all", number)
        # Token 0 is the prefill's, then come passes of five; look for a first occurrence that is no pass's last.
        at = next((i for i in range(7, 40) if i % 5 in (2, 3) and continuation.index(continuation[i]) == i), None)
        if at is None:
            continue
        stop = [continuation[at]]
        result = generate(backbone, head, prompt, CHAIN, max_new_tokens=NUM_NEW, stop_ids=stop)
        baseline = generate_autoregressive(backbone, prompt, max_new_tokens=NUM_NEW, stop_ids=stop)
        assert result.token_ids == baseline.token_ids == continuation[: at + 1]
        assert result.finish_reason == baseline.finish_reason == "stop"
        assert result.accepted_per_pass[-1] == (at - 1) % 5 + 1 < 5
        assert result.accepted_by_depth == [result.num_passes] * 4  # what verification accepted, cut or not
        return
    pytest.fail("no prompt has a suitable stop token")


@pytest.mark.parametrize(
    ("fake_name", "room"),
    [("sequential-all", 0), ("sequential-all", 5), ("parallel-none", 1), ("parallel-none", 17), ("sequential-mixed", 3),
     ("sequential-mixed", 21), ("mixing", 4)],
)  # fmt: skip
def test_a_full_cache_ends_the_text_where_it_ends_the_baselines(backbone, case, fake_name, room):
    head, prompt, continuation = case(fake_name, 4)
    length = len(prompt) + room
    result = generate(backbone, head, prompt, CHAIN, max_new_tokens=NUM_NEW, cache=backbone.new_cache(length))
    baseline = generate_autoregressive(backbone, prompt, max_new_tokens=NUM_NEW, cache=backbone.new_cache(length))
    assert result.token_ids == baseline.token_ids == continuation[: 1 + room]
    assert result.finish_reason == baseline.finish_reason == "cache"


def test_the_positions_of_the_backbone_are_a_limit_too(backbone, make_head):
    prompt = list(range(100, 100 + backbone.config.max_positions - 6))
    result = generate(backbone, make_head("mixing", backbone, prompt, []), prompt, CHAIN, max_new_tokens=30)
    baseline = generate_autoregressive(backbone, prompt, max_new_tokens=30)
    assert result.token_ids == baseline.token_ids and len(baseline.token_ids) == 7 and result.finish_reason == "cache"


def test_a_cache_is_emptied_first_and_left_at_the_text(backbone, case):
    cache = backbone.new_cache(200)
    for num_new in (9, 24, 3):
        head, prompt, continuation = case("sequential-all", 4)
        result = generate(backbone, head, prompt, CHAIN, max_new_tokens=num_new, cache=cache)
        assert result.token_ids == continuation[:num_new]
        assert cache.length == len(prompt) + num_new - 1
        output = backbone.forward(np.array([result.token_ids[-1:]], np.int32), cache=cache)
        assert int(output.logits.numpy()[0, -1].argmax()) == continuation[num_new]


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_an_interrupt_passes_through_and_leaves_the_cache_consistent(backbone, case, calls):
    head, prompt, continuation = case("sequential-all", 4)
    cache, seen = backbone.new_cache(200), []

    def interrupt(new):
        seen.append(new)
        if len(seen) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(backbone, head, prompt, CHAIN, max_new_tokens=NUM_NEW, cache=cache, on_tokens=interrupt)
    tokens = [token for new in seen for token in new]
    assert tokens == continuation[: 1 + 5 * (calls - 1)]
    assert cache.length == len(prompt) + len(tokens) - 1 and cache.pending == 0
    output = backbone.forward(np.array([tokens[-1:]], np.int32), cache=cache)
    assert int(output.logits.numpy()[0, -1].argmax()) == continuation[len(tokens)]
    assert jt.flags.no_grad == 0


def test_an_interrupt_between_commit_and_text_removes_the_rows(backbone, case, monkeypatch):
    head, prompt, _ = case("sequential-all", 4)
    cache = backbone.new_cache(200)

    def broken(self, new_ids):
        if self.token_ids:
            raise KeyboardInterrupt
        self.token_ids += new_ids

    monkeypatch.setattr(Text, "add", broken)
    with pytest.raises(KeyboardInterrupt):
        generate(backbone, head, prompt, CHAIN, max_new_tokens=NUM_NEW, cache=cache)
    assert cache.length == len(prompt)


def test_streaming_equals_the_result(backbone, case):
    head, prompt, continuation = case("sequential-mixed", 4)
    stop, pieces = [continuation[17]], []
    result = generate(backbone, head, prompt, CHAIN, max_new_tokens=NUM_NEW, stop_ids=stop, on_tokens=pieces.append)
    assert [token for piece in pieces for token in piece] == result.token_ids
    assert [len(piece) for piece in pieces] == [1, *result.accepted_per_pass]


def test_a_stop_string_cuts_the_text_and_keeps_the_token_that_completes_it(backbone, case, tokenizer):
    head, prompt, continuation = case("sequential-all", 9)
    whole = tokenizer.decode(continuation[:NUM_NEW])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 5]
    at = whole.index(stop)
    last = next(i for i in range(NUM_NEW) if stop in tokenizer.decode(continuation[: i + 1]))
    options = {"max_new_tokens": NUM_NEW, "stop_strings": ["not there", stop], "tokenizer": tokenizer}
    result = generate(backbone, head, prompt, CHAIN, **options)
    baseline = generate_autoregressive(backbone, prompt, **options)
    assert result.token_ids == baseline.token_ids == continuation[: last + 1]
    assert result.text == baseline.text == whole[:at] and result.finish_reason == "stop"


def test_the_text_is_the_decoded_tokens(backbone, case, tokenizer):
    head, prompt, continuation = case("sequential-all", 9)
    result = generate(backbone, head, prompt, CHAIN, max_new_tokens=12, tokenizer=tokenizer)
    assert result.text == tokenizer.decode(continuation[:12])


def test_a_stop_string_is_found_wherever_it_ends(tokenizer):
    story = "Once upon a time, a fox met a crow \u2603 by the river. " * 12 + "The end of it all. And more."
    ids = tokenizer.encode(story)
    assert len(ids) > 150  # well past the window in which it is looked for
    for stop in ("The end", "end of it all.", "e end o", "more."):
        text = Text(10_000, stop_strings=[stop], tokenizer=tokenizer)
        for token in ids:
            if text.finish_reason:
                break
            text.add([token])
        assert text.finish_reason == "stop" and text.decode() == story[: story.index(stop)]
        assert stop not in tokenizer.decode(text.token_ids[:-1]) and stop in tokenizer.decode(text.token_ids)


def test_the_worked_example_of_the_text():
    text = Text(100, stop_ids=[2])
    assert text.add([5]) == 1 and text.add([7, 2, 9, 4]) == 2
    assert text.token_ids == [5, 7, 2] and text.finish_reason == "stop"


def test_a_stop_token_that_is_also_the_last_one_allowed_counts_as_a_stop():
    text = Text(2, stop_ids=[2])
    text.add([7, 2, 9])
    assert (text.token_ids, text.finish_reason) == ([7, 2], "stop")


def test_what_cannot_be_decoded_is_refused_before_any_work(backbone, case, tokenizer):
    head, prompt, _ = case("sequential-all", 4)

    def run(prompt=prompt, tree=CHAIN, max_new_tokens=4, **options):
        return generate(backbone, head, prompt, tree, max_new_tokens=max_new_tokens, **options)

    with pytest.raises(ValueError, match="the prompt is empty"):
        run([])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        run(max_new_tokens=0)
    with pytest.raises(ValueError, match="the prompt has 9 tokens, the cache 8 rows"):
        run(cache=backbone.new_cache(8))
    with pytest.raises(ValueError, match="the prompt has 600 tokens, the cache 512 rows"):
        run([5] * 600)
    with pytest.raises(ValueError, match="expected 0 to 4095"):
        run([5, 4096])
    with pytest.raises(ValueError, match="the tree has depth 5, the head drafts 4 tokens"):
        run(tree=Tree.chain(5))
    with pytest.raises(ValueError, match="need a tokenizer"):
        run(stop_strings=["x"])
    with pytest.raises(ValueError, match="stop string is empty"):
        run(stop_strings=[""], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="must be a list of strings"):
        run(stop_strings="USER:", tokenizer=tokenizer)
    assert head.calls == 0


def test_a_training_head_drafts_in_evaluation_mode_and_returns_to_training(backbone, case):
    head, prompt, _ = case("sequential-all", 4)
    head.train()
    modes, step = [], head.step
    head.step = lambda *args: (modes.append((head.is_training(), jt.flags.no_grad)), step(*args))[1]
    generate(backbone, head, prompt, CHAIN, max_new_tokens=8)
    assert modes and set(modes) == {(False, 1)}
    assert head.is_training() and jt.flags.no_grad == 0


def test_a_head_gets_its_layers(backbone, case, monkeypatch):
    head, prompt, continuation = case("sequential-mixed", 4)
    seen, begin = [], head.begin
    whole = np.array([[*prompt, *continuation]], np.int32)
    reference = backbone.forward(whole, layers=(0, 3))

    def look(features, token_ids, state=None):
        start = sum(rows for rows, _ in seen)
        rows = features.hidden.shape[1]
        same = [np.array_equal(features.hidden.numpy(), reference.hidden.numpy()[:, start : start + rows])]
        for index in (0, 3):
            same.append(
                np.array_equal(features.layers[index].numpy(), reference.layers[index].numpy()[:, start : start + rows])
            )
        seen.append((rows, same))
        return begin(features, token_ids, state)

    head.layers, head.begin = (0, 3), look
    result = generate(backbone, head, prompt, default_tree(16, 4), max_new_tokens=24)
    assert result.token_ids == continuation[:24] and len(seen) == result.num_passes > 5
    assert [rows for rows, _ in seen] == [len(prompt), *result.accepted_per_pass[:-1]]
    assert all(all(same) for _, same in seen)


def test_the_timers_add_up_to_the_wall_clock(backbone, case, tokenizer):
    head, prompt, _ = case("sequential-mixed", 9)
    start = time.perf_counter()
    result = generate(backbone, head, prompt, CHAIN, max_new_tokens=NUM_NEW, tokenizer=tokenizer)
    wall = time.perf_counter() - start
    *stages, total = astuple(result.timers)
    assert all(seconds > 0 for seconds in stages)
    assert sum(stages) == pytest.approx(total, rel=1e-6)
    assert total <= wall and wall - total < 0.02 * wall + 1e-3


def test_the_worked_example_of_depth_counts():
    assert count_depths([(0, True), (1, False), (1, True)], 2) == ([3, 1], [2, 0])
    assert count_depths([], 0) == ([], [])


def test_first_difference_counts_lengths():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([], []) is None and first_difference([], [1]) == 0


def test_the_logit_gap_is_that_of_the_choice(backbone, case):
    _, prompt, continuation = case("mixing", 4)
    logits = backbone.forward(np.array([[*prompt, *continuation[:5]]], np.int32)).logits.numpy()[0]
    for position in (0, 3, 5):
        scores = np.sort(logits[len(prompt) - 1 + position])
        gap = logit_gap(backbone, prompt, continuation[:5], position)
        assert gap == pytest.approx(float(scores[-1] - scores[-2])) and gap > 0
    for position in (-1, 6):
        with pytest.raises(ValueError, match="not within the 5 tokens"):
            logit_gap(backbone, prompt, continuation[:5], position)


def test_accept_length_leaves_the_prefill_out():
    assert Generation([1, 2, 3, 4, 5, 6, 7], None, "length", 3, num_passes=3).accept_length == 2.0


def differs(backbone, case, tree, fake_name="sequential-mixed"):
    """The number of prompts whose text is not the baseline's."""
    wrong = 0
    for number in range(12):
        head, prompt, continuation = case(fake_name, number)
        try:
            wrong += generate(backbone, head, prompt, tree, max_new_tokens=24).token_ids != continuation[:24]
        except AssertionError:  # the fake head notices another text than the one it knows
            wrong += 1
    return wrong


def test_control_a_plan_with_a_wrong_parent_is_noticed(backbone, case):
    tree = Tree.from_paths([[0], [1], [0, 0], [1, 0]])
    assert differs(backbone, case, tree) == 0
    tree.__dict__["plan"] = RowPlan(np.array([-1, 0, 0, 2, 1]))  # nodes 3 and 4 swap their parents
    assert differs(backbone, case, tree) > 0


def test_control_accepting_a_wrong_token_is_noticed(backbone, case, monkeypatch):
    module = sys.modules["decoding.rules"]
    monkeypatch.setattr(module, "verify_greedy", lambda parents, tokens, chosen: (np.array([0, 1]), int(chosen[1])))
    assert differs(backbone, case, CHAIN, "parallel-none") > 0


def test_control_committing_the_wrong_rows_is_noticed(backbone, case, monkeypatch):
    from backbone.cache import KVCache

    commit = KVCache.commit
    monkeypatch.setattr(KVCache, "commit", lambda self, path: commit(self, np.arange(len(path))))
    assert differs(backbone, case, default_tree(16, 4)) > 0
