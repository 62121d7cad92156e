"""Other engines: which type of transformers counts, that it does our work, what llama.cpp is asked and answers."""

import dataclasses
import json
import stat
import sys
import types

import numpy as np
import pytest

from bench import engine
from bench.clock.shapes import SHAPES
from bench.peers import llama_cpp, torch_llama, xllamacpp_bench
from bench.record.engine import EngineRecord
from runtime.entry import run_entry
from tests.small import small_config

# transformers --------------------------------------------------------------------------------------------------------


class FakeProcess:
    """Stands in for a process of transformers: float32 takes 3 s, bfloat16 2 s, float16 does not run; ``asleep``: what
    the other way of waiting multiplies that with."""

    asleep, open = 1.0, []

    def __init__(self, task, dtype, sleeping):
        if dtype == "float16":
            raise RuntimeError("not implemented for 'Half'")
        self.seconds = {"float32": 3.0, "bfloat16": 2.0}[dtype] * (self.asleep if sleeping else 1)
        self.name = (dtype, sleeping)
        self.open.append(self.name)
        assert len(self.open) == 1  # one at a time

    def ask(self):
        return self.seconds

    def close(self):
        self.open.remove(self.name)


@pytest.mark.parametrize(("factor", "sleeping"), [(1.5, False), (0.5, True)])
def test_the_fastest_way_counts_and_one_that_does_not_run_is_null(monkeypatch, factor, sleeping):
    monkeypatch.setattr(FakeProcess, "asleep", factor)
    monkeypatch.setattr(FakeProcess, "open", [])
    choice = torch_llama.choose({}, start=FakeProcess)
    assert (choice.dtype, choice.sleeping) == choice.child.name == ("bfloat16", sleeping)
    asleep = {"float32, sleeping": 3000 * factor, "bfloat16, sleeping": 2000 * factor, "float16, sleeping": None}
    assert choice.best_ms == 2000 * min(factor, 1)
    assert choice.trials_ms == {"float32": 3000, "bfloat16": 2000, "float16": None, **asleep}
    choice.close()
    assert torch_llama.choose({}, ["float16"], FakeProcess) is None


def test_a_process_of_transformers_answers_again_and_again_and_says_when_it_cannot():
    task = {"config": dataclasses.asdict(small_config()), "context": 5, "threads": 1}
    process = torch_llama.Child(task, "float32", sleeping=True)
    assert process.ask() > 0 and process.ask() > 0
    process.close()
    with pytest.raises(RuntimeError, match="ended with status 1"):
        torch_llama.Child(task, "no type", sleeping=False)


def test_a_step_runs_one_row_after_the_context_again_and_again(monkeypatch):
    config = small_config()
    for dtype in ("float32", "bfloat16"):
        call = torch_llama.stepper(config, 7, threads=1)(dtype)
        first, second = call(), call()
        assert tuple(first.shape) == (1, 1, config.vocab_size) and first.isfinite().all()
        assert (first == second).all()  # the cache is as long as before
    monkeypatch.setattr("transformers.DynamicCache.crop", lambda *arguments: None)
    call = torch_llama.stepper(config, 7, threads=1)("float32")
    assert (call() != call()).any()  # the control: a cache that grows shows


@pytest.mark.parametrize("trial_ms", [2000.0, 200.0])
def test_both_engines_stand_in_the_file_and_a_busy_machine_is_doubted(monkeypatch, tmp_path, trial_ms):
    monkeypatch.setitem(SHAPES, "small", small_config())
    monkeypatch.setattr(FakeProcess, "open", [])
    choose = torch_llama.choose

    def fake(task, dtypes):
        return dataclasses.replace(choose(task, dtypes, FakeProcess), best_ms=trial_ms)

    monkeypatch.setattr(torch_llama, "choose", fake)
    path = tmp_path / "engine.json"
    words = ["--shape", "small", "--rows", "2", "--contexts", "5", "--repeats", "1", "--no-loop", "--out", str(path)]
    assert run_entry(engine.main, words) == 0
    record = EngineRecord.read(path)
    peer = record.shapes[0].transformers
    assert peer.what == "step" and peer.context == 5 and peer.theirs.ms == 2000
    assert peer.speedup == pytest.approx(2000 / peer.ours.ms)
    assert len(peer.trials_ms) == 6 and peer.trials_ms["bfloat16"] == 2000 and peer.trials_ms["float16"] is None
    assert FakeProcess.open == []  # the process is ended when the shape is done
    doubts = [note for note in record.notes if note.startswith("small: transformers took 10.0 times its trial")]
    assert len(doubts) == (trial_ms < 2000)


def test_where_torch_or_the_memory_is_missing_there_is_a_note_and_no_figure(monkeypatch):
    small, large, notes = small_config(), SHAPES["1.1b"], []
    assert torch_llama.fits(large, "float32", 5 * 10**9) and not torch_llama.fits(large, "float32", 4 * 10**9)
    assert torch_llama.fits(large, "bfloat16", 4 * 10**9)
    monkeypatch.setattr(torch_llama, "available_memory", lambda: 0)
    assert torch_llama.find_peer("small", small, None, 4, 5, 1, notes) is None
    assert "small: no memory for transformers in float16" in notes
    monkeypatch.setattr(torch_llama.importlib.util, "find_spec", lambda name: None)
    assert torch_llama.find_peer("small", small, None, 4, 5, 1, notes) is None and notes[-1] == torch_llama.MISSING


def test_the_text_of_transformers_is_ours():
    from backbone.model import load_backbone
    from decoding.generate import generate_autoregressive

    prompt = np.random.default_rng(0).integers(3, 4096, 12)
    theirs = torch_llama.generator(prompt, 20, threads=1)("float32")()
    ours = generate_autoregressive(load_backbone(dtype="float32"), prompt, max_new_tokens=20).token_ids
    assert theirs == ours


# llama.cpp -----------------------------------------------------------------------------------------------------------


def entry(n_prompt, n_gen, samples_ns):
    """One test of llama-bench -o json, as its documentation shows it."""
    return {
        "build_commit": "8cf427ff",
        "cpu_info": "a processor",
        "model_filename": "m.gguf",
        "model_type": "llama 1B F16",
        "model_size": 2_200_000_000,
        "model_n_params": 1_100_000_000,
        "n_threads": 2,
        "type_k": "f16",
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": 128,
        "avg_ns": sum(samples_ns) // len(samples_ns),
        "samples_ns": samples_ns,
    }


@pytest.fixture
def bench(tmp_path):
    """A program in the place of llama-bench that notes its arguments and prints a text; returns a function of the text
    and the exit status that gives (program, model, notes)."""

    def write(text, status=0):
        program, model, notes = tmp_path / "llama-bench", tmp_path / "m.gguf", tmp_path / "notes"
        (tmp_path / "answer").write_text(text)
        program.write_text(
            f'#!/bin/sh\necho "$@" > {notes}\ncat {tmp_path / "answer"}\necho "no such model" >&2\nexit {status}\n'
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        model.write_bytes(b"GGUF")
        return program, model, notes

    return write


def test_llama_bench_is_asked_for_our_rows_and_its_answer_becomes_milliseconds(bench, tmp_path, capsys):
    answer = [entry(1, 0, [2e6]), entry(4, 0, [2_000_000, 4_000_000, 6_000_000]), entry(0, 8, [80_000_000])]
    program, model, notes = bench(json.dumps(answer))
    out = tmp_path / "peer.json"
    words = ["--binary", str(program), "--model", str(model), "--rows", "4,1", "--tokens", "8", "--threads", "2"]
    assert run_entry(llama_cpp.main, [*words, "--repeats", "3", "--out", str(out)]) == 0
    assert notes.read_text().strip() == f"-m {model} -o json -r 3 -ngl 0 -p 1,4 -n 8 -d 128 -t 2"
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    assert record["peer"] == "llama.cpp" and record["parameters"] == 1_100_000_000
    assert record["passes"][1] == {"rows": 4, "context": 128, "ms": 4.0, "ms_low": 3.0, "ms_high": 5.0}
    assert record["token"]["ms"] == pytest.approx(10.0) and record["token"]["tokens"] == 8


@pytest.mark.parametrize(
    "text",
    ["not json", "[]", "{}", json.dumps([{"n_prompt": 1}]), json.dumps([{**entry(1, 0, [1]), "samples_ns": "x"}])],
)
def test_an_answer_other_than_the_documented_one_is_an_error(bench, text, capsys):
    program, model, _ = bench(text)
    assert run_entry(llama_cpp.main, ["--binary", str(program), "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert "did not print its documented JSON" in error and error.count("\n") == 1


def test_what_is_missing_is_reported_in_one_line(bench, tmp_path, capsys, monkeypatch):
    program, model, _ = bench("[]", status=1)

    def error(*words):
        assert run_entry(llama_cpp.main, list(words)) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "ended with status 1: no such model" in error("--binary", str(program), "--model", str(model))
    assert "absent.gguf does not exist" in error("--binary", str(program), "--model", str(tmp_path / "absent.gguf"))
    assert "is no program" in error("--binary", str(tmp_path / "absent"), "--model", str(model))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "llama.cpp is not measured: no llama-bench on the PATH" in error("--model", str(model))
    python = ["--python", sys.executable]
    assert "--binary and --python name two programs" in error("--binary", str(program), *python, "--model", str(model))
    assert "No module named 'xllamacpp'" in error(*python, "--model", str(model))
    assert "--rows must be at least 1" in error("--binary", str(program), "--model", str(model), "--rows", "0")


class Server:
    """Stands in for the xllamacpp wheel's server: a row takes 2 ms, a new token 5 ms; the cache holds the last prompt
    and finds the rows that a new one shares with it, from the start, all but its last."""

    last: tuple = ()
    forgets = False

    def __init__(self, settings):
        self.settings = settings

    def handle_completions(self, request):
        prompt, known = request["prompt"], 0
        while known < min(len(self.last), len(prompt) - 1) and self.last[known] == prompt[known]:
            known += 1
        known = 0 if self.forgets else known
        self.last, rows = prompt, len(prompt) - known
        times = {
            "cache_n": known,
            "prompt_n": rows,
            "prompt_ms": 2 * rows,
            "predicted_ms": 5 * (request["n_predict"] - 1),
        }
        return {"timings": times}


def settings():
    """xllamacpp.CommonParams as far as it is set."""
    return types.SimpleNamespace(
        model=types.SimpleNamespace(),
        cpuparams=types.SimpleNamespace(n_threads=7),
        cpuparams_batch=types.SimpleNamespace(),
    )


def test_the_wheel_answers_as_llama_bench_does(monkeypatch, bench):
    _, model, _ = bench("")
    made = []
    program = types.SimpleNamespace(CommonParams=settings, Server=lambda given: made.append(Server(given)) or made[-1])
    monkeypatch.setitem(sys.modules, "xllamacpp", program)
    monkeypatch.setattr(xllamacpp_bench.metadata, "version", lambda name: "9")
    options = llama_cpp.LlamaCppOptions(
        model=str(model), python=sys.executable, rows="1,4", tokens=3, context=6, repeats=2
    )
    monkeypatch.setattr(sys, "argv", llama_cpp.command(options)[2:])  # without the Python and -m
    answer = xllamacpp_bench.measure(xllamacpp_bench.parse())
    record = llama_cpp.read_results(json.dumps(answer), "the wheel")
    assert [(each["rows"], each["context"], each["ms"]) for each in record["passes"]] == [(1, 6, 2.0), (4, 6, 8.0)]
    assert (
        record["token"]["ms"] == pytest.approx(5) and record["token"]["tokens"] == 3
    )  # the prompt's own token is not counted
    assert record["build_commit"] == "xllamacpp 9" and record["threads"] == 7
    monkeypatch.setattr(Server, "forgets", True)  # the control: more rows than asked for were computed
    with pytest.raises(RuntimeError, match="7 rows after 0, expected 1 after 6"):
        xllamacpp_bench.measure(xllamacpp_bench.parse())
