"""The measurement: both sides read the same prompts, are counted alike, and every way it can go wrong is answered."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import backbone.model
import bench.compare
import bench.measure.attempts
import bench.measure.side_by_side
import decoding.rules
from backbone.model import load_backbone
from backbone.tokenizer import load_tokenizer
from bench.measure.warmup import loaded_kernels
from bench.record.schema import Record
from heads.registry import build
from tests.bench.helpers import call, write_prompts
from tests.bench.measure.runs import NEW_TOKENS, error_of, run

ROOT = Path(__file__).resolve().parents[3]


def test_a_run_writes_the_head_and_the_baseline(complete_run, record):
    results, out, _ = complete_run
    assert sorted(path.name for path in results.iterdir()) == ["autoregressive.json", "gated_rnn.json"]
    assert record.status == "complete" and record.failures == []
    assert record.config.decoding.tree == [[0], [1], [2], [0, 0]]  # the first four paths of the checkpoint
    assert record.config.head == {"num_depths": 3, "inner_size": 16}
    assert (record.checkpoint.train_steps, record.checkpoint.train_tokens) == (7, 700)
    assert record.checkpoint.parameters == build("gated_rnn", record.config.head, load_backbone()).num_parameters > 0
    assert record.checkpoint.seed == 5 and record.head_stats == {"perplexity_before": 3.0}
    assert record.adaptation is None and all(row.adapted is None for row in record.per_prompt)
    assert record.config.backbone.path == "assets/tiny-vicuna"
    lines = out.splitlines()
    assert Record.parse(json.loads(lines[-1])) == record
    assert Record.parse(json.loads(lines[-2])) == Record.read(results / "autoregressive.json")
    assert "accept length" in out


def test_a_chain_is_drafted_in_one_call_and_the_record_says_in_which_dtype(folder, tmp_path, record):
    assert record.config.decoding.draft_dtype is None  # its tree branches
    for given, dtype in ((), "float16"), (("--draft-dtype", "float32"), "float32"):
        status, _, err = run(folder, "--head", "gated_rnn", "--tree", "chain:2", *given, "--out", tmp_path / "out.json")
        assert status == 0, err
        found = Record.read(tmp_path / "out.json")
        assert found.config.decoding.draft_dtype == dtype and found.config.decoding.tree == [[0], [0, 0]]
        assert found.parity.identical == found.parity.prompts == 3


def test_greedy_decoding_with_a_head_gives_the_tokens_of_the_baseline_and_both_count_alike(record):
    assert (record.parity.prompts, record.parity.identical, record.parity.first_difference) == (3, 3, None)
    assert [row.turns for row in record.per_prompt] == [1, 2, 1]
    for row in record.per_prompt:
        assert row.tokens == row.baseline_tokens == row.baseline_passes <= row.turns * (NEW_TOKENS - 1)
        assert row.passes <= row.tokens <= row.passes + sum(row.accepted_by_depth)
        assert row.reached_by_depth[0] == row.passes
        assert row.accept_length == row.tokens / row.passes
    assert record.metrics.tokens == sum(row.tokens for row in record.per_prompt) == record.baseline.tokens
    assert record.metrics.speedup == pytest.approx(record.metrics.accept_length / record.metrics.overhead)
    assert record.metrics.speedup == pytest.approx(record.metrics.tokens_per_s / record.baseline.tokens_per_s)


def test_the_stages_add_up_to_the_total(complete_run, record):
    for each in (record, Record.read(complete_run[0] / "autoregressive.json")):
        t = each.timing
        stages = t.prefill_s + t.draft_s + t.verify_s + t.accept_s + t.cache_s + t.host_s
        assert stages == pytest.approx(t.total_s, rel=0.02)
        assert sum(row.time_s for row in each.per_prompt) == pytest.approx(t.total_s - t.prefill_s, rel=1e-6)
        assert sum(row.draft_s for row in each.per_prompt) == pytest.approx(t.draft_s, rel=1e-6)
    assert record.timing.draft_s > 0


def test_the_record_of_the_baseline_holds_what_the_head_was_compared_with(complete_run, record):
    baseline = Record.read(complete_run[0] / "autoregressive.json")
    assert baseline.head == "autoregressive" and baseline.checkpoint is baseline.baseline is baseline.parity is None
    assert baseline.head_stats == {} and baseline.adaptation is None
    assert baseline.config.decoding.num_nodes == 1 and baseline.config.decoding.tree == []
    assert baseline.metrics.accept_length == 1 and baseline.timing.draft_s == 0
    for row, own in zip(record.per_prompt, baseline.per_prompt, strict=True):
        assert (row.baseline_tokens, row.baseline_time_s) == (own.tokens, own.time_s)


def test_stats_that_are_no_table_are_refused_before_anything_is_measured(folder, tmp_path):
    directory = tmp_path / "checkpoint"
    shutil.copytree(folder / "runs" / "gated_rnn" / "first" / "checkpoint", directory)
    config = json.loads((directory / "config.json").read_text())
    config["metrics"]["stats"] = [1, 2]
    del config["digest"]  # as a checkpoint of an earlier version has none
    (directory / "config.json").write_text(json.dumps(config))
    answer = error_of(folder, "--checkpoint", directory, "--out", tmp_path / "out.json")
    assert "the checkpoint of gated_rnn holds no usable stats: expected an object, got [1, 2]" in answer
    assert not (tmp_path / "out.json").exists()


def test_one_node_decodes_without_the_head(folder, tmp_path):
    out = tmp_path / "one.json"
    status, _, err = run(folder, "--nodes", 1, "--out", out)
    assert status == 0, err
    record = Record.read(out)
    assert record.config.decoding.tree == [] and record.metrics.accept_rate == []
    assert record.metrics.accept_length == 1 and record.timing.draft_s == 0 and record.parity.identical == 3
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_a_wrong_verification_is_seen_and_its_speedup_refused(folder, tmp_path, monkeypatch):
    right = decoding.rules.verify_greedy

    def wrong(parents, tokens, chosen):
        path, bonus = right(parents, tokens, chosen)
        return path, bonus if len(parents) == 1 else (bonus + 1) % 4096

    monkeypatch.setattr(decoding.rules, "verify_greedy", wrong)
    status, _, err = run(folder, "--nodes", 4, "--num-prompts", 2, "--out-dir", tmp_path)
    assert status == 0 and "only 0 of 2 prompts gave the baseline's tokens" in err
    record = Record.read(tmp_path / "gated_rnn.json")
    assert record.parity.identical == 0 and [row.identical for row in record.per_prompt] == [False, False]
    difference = record.parity.first_difference
    assert difference.prompt_id == "0" and difference.position == 1 and difference.logit_gap > 0
    assert difference.head_token == difference.baseline_token + 1
    assert record.metrics.speedup is None
    assert "parity failed" in call(bench.compare.main, tmp_path / "gated_rnn.json")[1]


def test_an_interrupted_run_keeps_the_prompts_that_were_finished(folder, tmp_path, monkeypatch):
    calls, right = [], bench.measure.attempts.generate

    def interrupted(*arguments, **rules):
        if rules["max_new_tokens"] == NEW_TOKENS:  # the warm-up asks for fewer
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return right(*arguments, **rules)

    monkeypatch.setattr(bench.measure.attempts, "generate", interrupted)
    status, out, err = run(folder, "--out-dir", tmp_path)
    assert status == 130 and "interrupted" in err
    assert [path.name for path in tmp_path.iterdir()] == ["gated_rnn.json"]
    record = Record.read(tmp_path / "gated_rnn.json")
    assert record.status == "interrupted" and len(record.per_prompt) == 1 and record.data.num_prompts == 3
    assert Record.parse(json.loads(out.splitlines()[-1])) == record


def test_an_interrupt_before_the_first_prompt_leaves_older_results_alone(folder, tmp_path, monkeypatch):
    def interrupted(setup):
        raise KeyboardInterrupt

    (tmp_path / "gated_rnn.json").write_text("older")
    monkeypatch.setattr(bench.measure.side_by_side, "warm_up", interrupted)
    status, out, _ = run(folder, "--out-dir", tmp_path)
    assert status == 130 and out == "" and (tmp_path / "gated_rnn.json").read_text() == "older"


def test_what_does_not_fit_the_cache_is_named_and_the_rest_measured(folder, tmp_path):
    long = "word " * 200
    prompts = write_prompts(tmp_path / "p.jsonl", ([long], ["Hello there.", long, "Bye."], ["Hello there."]))
    out = tmp_path / "out.json"
    status, _, err = run(folder, "--prompts", prompts, "--cache-length", 128, "--out", out)
    assert status == 0, err
    record = Record.read(out)
    assert [failure.prompt_id for failure in record.failures] == ["0"]
    assert "the cache 128 rows" in record.failures[0].error and "1 prompt(s) failed" in err
    assert [(row.prompt_id, row.turns) for row in record.per_prompt] == [("1", 1), ("2", 1)]
    assert record.per_prompt[0].finish_reason == "cache"
    assert record.data.dropped["turns_past_the_cache"] == 2 and "2 later turn(s)" in err


def test_a_prompt_that_makes_none_in_any_turn_is_a_failure_and_the_others_are_measured(folder, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.json"
    records = [
        {"question_id": "a", "turns": ["Hello there"]},
        {"question_id": "b", "turns": ["nice \ud83d day"]},
        {"question_id": "c", "turns": ["Hello", "and \ud83d"]},
        {"id": "d", "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hello"}]},
        {"id": "e", "conversations": [{"from": "human", "value": "Hello"}, {"from": "bing", "value": "Hi"}]},
    ]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    status, _, err = run(folder, "--prompts", prompts, "--out", out)
    assert status == 0, err
    record = Record.read(out)
    assert [(row.prompt_id, row.turns) for row in record.per_prompt] == [("a", 1), ("d", 1)]
    tokenizer, user = load_tokenizer(), {"role": "user", "content": "Hello"}
    with_system = tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, user])
    assert record.per_prompt[1].prompt_tokens == len(with_system) != len(tokenizer.encode_chat([user]))
    assert [failure.prompt_id for failure in record.failures] == ["b", "c"]
    assert record.failures[0].error.startswith("message 0 holds half a character")
    assert record.failures[1].error.endswith("(p.jsonl line 3)")
    assert record.data.dropped["a turn from 'bing'"] == 1 and "a turn from 'bing' (1, first in p.jsonl line 5)" in err


def test_both_sides_end_alike_where_the_cache_is_full_and_nothing_that_fits_is_an_error(folder, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", (["Tell me a story about a fox."],))
    length = len(load_tokenizer().encode_chat([{"role": "user", "content": "Tell me a story about a fox."}]))
    out = tmp_path / "out.json"
    status, _, err = run(folder, "--prompts", prompts, "--cache-length", length + 4, "--out", out)
    assert status == 0, err
    row = Record.read(out).per_prompt[0]
    assert row.finish_reason == "cache" and row.identical and row.tokens == row.baseline_tokens == 4
    answer = error_of(folder, "--cache-length", 20, "--out", tmp_path / "none.json")
    assert "no prompt could be measured" in answer and not (tmp_path / "none.json").exists()


def test_mistakes_are_answered_in_one_line(folder, tmp_path):
    out = ("--out", tmp_path / "out.json")
    assert "Did you mean 'gated_rnn'?" in error_of(folder, "--head", "gatedrnn", *out)
    assert "python train.py --head mlp" in error_of(folder, "--head", "mlp", *out)
    assert "no checkpoint in" in error_of(folder, "--checkpoint", tmp_path, *out)
    deep = tmp_path / "deep.json"
    deep.write_text("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    assert "the tree has depth 4, the head drafts 3 tokens" in error_of(folder, "--tree", deep, *out)
    first = folder / "runs" / "gated_rnn" / "first"
    copy = shutil.copytree(first, tmp_path / "copy")
    twice = ("--checkpoint", first, "--checkpoint", copy, "--out-dir", tmp_path)
    assert "two checkpoints of gated_rnn" in error_of(folder, *twice)
    assert not (tmp_path / "out.json").exists()


def test_outputs_are_checked_before_the_backbone_is_loaded(folder, tmp_path, monkeypatch):
    def load(*arguments):
        raise AssertionError("the backbone was loaded")

    monkeypatch.setattr(backbone.model, "load_backbone", load)
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot write" in error_of(folder, "--out", file / "out.json")
    assert "cannot write" in error_of(folder, "--out", tmp_path)
    (tmp_path / "gated_rnn.json").mkdir()
    assert "gated_rnn.json" in error_of(folder, "--out-dir", tmp_path)


def test_the_warm_up_leaves_no_kernel_for_the_clock(folder, tmp_path, monkeypatch):
    """Kernels count as they are loaded, from the cache or from the compiler; a new one is seen."""
    before = loaded_kernels()
    if before is None:
        pytest.skip("this system does not list loaded files")
    from runtime import jt

    (jt.array(np.ones((2, 3, 4), np.float32)).cos().sum() * 3.25).sync()
    assert loaded_kernels() > before
    status, _, err = run(folder, "--num-prompts", 2, "--out", tmp_path / "out.json")
    assert status == 0 and "first used on the clock" not in err


EARLY = [
    (["--node", "4"], "Did you mean '--nodes'?"),
    (["--nodes", "0"], "--nodes must be at least 1, got 0"),
    (["--nodes", "512"], "leaves no room"),
    (["--cache-length", "513"], "exceeds the 512 positions"),
    (["--template", "vicunna"], "Did you mean 'vicuna'?"),
    (["--backbone", "nowhere"], "nowhere is not a directory"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--prompts", "EMPTY"], "the file is empty"),
    (["--tree", "EMPTY"], "EMPTY line 1: not valid JSON"),
    (["--tree", "ORPHAN"], "has no parent"),
    (["--tree", "ORPHAN", "--nodes", "4"], "drop --nodes"),
    (["--out", "a.json", "--out-dir", "b"], "give one of them"),
]


def test_mistakes_in_options_and_files_are_answered_before_jittor_is_loaded(tmp_path):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "ORPHAN").write_text("[[0, 0]]")
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from bench.run import main; "
        "from runtime.entry import run_entry\n"
        "for words in json.loads(sys.argv[2]): assert run_entry(main, words) == 2\n"
        "assert 'jittor' not in sys.modules"
    )
    words = json.dumps([words for words, _ in EARLY])
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(EARLY) and all(line.startswith("error: ") for line in lines)
    for line, (_, expected) in zip(lines, EARLY, strict=True):
        assert expected in line
