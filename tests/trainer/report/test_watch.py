"""The display of a training: what it says, that no line is too long for the terminal, and that it redraws in place."""

import io
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from trainer.report.watch import Smoothed, Watch

ESCAPE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Terminal(io.StringIO):
    """A terminal that remembers what was written to it."""

    def __init__(self, encoding="utf-8"):
        super().__init__()
        self.name = encoding

    encoding = property(lambda self: self.name)

    def isatty(self):
        return True


def rows_on_screen(text, width):
    """The rows of an endless screen of this width; a line that is too long continues in the next row, as it does on a
    real one. Knows the escape codes that a redrawing display needs: cursor up, erase the row."""
    rows, row, column, place = [[]], 0, 0, 0
    while place < len(text):
        escape = ESCAPE.match(text, place)
        if escape:
            if escape[2] == "A":
                row -= int(escape[1] or 1)
            elif escape[2] == "K":
                rows[row] = []
            place = escape.end()
            continue
        if text[place] == "\r":
            column = 0
        elif text[place] == "\n":
            row, column = row + 1, 0
        else:
            if column == width:
                row, column = row + 1, 0
            rows += [[]] * (row >= len(rows))
            rows[row] = [*rows[row][:column], *" " * (column - len(rows[row])), text[place], *rows[row][column + 1 :]]
            column += 1
        rows += [[]] * (row >= len(rows))
        place += 1
    return ["".join(row).rstrip() for row in rows]


def record(step, **more):
    return {
        "step": step, "stage": "heads", "rate": 2e-3, "loss": [2.0, 3.0], "top1": [0.5, 0.25], "top5": [0.75, 0.5],
        "tokens": 100 * step, "tokens_per_s": 3456.0, "skipped": 1, "memory_bytes": 1.25e9, **more,
    }  # fmt: skip


def score(value):
    return SimpleNamespace(expected_accept_length=value, loss=[2.5, 3.5], top1=[0.6, 0.3], top5=[0.8, 0.6])


def run(console, num_steps=40, score_every=20, first_step=0, quiet=False):
    """A complete run on this console: two parts of features, training, a score that is best and one that is not."""
    with Watch(num_steps, first_step, console, quiet) as watch:
        for name in ("features", "held out"):
            start, advance = watch.cache(SimpleNamespace(offsets=np.array([0, 40])), name)
            start("cache/abc", 2_000_000)
            advance(20)
            advance(20)
        for step in range(first_step + 1, num_steps + 1):
            watch.step(step, num_steps, record(step))
            if step % score_every == 0:
                watch.score(step, score(2.75 if step == score_every else 2.25), step == score_every)
        watch.say("a word\nof two lines")
    return console.file.getvalue()


# On a terminal


@pytest.mark.parametrize(("width", "encoding"), [(60, "utf-8"), (100, "ascii")])
def test_the_table_redraws_in_place_and_no_line_wraps(width, encoding):
    console = Console(file=Terminal(encoding), width=width, height=30)
    text = run(console)
    assert "\x1b[2J" not in text  # a screen that is cleared flickers
    if encoding == "ascii":
        assert text.isascii()
    rows = rows_on_screen(text, width)
    while not rows[-1]:
        rows.pop()
    bar = next(number for number, row in enumerate(rows) if "40/40" in row)
    assert rows[:bar] == ["features  writing 2 MB to cache/abc, once"] * 2 + ["a word of two lines"]
    assert rows[bar].startswith("heads ") and width - 2 <= len(rows[bar]) <= width
    assert [" ".join(row.split()) for row in rows[bar + 1 :]] == [
        "depth loss top-1 top-5 held out: loss top-1 top-5",
        "1 2.000 50.0% 75.0% 2.500 60.0% 80.0%",
        "2 3.000 25.0% 50.0% 3.500 30.0% 60.0%",
        "expected accept length 2.250, best 2.750 at step 20",
        "3,456 tokens/s rate 2.00e-03 1.25 GB skipped 1",
    ]


def test_the_emulated_screen_notices_a_line_that_wraps():
    assert rows_on_screen("abcdef\r\nxy\x1b[1A\r\x1b[2Kz", 4) == ["abcd", "z", "xy"]


def test_a_terminal_without_colors_gets_none(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = run(Console(file=Terminal(), width=80, height=30))
    assert not [code for code, kind in ESCAPE.findall(text) if kind == "m" and re.search(r"\b[349]\d", code)]
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = run(Console(file=Terminal(), width=80, height=30))
    assert [code for code, kind in ESCAPE.findall(text) if kind == "m" and re.search(r"\b[349]\d", code)]
    monkeypatch.setenv("TERM", "dumb")
    text = run(Console(file=Terminal(), width=80, height=30))
    assert "\x1b" not in text and "step 40/40 loss" in text  # lines


def test_output_to_a_redirected_stdout_is_not_captured(monkeypatch):
    console = Console(file=Terminal(), width=80, height=30)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(FloatingPointError), Watch(2, console=console) as watch:
        watch.step(1, 2, record(1))
        print("the result")
        raise FloatingPointError
    assert sys.stdout.getvalue() == "the result\n"
    text = console.file.getvalue()
    assert "the result" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # an error leaves the cursor visible


# Off a terminal


def step_numbers(lines):
    return [line.split()[1] for line in lines if "held out" not in line and line.startswith("step")]


def test_off_a_terminal_there_is_a_line_each_tenth_and_each_score_and_no_escape_code():
    lines = run(Console(file=io.StringIO(), width=40)).splitlines()
    assert "\x1b" not in "".join(lines)
    assert lines[:2] == ["features  writing 2 MB to cache/abc, once"] * 2 and lines[-1] == "a word of two lines"
    assert step_numbers(lines) == [f"{step}/40" for step in range(4, 41, 4)]
    for num_steps, count in ((1, 1), (3, 3), (15, 10)):
        steps = step_numbers(run(Console(file=io.StringIO()), num_steps).splitlines())
        assert len(steps) == count and steps[-1] == f"{num_steps}/{num_steps}"
    assert lines[-3] == "step 40/40 loss 2.00 3.00 top-1 50 25% 3,456 tokens/s rate 2.00e-03 1.25 GB skipped 1"
    assert [line for line in lines if "held out" in line] == [
        "step 20/40 held out: expected accept length 2.750 (best) loss 2.50 3.50 top-1 60 30% top-5 80 60%",
        "step 40/40 held out: expected accept length 2.250 (best 2.750 at step 20) loss 2.50 3.50 top-1 60 30% "
        "top-5 80 60%",
    ]


def test_a_resumed_run_counts_from_its_first_step():
    console = Console(file=Terminal(), width=80, height=30)
    with Watch(100, 90, console) as watch:
        watch.step(91, 100, record(91))
        assert (watch.training.completed, watch.training.total) == (91, 100)
    lines = run(Console(file=io.StringIO()), 40, first_step=30).splitlines()
    assert step_numbers(lines) == ["32/40", "36/40", "40/40"]


@pytest.mark.parametrize("terminal", [Terminal, io.StringIO])
def test_a_quiet_one_shows_nothing(terminal, capsys):
    assert run(Console(file=terminal()), quiet=True) == ""
    assert capsys.readouterr() == ("", "")


# Smoothing


def test_a_figure_is_the_mean_of_the_last_steps():
    figure = Smoothed(2)
    assert figure.means() == []
    for row in ([9.0, 9.0], None, [2.0, 4.0], [4.0, math.nan]):
        figure.add(row)
    assert figure.means() == [3.0, 4.0]
    figure.add([math.nan, math.nan])
    assert figure.means()[0] == 4.0 and math.isnan(figure.means()[1])
    figure.add([1.0])  # another number of depths starts over
    assert figure.means() == [1.0]
