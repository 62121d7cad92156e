"""Heads beside vLLM: what it is given, that its counts are read pass by pass, and that a difference is found."""

import json
import sys
import types

import pytest

from backbone.model import load_backbone
from bench.peers import served, vllm
from bench.served import main
from heads.checkpoint import save_checkpoint
from heads.registry import build
from runtime import jt
from tests.bench.helpers import call, error_of, write_prompts

COUNTS = ["--max-new-tokens", "8", "--depth", "2"]
PYTHON = ["--python", sys.executable]

# vLLM's side ---------------------------------------------------------------------------------------------------------


class Engine:
    """Stands in for vLLM: texts count up from the prompt's first token, in passes of these sizes, the prefill's first,
    each followed by a step that adds nothing."""

    sizes = (1, 3, 1, 2)

    def __init__(self, backbone, **settings):
        self.settings, self.drafts, self.accepted = {"backbone": backbone, **settings}, 0, [0, 0]
        self.llm_engine, self.steps = self, []

    def add_request(self, name, prompt, settings):
        self.params, self.first = settings, prompt["prompt_token_ids"][0]
        self.steps = [each for place in range(len(self.sizes)) for each in ((place, True), (place, False))]

    def has_unfinished_requests(self):
        return bool(self.steps)

    def step(self):
        place, adds = self.steps.pop(0)
        if adds and place > 0:
            self.drafts += 1
            self.accepted = [count + (self.sizes[place] > depth + 1) for depth, count in enumerate(self.accepted)]
        tokens = list(range(self.first, self.first + sum(self.sizes[: place + 1])))
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens)])]

    def get_metrics(self):
        names = ("drafts", "accepted_tokens_per_pos")
        values = ({"value": self.drafts}, {"values": self.accepted})
        found = zip(names, values, strict=True)
        return [types.SimpleNamespace(name=vllm.COUNTERS + name, **value) for name, value in found]


@pytest.fixture
def engine(monkeypatch):
    """vLLM's stand-in under the names that are imported; returns the engines that were made."""
    made = []

    def make(*arguments, **settings):
        made.append(Engine(*arguments, **settings))
        return made[-1]

    program = types.SimpleNamespace(
        LLM=make, SamplingParams=lambda **settings: settings, __name__="vllm", __version__="9"
    )
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__name__=name, __version__="1"))
    monkeypatch.setitem(sys.modules, "vllm", program)
    return made


def test_vllms_passes_and_counters_are_read_text_by_text(engine):
    task = {
        "backbone": "B", "draft": {"method": "medusa"}, "prompts": [[10], [20, 21]], "max_new_tokens": 7,
        "stop_ids": [2], "max_length": 64,
    }  # fmt: skip
    answer = vllm.serve(task)
    assert answer["versions"] == {"vllm": "9", "torch": "1", "transformers": "1"}
    assert [text["tokens"] for text in answer["texts"]] == [list(range(10, 17)), list(range(20, 27))]
    for text in answer["texts"]:  # not the sums over both, nor those of the text that warmed up
        assert text["passes"] == [3, 1, 2] and text["drafts"] == 3 and text["accepted"] == [2, 1]
        assert text["seconds"] > 0
    settings, params = engine[0].settings, engine[0].params
    assert settings["dtype"] == "float32" and settings["max_num_seqs"] == 1 and settings["max_model_len"] == 64
    assert settings["speculative_config"] == {"method": "medusa"}
    assert params["temperature"] == 0 and params["max_tokens"] == 7 and params["stop_token_ids"] == [2]


def test_the_reason_is_the_last_line_that_names_an_error():
    log = "INFO start\nValueError: shapes differ\n raise RuntimeError(\nRuntimeError: No. See root cause above.\nbye\n"
    assert vllm.reason(log) == "ValueError: shapes differ"
    assert vllm.reason("INFO start\nkilled\n") == "killed" and vllm.reason("") == "it printed nothing"


def test_a_python_without_vllm_is_reported(tmp_path):
    (tmp_path / "vllm.py").write_text("raise ImportError('no vllm here')")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(ValueError, match=r"vLLM ended with status 1: ImportError: no vllm here"):
        vllm.ask(str(python), {})


# Both sides ----------------------------------------------------------------------------------------------------------


def text(tokens, passes, accepted, seconds=1.0):
    return {
        "tokens": tokens, "passes": passes, "drafts": len(passes), "accepted": accepted, "seconds": seconds,
    }  # fmt: skip


def test_sums_and_agreement_by_a_worked_example():
    ours = [text([5, 6, 7, 8], [2, 1], [1, 0]), text([5, 6], [1], [0])]
    assert served.summary(ours) == {
        "tokens": 4, "passes": 3, "drafts": 3, "accepted": [1, 0], "accept_length": 4 / 3, "tokens_per_s": 2.0,
    }  # fmt: skip
    theirs = [text([5, 6, 7, 8], [1, 2], [1, 0]), text([5, 6], [1], [0])]
    assert served.agreement(ours, ours) == {"texts": 2, "same_texts": 2, "passes": 3, "same_passes": 3}
    assert served.agreement(ours, theirs) == {"texts": 2, "same_texts": 2, "passes": 3, "same_passes": 1}
    other = [text([5, 6, 7, 9], [2, 1], [1, 0]), ours[1]]
    assert served.agreement(ours, other) == {"texts": 2, "same_texts": 1, "passes": 1, "same_passes": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two prompts and untrained heads on the embedded backbone."""
    folder, backbone = tmp_path_factory.mktemp("served"), load_backbone()
    write_prompts(folder / "prompts.jsonl", (["Hello!"], ["What is two and two?", "And three?"]))
    options = {
        "mlp": {"num_depths": 2, "lm_head": "shared"}, "eagle": {"attention_norm": False}, "lora": {"num_depths": 2},
        "eagle3": {"draft_vocab_size": 64},
    }  # fmt: skip
    for name, chosen in options.items():
        jt.set_global_seed(0)
        head = build(name, chosen, backbone)
        trained_on = {"fingerprint": backbone.fingerprint, "path": None, "hidden_size": 256, "vocab_size": 4096}
        config = {"head": name, "head_config": vars(head.config), "backbone": trained_on, "metrics": {}}
        save_checkpoint(folder / name, head, config, {})
    return folder


def serve(folder, *names):
    words = [word for name in names for word in ("--checkpoint", folder / name)]
    return call(main, *PYTHON, *words, "--prompts", folder / "prompts.jsonl", *COUNTS, "--out", folder / "found.json")


@pytest.fixture
def stand_in(monkeypatch):
    """vLLM replaced by our own decoding of the folder it is given; returns the tasks, by format."""
    from decoding.generate import generate
    from decoding.tree import Tree
    from heads.formats.contents import Target
    from heads.formats.conversion import BY_NAME, recognize
    from heads.formats.files import open_head
    from heads.formats.own import filled_head

    tasks = {}

    def ask(python, task):
        place, target = task["draft"]["model"], Target()
        format = recognize(place)
        tasks[format] = task
        head = filled_head(BY_NAME[format].read(open_head(place), target), load_backbone(None, "float32"))
        settings = {"max_new_tokens": task["max_new_tokens"], "stop_ids": task["stop_ids"], "draft_dtype": "float32"}
        tree, texts = Tree.chain(task["draft"]["num_speculative_tokens"]), []
        for prompt in task["prompts"]:
            found = generate(head.borrowed, head, prompt, tree, **settings)
            texts.append(text(found.token_ids, found.accepted_per_pass, found.accepted_by_depth))
        return {"texts": texts, "versions": {"vllm": "9"}}

    monkeypatch.setattr(vllm, "ask", ask)
    return tasks


def test_every_head_is_exported_to_what_vllm_reads_and_held_to_it(folder, stand_in):
    status, out, err = serve(folder, "mlp", "eagle", "eagle3")
    assert status == 0, err
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((folder / "found.json").read_text()) and record["dtype"] == "float32"
    assert [each["format"] for each in record["served"]] == ["vllm-medusa", "eagle", "eagle3", "speculators"]
    assert list(stand_in) == [each["format"] for each in record["served"]]
    for each in record["served"]:
        assert each["agreement"]["texts"] == each["agreement"]["same_texts"] == 3  # both turns of the second prompt
        assert each["ours"]["passes"] == each["vllm"]["passes"] > 0
        assert each["ours"]["accepted"] == each["vllm"]["accepted"] and len(each["ours"]["accepted"]) == 2
    assert stand_in["eagle"]["draft"]["method"] == "eagle" and stand_in["eagle"]["stop_ids"] == [2]
    assert "speculators" in out and "same passes" in out


def test_a_server_that_accepts_something_else_is_detected(folder, stand_in, monkeypatch):
    ask = vllm.ask

    def other(python, task):
        answer = ask(python, task)
        passes = answer["texts"][0]["passes"]
        passes[:] = [sum(passes[:2]), *passes[2:]]
        return answer

    monkeypatch.setattr(vllm, "ask", other)
    status, out, _ = serve(folder, "mlp")
    found = json.loads(out.splitlines()[-1])["served"][0]["agreement"]
    assert status == 1 and found["same_texts"] == 3 and found["same_passes"] < found["passes"]


def test_mistakes_are_answered_before_anything_is_measured(folder, stand_in):
    checkpoint = ["--checkpoint", folder / "mlp"]
    assert "--python is missing" in error_of(main, *checkpoint)
    assert "--checkpoint is missing" in error_of(main, *PYTHON)
    assert "is no program" in error_of(main, "--python", folder / "none", *checkpoint)
    assert "no place for a head lora" in error_of(main, *PYTHON, "--checkpoint", folder / "lora")
    assert "--depth 3 exceeds the 2 depths" in error_of(main, *PYTHON, *checkpoint, "--depth", "3")
    assert stand_in == {}
