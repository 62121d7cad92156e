"""How the tests here run the entry, and on which prompts."""

import bench.run
from tests.bench.helpers import call
from tests.bench.helpers import error_of as error_of_entry

NEW_TOKENS = 12
TURNS = (
    ["Please book a table for two."],
    ["What films do you like?", "And music?"],
    ["Tell me a story about a fox."],
)


def words_of(folder, *arguments):
    given = ["--greedy", "--runs", folder / "runs", "--max-new-tokens", NEW_TOKENS, *arguments]
    return given if "--prompts" in given else [*given, "--prompts", folder / "prompts.jsonl"]


def run(folder, *arguments):
    """(exit status, stdout, stderr) of the entry on the prompts and runs of ``folder``."""
    return call(bench.run.main, *words_of(folder, *arguments))


def error_of(folder, *arguments):
    """The one line that a mistake is answered with."""
    return error_of_entry(bench.run.main, *words_of(folder, *arguments))
