"""What is measured in which order, which repeat counts, and whose replies the next turn sees; nothing is computed."""

import pytest

import bench.measure.attempts
import bench.measure.side_by_side
from bench.record.prompts import Prompt
from decoding.generate import Generation, Timers
from decoding.options import Acceptance


class Fakes:
    """A Setup whose sides answer at once: to n messages the baseline says [10 + n], the head [20 + n], and the adapted
    backbone, when there is one, what the head says."""

    def __init__(self, repeats=1, seconds=(), adapts=False):
        self.calls, self.conversations, self.repeats = [], [], repeats
        self.seconds = iter(seconds)
        self.head, self.backbone, self.tokenizer, self.cache = "a head", None, self, self
        self.decoder, self.adapts = "a backbone", adapts
        self.sides = ("baseline", "head", "adapted") if adapts else ("baseline", "head")
        self.max_length, self.acceptance, self.batch_size = 99, Acceptance(), 1

    reply_text, eos_ids = bench.measure.attempts.Setup.reply_text, (99,)

    def encode_chat(self, messages):
        self.conversations.append([message["content"] for message in messages])
        return [1] * len(messages)

    def decode_all(self, prompts, side, rules):
        return [self.decode(prompt_ids, side, rule) for prompt_ids, rule in zip(prompts, rules, strict=True)]

    def decode(self, prompt_ids, side=None, rule=None):
        if side is None:  # the tokenizer's
            return f" {prompt_ids} "
        self.calls.append(side)
        timers = Timers(prefill_s=1.0, total_s=1.0 + next(self.seconds, 0.5))
        reply = [(10 if side == "baseline" else 20) + len(prompt_ids)]
        return Generation(reply, None, "stop", len(prompt_ids), timers=timers)


@pytest.mark.parametrize("adapts", [False, True])
def test_the_history_holds_the_replies_of_the_baseline_for_every_side(adapts):
    setup = Fakes(adapts=adapts)
    (attempt,) = bench.measure.attempts.attempt_all(setup, [Prompt("p", "c", ("one", "two"))], 0, head_first=False)
    assert setup.conversations == [["one"], ["one", "[11]", "two"]]
    if adapts:
        assert attempt.difference is None  # the head's tokens are those of its own backbone
    else:
        assert attempt.difference.expected_ids == [11] and attempt.difference.head_ids == [21]


def test_a_stop_token_is_no_part_of_the_reply_that_a_later_turn_reads():
    setup = Fakes()
    for ids, text in (([11, 99], "[11]"), ([11], "[11]"), ([], "[]")):
        assert setup.reply_text(Generation(ids, None, "stop", 1)) == text
    assert setup.reply_text(Generation([11, 99], " as text ", "stop", 1)) == "as text"


def test_the_sides_take_turns_in_going_first(monkeypatch):
    monkeypatch.setattr(bench.measure.side_by_side, "explain", lambda *arguments: None)
    setup, result = Fakes(repeats=2), bench.measure.side_by_side.Measurement()
    for index in range(2):
        bench.measure.side_by_side.measure_prompts(setup, [Prompt(f"p{index}", "c", ("one",))], index, result)
    assert setup.calls == ["baseline", "head", "head", "baseline", "head", "baseline", "baseline", "head"]
    setup = Fakes(adapts=True)
    for index in range(2):
        bench.measure.side_by_side.measure_prompts(setup, [Prompt(f"q{index}", "c", ("one",))], index, result)
    assert setup.calls == ["baseline", "head", "adapted", "head", "baseline", "adapted"]


def test_the_turns_of_a_batch_are_asked_together_and_end_one_by_one():
    setup, asked = Fakes(), []
    right = setup.decode_all
    setup.decode_all = lambda prompts, side, rules: asked.append((side, len(prompts))) or right(prompts, side, rules)
    prompts = [Prompt("p", "c", ("one", "two", "three")), Prompt("q", "c", ("one",)), Prompt("r", "c", ("one", "two"))]
    attempts = bench.measure.attempts.attempt_all(setup, prompts, 0, head_first=True)
    assert asked == [("head", 3), ("baseline", 3), ("head", 2), ("baseline", 2), ("head", 1), ("baseline", 1)]
    assert [len(attempt.head.generations) for attempt in attempts] == [3, 1, 2]
    assert setup.conversations[-1] == ["one", "[11]", "two", "[13]", "three"]


def test_of_several_repeats_each_side_keeps_its_median(monkeypatch):
    monkeypatch.setattr(bench.measure.side_by_side, "explain", lambda *arguments: None)
    # in order of the calls: baseline, head; head, baseline; baseline, head
    setup, result = Fakes(repeats=3, seconds=[3, 6, 4, 1, 2, 5]), bench.measure.side_by_side.Measurement()
    bench.measure.side_by_side.measure_prompts(setup, [Prompt("p", "c", ("one",))], 0, result)
    (row,) = result.rows
    assert (row.baseline_time_s, row.time_s) == (2.0, 5.0) and result.timers.total_s == 6.0


def test_the_adapted_backbones_time_counts_for_neither_side():
    setup, result = Fakes(adapts=True, seconds=[3, 6, 500]), bench.measure.side_by_side.Measurement()
    bench.measure.side_by_side.measure_prompts(setup, [Prompt("p", "c", ("one",))], 0, result)
    (row,) = result.rows
    assert (row.baseline_time_s, row.time_s) == (3.0, 6.0)
    assert (result.timers.total_s, result.baseline_timers.total_s) == (7.0, 4.0)


def test_the_texts_of_two_backbones_are_compared_turn_by_turn():
    def stretch(*replies):
        return bench.measure.attempts.Stretch([Generation(ids, None, "stop", 1) for ids in replies])

    original = stretch([5, 6, 7], [8, 9])
    for adapted, tokens, agreeing in (
        (stretch([5, 6, 7], [8, 9]), 3, 5),
        (stretch([5, 6, 7], [1, 9]), 3, 3),
        (stretch([5, 6, 7, 7], [8]), 3, 4),  # longer and shorter: what is missing does not agree
    ):
        found = bench.measure.side_by_side.compare_texts(original, adapted)
        assert (found.tokens, found.agreeing_tokens) == (tokens, agreeing)


def test_a_difference_is_counted_from_the_first_turn():
    generations = [Generation([5, 6, 7], None, "stop", 1), Generation([5, 6], None, "stop", 1)]
    stretch = bench.measure.attempts.Stretch(generations)
    assert stretch.tokens == 3  # the prefill's two left out
    difference = bench.measure.attempts.Difference([1], [5, 6], [5], before=3, position=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.measure.side_by_side, "logit_gap", lambda *arguments: 0.25)
        found = bench.measure.side_by_side.explain(None, Prompt("p", "c", ("a",)), difference)
    assert (found.position, found.baseline_token, found.head_token, found.logit_gap) == (4, 6, None, 0.25)
