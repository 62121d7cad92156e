"""Both engines on the same prompts: what is compared, and that a difference is found and described."""

import json
import sys

import pytest

import backbone.options
import bench.run
from backbone.engines import load_engine
from bench.hybrid import main
from bench.measure.attempts import Attempt, Stretch
from bench.measure.engines import compare_attempts
from bench.record.schema import Record
from decoding.generate import Generation
from tests.bench.helpers import call, error_of, write_prompts
from trainer.config import TrainConfig
from trainer.session import train

COUNTS = ["--max-new-tokens", "10", "--nodes", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three prompts and the run of a head that was trained on what torch computes."""
    folder = tmp_path_factory.mktemp("hybrid")
    turns = (["Please book a table for two."], ["What films do you like?", "And music?"], ["Hello!"])
    write_prompts(folder / "prompts.jsonl", turns)
    words = ("I need a table for two at eight.", "Of course, a table for two at eight. What is your name?")
    talk = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), words, strict=True)]
    more = [[{"from": "human", "value": f"It is {n}."}, talk[1]] for n in range(8)]
    talks = [{"id": str(n), "conversations": [*talk, *each]} for n, each in enumerate(more)]
    (folder / "talks.json").write_text(json.dumps(talks))
    config = TrainConfig(
        head="mlp",
        head_options={"num_depths": 2, "lm_head": "shared"},
        backbone_engine="torch",
        dtype="float32",
        data=[str(folder / "talks.json")],
        features="online",
        max_steps=30,
        epochs=30.0,
        learning_rate=2e-2,
        tokens_per_step=128,
        held_out=1,
        save_every=0,
        out=str(folder / "run"),
    )
    config.check()
    train(config)
    return folder


def compare(folder, *arguments):
    """Status, stdout and stderr of the entry on this file's prompts and run."""
    return call(main, "--checkpoint", folder / "run", "--prompts", folder / "prompts.jsonl", *COUNTS, *arguments)


def test_a_head_trained_with_torch_decodes_the_same_by_both_engines(folder):
    config = json.loads((folder / "run" / "checkpoint" / "config.json").read_text())
    assert config["backbone"]["engine"] == "torch" and config["backbone"]["storage"] == "torch-float32"
    assert config["trainer"]["backbone_engine"] == "torch"
    status, out, err = compare(folder, "--out", str(folder / "found.json"))
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads((folder / "found.json").read_text())
    assert found["agreement"] == {"prompts": 3, "autoregressive": 3, "head": 3, "passes": 3, "difference": None}
    ours, theirs = (found["engines"][engine] for engine in ("jittor", "torch"))
    assert (ours["storage"], theirs["storage"]) == ("float32", "torch-float32")
    assert ours["accept_length"] == theirs["accept_length"] and ours["parity"] == theirs["parity"] == 3
    assert min(each[key] for each in (ours, theirs) for key in ("tokens_per_s", "autoregressive_tokens_per_s")) > 0
    assert found["config"]["tree"][0] == [0] and ours["accept_length"] > 1  # its drafts are accepted
    assert found["config"]["checkpoint"]["head"] == "mlp"
    assert {"torch", "transformers", "jittor"} <= found["provenance"]["versions"].keys()
    assert "own parity" in out and "torch-float32" in out


def test_an_engine_that_computes_something_else_is_detected(folder, monkeypatch):
    def other(engine, *arguments):
        made = load_engine(engine, *arguments)
        if engine == "torch":
            made.model.lm_head.weight[:100] *= 1.5
        return made

    monkeypatch.setattr(backbone.options, "load_engine", other)
    status, out, _ = compare(folder)
    found = json.loads(out.splitlines()[-1])["agreement"]
    assert status == 1 and min(found["autoregressive"], found["head"]) < 3
    first = found["difference"]
    assert first["way"] in ("autoregressive", "head") and first["tokens"][0] != first["tokens"][1]
    assert set(first["logit_gap"]) == {"jittor", "torch"}


def attempt(*turns):
    """The attempt at a prompt of these turns: (tokens without the head, with it, passes with it)."""
    found = Attempt(Stretch(), Stretch(), Stretch())
    for baseline, head, passes in turns:
        found.baseline.generations.append(Generation(baseline, None, "length", 1))
        found.head.generations.append(Generation(head, None, "length", 1, num_passes=passes))
    return found


def test_prompts_count_as_the_same_when_all_their_turns_are():
    first = ([5, 6], [5, 6], 1)
    ours = [attempt(first, ([7], [7], 0)), attempt(([5], [5], 2)), attempt(([5], [5, 6, 7], 2))]
    theirs = [attempt(first, ([7], [7], 0)), attempt(([5], [5], 3)), attempt(([5], [5, 6], 2))]
    difference = {"prompt_id": "c", "turn": 0, "way": "head", "position": 2, "tokens": [7, None]}
    expected = {"prompts": 3, "autoregressive": 3, "head": 2, "passes": 2, "difference": difference}
    assert compare_attempts(["a", "b", "c"], ours, theirs) == expected
    ours[0] = attempt(first, ([7, 8], [7], 0))
    difference = {"prompt_id": "a", "turn": 1, "way": "autoregressive", "position": 1, "tokens": [8, None]}
    expected = {"prompts": 2, "autoregressive": 1, "head": 2, "passes": 1, "difference": difference}
    assert compare_attempts(["a", "b"], ours[:2], theirs[:2]) == expected


def test_a_run_says_which_engine_it_measured(folder):
    given = ["--greedy", "--dtype", "float32", "--backbone-engine", "torch", "--checkpoint", folder / "run"]
    given += ["--prompts", folder / "prompts.jsonl", *COUNTS, "--out", folder / "mlp.json"]
    assert call(bench.run.main, *given)[0] == 0
    record = Record.read(folder / "mlp.json")
    assert (record.config.backbone.engine, record.config.backbone.storage) == ("torch", "torch-float32")
    assert record.parity.identical == record.parity.prompts == 3 and record.provenance["versions"]["torch"]


def test_mistakes_are_answered_in_one_line(folder, monkeypatch):
    assert "--max-new-tokens must be at least 1" in error_of(main, "--checkpoint", "x", "--max-new-tokens", "0")
    assert "no checkpoint in" in error_of(main, "--checkpoint", str(folder))
    engine = ("--backbone-engine", "torch")
    assert "--batch-size 2 needs --backbone-engine jittor" in error_of(bench.run.main, *engine, "--batch-size", "2")
    monkeypatch.setitem(sys.modules, "torch", None)
    for entry, given in ((main, ("--checkpoint", "x")), (bench.run.main, engine)):
        assert error_of(entry, *given).endswith("needs PyTorch: pip install -r requirements-torch.txt")
