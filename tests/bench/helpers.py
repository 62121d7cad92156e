"""Running the commands in this process, and the prompts that they decode."""

import contextlib
import io
import json

from runtime.entry import run_entry

CALIBRATED_PATHS = [[0], [1], [0, 0], [2], [1, 0]]  # of the calibration that the tests use


def call(main, *arguments):
    """(exit status, stdout, stderr) of an entry."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_entry(main, [str(word) for word in arguments])
    return status, out.getvalue(), err.getvalue()


def error_of(main, *arguments):
    """The one line that a mistake is answered with, before anything is printed."""
    status, out, err = call(main, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and out == "" and len(lines) == 1, (status, out, err)
    return lines[0]


def write_prompts(path, conversations):
    """Write a prompt file of two categories."""
    lines = [
        json.dumps({"question_id": number, "category": f"c{number % 2}", "turns": turns})
        for number, turns in enumerate(conversations)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def set_fields(record, changes):
    """The plain record, changed. A change is named by its path, with __ between the parts: {"data__sha256": "..."}."""
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = record
        for parent in parents:
            place = place[parent]
        place[last] = value
    return record


def status_of(main):
    """main(words) -> the entry's exit status, its output left to ``capsys``."""
    return lambda words: run_entry(main, [str(word) for word in words])


def cells_of(line):
    """The cells of a line of a printed table."""
    return [cell.strip() for cell in line.strip("│┃|").split("│")]
