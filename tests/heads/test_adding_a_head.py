"""docs/ADDING_A_HEAD.md does what it says: its files are copied out of the page, trained, decoded with and checked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backbone.model import load_backbone
from backbone.tokenizer import load_tokenizer
from bench.measure.options import RunOptions
from decoding.drafter import ChainDrafter, make_drafter
from decoding.generate import generate, generate_autoregressive
from decoding.rules import Greedy
from decoding.tree import Tree
from heads.checkpoint import load_head
from heads.registry import FOLDER, available
from runtime.options import parse_options
from trainer.config import parse

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ADDING_A_HEAD.md").read_text(encoding="utf-8")
NAME = "multiplicative"


def marked_files(page):
    """The code blocks after a comment with a file name, by that name."""
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))


def commands(page):
    """The words of every command of the page that runs Python."""
    lines = re.findall(r"^(?:\w+=\S+ )?python (.*)$", page, re.MULTILINE)
    return [line.split() for line in lines]


@pytest.fixture(scope="module")
def heads_folder(tmp_path_factory):
    """A folder outside the repository with the head of the page in it, named by GORGON_HEADS."""
    folder = tmp_path_factory.mktemp("my_heads")
    for name, text in marked_files(PAGE).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GORGON_HEADS", str(folder))
        yield folder


def run(*words, status=0):
    """Stdout of a Python command in the repository, with GORGON_HEADS as it is now."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ
    )
    assert done.returncode == status, (done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


@pytest.fixture(scope="module")
def trained(heads_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    words = ("train.py", "--head", NAME, "--max-steps", 12, "--features", "online", "--held-out", 8, "--out", out)
    return json.loads(run(*words).splitlines()[-1]), out


def test_the_page_holds_a_complete_head_that_is_not_in_the_repository(heads_folder):
    names = {"__init__.py", "head.py", "chain.py", "recipe.yaml", "README.md"}
    assert {path.name for path in (heads_folder / NAME).iterdir()} == names
    assert not (FOLDER / NAME).exists() and NAME in available()
    code = marked_files(PAGE)[f"{NAME}/head.py"]
    assert len([line for line in code.splitlines() if line.strip()]) < 50


def test_every_command_of_the_page_exists(heads_folder):
    entries = [words[0] for words in commands(PAGE)]
    assert {"train.py", "bench/run.py", "bench/compare.py", "-m"} == set(entries)
    for entry, *words in commands(PAGE):
        if entry == "train.py" and "--help" not in words:
            config = parse(words)
            assert config is None or (config.head == NAME and config.learning_rate == 0.004)
        elif entry == "bench/run.py":
            assert parse_options(RunOptions, entry, "", words).head == [NAME]


def test_the_head_is_listed(heads_folder):
    line = next(line for line in run("train.py", "--list-heads").splitlines() if line.startswith(NAME))
    assert line.split(maxsplit=2) == [
        NAME,
        "sequential",
        "A multiplicative recurrence: the drafted token chooses how the state changes.",
    ]


def test_the_head_trains(trained):
    result, out = trained
    assert (result["status"], result["steps"]) == ("done", 12) and 1 < result["expected_accept_length"] < 5
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    assert config["head"] == NAME and config["trainer"]["learning_rate"] == 0.004
    dim, rank = config["backbone"]["hidden_size"], config["head_config"]["rank"]
    assert config["num_parameters"] == 3 * dim * rank + 2 * rank + 2 * dim  # as its README says


def test_decoding_with_the_trained_head_gives_the_autoregressive_text(trained):
    backbone, tokenizer = load_backbone(), load_tokenizer()
    head, config = load_head(trained[1], backbone)
    tree = Tree.from_paths(config["metrics"]["tree"][:15])
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Tell me a story about a fox."}])
    rules = {"max_new_tokens": 40, "stop_ids": tokenizer.eos_ids}
    baseline = generate_autoregressive(backbone, prompt, **rules)
    drafted = generate(backbone, head, prompt, tree, **rules)
    assert drafted.token_ids == baseline.token_ids
    assert isinstance(make_drafter(head, Tree.chain(3), Greedy(), "float16"), ChainDrafter)
    assert generate(backbone, head, prompt, Tree.chain(3), **rules).token_ids == baseline.token_ids
    assert drafted.num_passes < len(drafted.token_ids) - 1, "twelve steps should be enough for one accepted token"


def test_the_contract_suite_runs_for_the_head_and_passes(heads_folder):
    suite = next(words for words in commands(PAGE) if words[0] == "-m")
    out = run(*suite, "-v", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib")
    passed = re.findall(rf"::(\w+)\[.*{NAME}.*\] PASSED", out)
    assert {
        "test_step_along_the_true_tokens_equals_execute",
        "test_a_tiny_batch_is_learned_by_heart",
        "test_a_saved_head_comes_back_bit_for_bit",
        "test_a_chain_in_one_call_is_the_one_drafted_step_by_step",
    } <= set(passed)


def test_the_contract_suite_notices_a_head_whose_step_goes_its_own_way(heads_folder, tmp_path, monkeypatch):
    """The control: the same head, but ``step`` takes every token for token 0."""
    right = "self.advance(state[parents], token_ids)"
    for name, text in marked_files(PAGE).items():
        assert name != f"{NAME}/head.py" or right in text
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace(right, "self.advance(state[parents], token_ids * 0)"))
    monkeypatch.setenv("GORGON_HEADS", str(tmp_path))
    suite = next(words for words in commands(PAGE) if words[0] == "-m")
    out = run(*suite, "-p", "no:cacheprovider", "--tb=no", "-k", f"{NAME} and step", status=1)
    assert f"test_step_along_the_true_tokens_equals_execute[{NAME}-False]" in out
