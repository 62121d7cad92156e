"""The clock and the memory of a process: who is timed when, and what is counted."""

import subprocess

import numpy as np
import pytest

from bench.clock import memory, timing
from bench.clock.footprint import footprint
from bench.clock.loop import stages
from decoding.generate import Generation, Timers
from tests.small import small_config


def test_functions_take_turns_and_each_round_begins_with_another():
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = timing.interleave(functions, repeats=3, turn_s=0)
    assert "".join(called) == "aabbcc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_short_calls_are_repeated_within_a_turn_and_long_ones_are_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = {"short": [], "long": []}

    def advance(name, by):
        calls[name].append(by)
        now[0] += by

    functions = {"short": lambda: advance("short", 0.01), "long": lambda: advance("long", 1.0)}
    seconds = timing.interleave(functions, repeats=2, turn_s=0.05)
    assert len(calls["short"]) == 2 + 2 * (1 + 5)  # warm-up, and per turn one that brings the caches back
    assert len(calls["long"]) == 2 + 2
    assert seconds["short"] == pytest.approx([0.01, 0.01]) and seconds["long"] == pytest.approx([1.0, 1.0])


def test_a_function_may_bring_its_own_seconds():
    assert timing.interleave({"there": lambda: 2.5, "here": lambda: None}, 1, turn_s=0)["there"] == [2.5]


def test_the_spread_is_the_median_and_the_quartiles():
    assert timing.spread_ms([0.001, 0.002, 0.003, 0.004, 0.005]) == {"ms": 3.0, "ms_low": 2.0, "ms_high": 4.0}
    assert timing.spread_ms([0.010], per=5)["ms"] == pytest.approx(2.0)


def generation(**stage):
    timers = Timers(**stage)
    return Generation([1] * 5, None, "length", 3, num_passes=4, timers=timers)


def test_stages_per_step_and_the_part_of_the_wall_clock_that_they_miss():
    spent = {"prefill_s": 1.0, "draft_s": 2.0, "verify_s": 3.0, "accept_s": 1.0, "cache_s": 1.0, "host_s": 1.8}
    found = stages(16, [(10.0, generation(**spent, total_s=9.8))])
    assert found.wall_gap_percent == pytest.approx(2.0)
    assert found.step_ms == pytest.approx(8800 / 4) and found.outside_ms == pytest.approx(3800 / 4)
    assert found.tokens_per_s == pytest.approx(4 / 8.8) and found.steps == 4
    # the gap is the worst of the repeats, not their median
    several = [(9.8, generation(**spent, total_s=9.8))] * 4 + [(19.6, generation(**spent, total_s=9.8))]
    assert stages(16, several).wall_gap_percent == pytest.approx(50.0)


def test_available_memory_heeds_the_control_group(tmp_path):
    free = memory.available_memory(tmp_path / "none")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert memory.available_memory(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory(tmp_path) > 3000 and free > 3000


def test_the_peak_of_the_memory_is_seen_and_forgotten():
    if not memory.reset_peak():
        pytest.skip("this system does not record the peak")
    before = memory.peak_rss()
    np.ones(50_000_000, np.uint8)
    assert memory.peak_rss() - before > 40_000_000
    memory.reset_peak()
    assert memory.peak_rss() - before < 40_000_000


@pytest.mark.parametrize(("status", "message"), [(-9, "signal 9: there is not enough memory"), (1, "failed")])
def test_a_build_that_dies_is_reported(monkeypatch, status, message):
    done = subprocess.CompletedProcess([], status, stdout="")
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **options: done)
    with pytest.raises(ValueError, match=message):
        footprint("tiny", small_config(), "float16", [1], 8)
