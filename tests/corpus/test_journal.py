"""An unfinished corpus is resumed, whatever ended it, and becomes the file of an uninterrupted run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backbone.model import load_backbone
from backbone.tokenizer import load_tokenizer
from corpus.journal import BEGUN, TALKS, Journal, check_begun, partial_folder
from corpus.lanes import Batch
from corpus.options import Options
from corpus.write import main, terms, write_corpus
from runtime.entry import run_entry
from trainer.data.prompts import Prompt
from trainer.features import top_k

ROOT = Path(__file__).resolve().parents[2]
SHARD_TOKENS = 400  # several files for a few conversations
FLAGS = ["--num-conversations=12", "--batch-size=4", "--max-turns=2", "--greedy-share=0.5", "--top-k-probabilities=3"]
CHILD = f"""
import sys
from trainer.features import top_k
top_k.SHARD_TOKENS = {SHARD_TOKENS}
from runtime.entry import run_entry
from corpus.write import main
sys.exit(run_entry(main, sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(top_k, "SHARD_TOKENS", SHARD_TOKENS)


def options(**changes):
    given = {"num_conversations": 12, "batch_size": 4, "max_turns": 2, "greedy_share": 0.5, "top_k_probabilities": 3}
    return Options(**given | changes)


def files_of(out):
    """Name and bytes of everything that a finished run writes."""
    assert not partial_folder(out).exists()
    paths = [out, *top_k.top_k_folder(out).iterdir()]
    return {path.name.replace(out.name, "corpus"): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def uninterrupted(backbone, tokenizer, tmp_path_factory):
    """(the files of an uninterrupted run, its report)."""
    out = tmp_path_factory.mktemp("uninterrupted") / "corpus.jsonl.gz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "SHARD_TOKENS", SHARD_TOKENS)
        report = write_corpus(backbone, tokenizer, options(), out).summary()
    found = files_of(out)
    assert len(found) > 3
    return found, report


def interrupt(backbone, tokenizer, out, after, prompts=None, **changes):
    """A run that Ctrl-C ends after so many passes."""
    step, passes = Batch._step, iter(range(after))

    def stop(self, active):
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return step(self, active)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            write_corpus(backbone, tokenizer, options(**changes), out, prompts)


@pytest.fixture(scope="module")
def begun(backbone, tokenizer, tmp_path_factory):
    """The unfinished corpus of a run with more conversations, in other batches."""
    out = tmp_path_factory.mktemp("begun") / "corpus.jsonl.gz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "SHARD_TOKENS", SHARD_TOKENS)
        interrupt(backbone, tokenizer, out, 250, batch_size=5, num_conversations=1000)
    assert 4 < num_lines(partial_folder(out) / TALKS) < 12 and list((partial_folder(out) / "top").iterdir())
    return partial_folder(out)


@pytest.fixture
def out(begun, tmp_path):
    """An unfinished corpus."""
    shutil.copytree(begun, tmp_path / begun.name)
    return tmp_path / "corpus.jsonl.gz"


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_killed_several_times_writes_the_file_of_an_uninterrupted_one(uninterrupted, tmp_path):
    out, chance, killed = tmp_path / "corpus.jsonl.gz", random.Random(0), []
    talks = partial_folder(out) / TALKS
    command = [sys.executable, "-c", CHILD, "--out", str(out), *FLAGS]
    while not out.exists():
        most = num_lines(talks) + chance.randint(1, 5) if len(killed) < 3 else 1000
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and num_lines(talks) < most:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02) if most < 1000 else 0)
        child.send_signal(signal.SIGKILL)
        printed = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), printed
        if child.returncode:
            killed.append(num_lines(talks))
    assert killed and killed == sorted(killed), killed
    assert files_of(out) == uninterrupted[0]
    assert printed[0].startswith(uninterrupted[1])


def test_after_ctrl_c_the_same_command_resumes(backbone, tokenizer, uninterrupted, out, capsys):
    """With any batch size, and any number of conversations."""
    known = num_lines(partial_folder(out) / TALKS)
    interrupt(backbone, tokenizer, out, 40)
    assert not out.exists() and num_lines(partial_folder(out) / TALKS) >= known
    printed = capsys.readouterr().err
    assert f"resuming after {known} conversations" in printed
    assert "interrupted at" in printed and f"resumes from {partial_folder(out)}" in printed
    report = write_corpus(backbone, tokenizer, options(), out)
    assert files_of(out) == uninterrupted[0] and report.summary() == uninterrupted[1]


def test_ctrl_c_before_the_first_conversation_is_over_leaves_nothing(backbone, tokenizer, tmp_path, capsys):
    interrupt(backbone, tokenizer, tmp_path / "corpus.jsonl.gz", 1)
    assert list(tmp_path.iterdir()) == []
    assert "corpus.jsonl.gz was not written" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 100_000])
def test_an_incomplete_last_line_is_written_again(backbone, tokenizer, uninterrupted, out, cut):
    talks = partial_folder(out) / TALKS
    before = num_lines(talks)
    os.truncate(talks, max(0, talks.stat().st_size - cut))
    assert num_lines(talks) < before
    write_corpus(backbone, tokenizer, options(), out)
    assert files_of(out) == uninterrupted[0]


def test_the_control_that_drops_a_complete_line_is_noticed(backbone, tokenizer, uninterrupted, out):
    talks = partial_folder(out) / TALKS
    first, _, *rest = talks.read_bytes().splitlines(keepends=True)
    renumbered = [json.dumps(json.loads(line) | {"index": i}) + "\n" for i, line in enumerate([first, *rest])]
    talks.write_text("".join(renumbered))
    write_corpus(backbone, tokenizer, options(), out)
    assert files_of(out) != uninterrupted[0]


def test_a_run_killed_while_it_finishes_is_finished_by_the_next(backbone, tokenizer, uninterrupted, out):
    def killed(*_):
        raise KeyboardInterrupt

    for name in ("finish", "discard"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, name, killed)
            with pytest.raises(KeyboardInterrupt):
                write_corpus(backbone, tokenizer, options(), out)
        assert partial_folder(out).exists()
    write_corpus(backbone, tokenizer, options(), out)
    assert files_of(out) == uninterrupted[0]


def test_a_corpus_of_prompts_is_resumed(backbone, tokenizer, tmp_path):
    prompts = [Prompt(str(n), "math", (f"What is {n} plus {n}?", "And twice that?")) for n in range(8)]
    given = {"num_conversations": None, "max_turns": None, "temperature": 1.0, "top_k_probabilities": 0}
    complete, out = tmp_path / "complete.jsonl", tmp_path / "corpus.jsonl"
    write_corpus(backbone, tokenizer, options(**given), complete, prompts)
    interrupt(backbone, tokenizer, out, 60, prompts, **given)
    assert 0 < num_lines(partial_folder(out) / TALKS) < 8
    with pytest.raises(ValueError, match="other options: --prompts: "):
        write_corpus(backbone, tokenizer, options(**given), out, prompts[1:])
    write_corpus(backbone, tokenizer, options(**given), out, prompts)
    assert out.read_bytes() == complete.read_bytes() and not partial_folder(out).exists()


# What is refused -----------------------------------------------------------------------------------------------------


def test_other_options_than_it_was_begun_with_are_refused_by_name_before_the_model_is_read(
    tmp_path, capsys, monkeypatch
):
    other = {"--seed": "7", "--greedy-share": "0.25", "--top-k-probabilities": "0", "--continue": "0.5"}
    monkeypatch.setattr("backbone.model.load_backbone", lambda *_, **__: pytest.fail("read the model"))
    out = tmp_path / "corpus.jsonl"
    partial_folder(out).mkdir()
    (partial_folder(out) / BEGUN).write_text(json.dumps(terms(options(), None)))
    assert run_entry(main, ["--out", str(out), *FLAGS, *(word for pair in other.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert "begun with other options: " in error and "delete the folder" in error
    assert all(f"{flag}: " in error and f", now {value};" in error for flag, value in other.items())


def test_another_backbone_or_tokenizer_is_refused_by_name(backbone, tokenizer, out):
    before = (partial_folder(out) / TALKS).read_bytes()
    with pytest.raises(ValueError, match="other options: weights in: float16, now int8;"):
        write_corpus(load_backbone(load_in_8bit=True), tokenizer, options(), out)
    with pytest.raises(ValueError, match="other options: tokenizer with --template: "):
        write_corpus(backbone, load_tokenizer(None, "vicuna"), options(), out)
    assert (partial_folder(out) / TALKS).read_bytes() == before


def test_a_corpus_is_written_by_one_process_at_a_time(tmp_path):
    out = tmp_path / "corpus.jsonl"
    with Journal(out, {}), pytest.raises(ValueError, match=rf"partial is being written .*, {os.getpid()} on "):
        Journal(out, {})
    with Journal(out, {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_journal_is_refused_with_file_and_line(backbone, tokenizer, out):
    talks = partial_folder(out) / TALKS
    first, second, *rest = talks.read_bytes().splitlines(keepends=True)
    for damaged in ([first, b"{}\n"], [first, b"\0" * 9 + b"\n"], [second, first]):
        talks.write_bytes(b"".join([*damaged, *rest]))
        with pytest.raises(ValueError, match=rf"{TALKS} line [12] is damaged .*delete .*partial"):
            write_corpus(backbone, tokenizer, options(), out)
    (partial_folder(out) / BEGUN).write_text("{")
    with pytest.raises(ValueError, match=r"not valid JSON .*; delete .* to start over"):
        check_begun(out, {})


def test_a_corpus_without_a_usable_conversation_leaves_nothing(backbone, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"none of 1 conversations is usable: .*prompt too long"):
        write_corpus(backbone, tokenizer, options(), tmp_path / "x.jsonl", [Prompt("1", "chat", ("word " * 600,))])
    assert list(tmp_path.iterdir()) == []
