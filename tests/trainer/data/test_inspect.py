"""Training text on the terminal: the loss in color, mistakes in one line."""

import io

from runtime.entry import run_entry
from tests.trainer.data.made import GOOD, write_lines
from trainer.data.inspect import InspectOptions, inspect, main


def test_inspect_colors_exactly_the_reply(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    inspect(InspectOptions(inspect=str(write_lines(tmp_path / "d.jsonl", GOOD, GOOD)), count=1), file=out)
    text = out.getvalue()
    assert "\x1b[1;32m Hello</s>\x1b[0m" in text and text.count("Hello") == 1
    assert "ASSISTANT:\x1b[0m" in text and "2 of 2 conversations from d.jsonl" in text


def test_the_command_line_answers_mistakes_with_one_line_and_status_2(tmp_path, capsys):
    path = str(write_lines(tmp_path / "d.jsonl", GOOD))
    assert run_entry(main, ["--inspect", path, "--count", "1"]) == 0
    assert "in the loss" in capsys.readouterr().out
    mistakes = [
        [],
        ["--inspect", "nowhere"],
        ["--inspect", path, "--template", "lama-2"],
        ["--inspect", path, "--count", "0"],
        ["--inspect", path, "--loss-on", "none"],
        ["--inspect", str(tmp_path)],
    ]
    for arguments in mistakes:
        assert run_entry(main, arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
