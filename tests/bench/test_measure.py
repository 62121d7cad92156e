"""What is measured in which order, which repeat counts, and whose replies the next turn sees; nothing is computed."""

import pytest

import bench.measure
from bench.prompts import Prompt
from decoding.generate import Generation, Timers


class Fakes:
    """A Setup whose two sides answer at once: reply n of the twin is [10 + n], of the head [20 + n]."""

    def __init__(self, repeats=1, seconds=()):
        self.calls, self.conversations, self.repeats = [], [], repeats
        self.seconds = iter(seconds)
        self.head, self.backbone, self.tokenizer, self.cache = "a head", None, self, self
        self.max_length = 99

    def encode_chat(self, messages):
        self.conversations.append([message["content"] for message in messages])
        return [1] * len(messages)

    def decode(self, prompt_ids, with_head=None):
        if with_head is None:  # the tokenizer's
            return f" {prompt_ids} "
        self.calls.append("head" if with_head else "twin")
        timers = Timers(prefill_s=1.0, total_s=1.0 + next(self.seconds, 0.5))
        reply = [(20 if with_head else 10) + len(prompt_ids)]
        return Generation(reply, None, "stop", len(prompt_ids), timers=timers)


def test_the_history_holds_the_replies_of_the_twin_on_both_sides():
    setup = Fakes()
    attempt = bench.measure.measure_once(setup, Prompt("p", "c", ("one", "two")), head_first=False)
    assert setup.conversations == [["one"], ["one", "[11]", "two"]]
    assert attempt.difference.baseline_ids == [11] and attempt.difference.head_ids == [21]


def test_the_sides_take_turns_in_going_first(monkeypatch):
    monkeypatch.setattr(bench.measure, "explain", lambda *arguments: None)
    setup, result = Fakes(repeats=2), bench.measure.Measurement()
    for index in range(2):
        bench.measure.measure_prompt(setup, Prompt(f"p{index}", "c", ("one",)), index, result)
    assert setup.calls == ["twin", "head", "head", "twin", "head", "twin", "twin", "head"]


def test_of_several_repeats_each_side_keeps_its_median(monkeypatch):
    monkeypatch.setattr(bench.measure, "explain", lambda *arguments: None)
    # in order of the calls: twin, head; head, twin; twin, head
    setup, result = Fakes(repeats=3, seconds=[3, 6, 4, 1, 2, 5]), bench.measure.Measurement()
    bench.measure.measure_prompt(setup, Prompt("p", "c", ("one",)), 0, result)
    (row,) = result.rows
    assert (row.baseline_time_s, row.time_s) == (2.0, 5.0) and result.timers.total_s == 6.0


def test_a_difference_is_counted_from_the_first_turn():
    generations = [Generation([5, 6, 7], None, "stop", 1), Generation([5, 6], None, "stop", 1)]
    stretch = bench.measure.Stretch(generations)
    assert stretch.tokens == 3  # the prefill's two left out
    difference = bench.measure.Difference([1], [5, 6], [5], before=3, position=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.measure, "logit_gap", lambda *arguments: 0.25)
        found = bench.measure.explain(None, Prompt("p", "c", ("a",)), difference)
    assert (found.position, found.baseline_token, found.head_token, found.logit_gap) == (4, 6, None, 0.25)
