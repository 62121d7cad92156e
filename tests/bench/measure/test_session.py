"""The measurement: both sides read the same prompts, are counted alike, and every way it can go wrong is answered."""

import contextlib
import functools
import io
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
from bench.record.schema import Record
from bench.run import main
from decoding.generate import first_difference, generate_autoregressive
from heads.checkpoint import save_checkpoint
from heads.registry import build, head_class
from runtime.entry import run_entry

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 12
TURNS = (
    ["Please book a table for two."],
    ["What films do you like?", "And music?"],
    ["Tell me a story about a fox."],
)


@pytest.fixture(scope="module", autouse=True)
def one_backbone():
    """The entry loads the same backbone every time; here it does so once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone.model, "load_backbone", functools.cache(backbone.model.load_backbone))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the prompts of this file and the runs of an untrained head."""
    folder = tmp_path_factory.mktemp("bench")
    write_prompts(folder / "prompts.jsonl", TURNS)
    frozen = backbone.model.load_backbone(None, "float16")
    head = build("gated_rnn", {"num_depths": 3, "inner_size": 16}, frozen)
    config = {
        "head": "gated_rnn",
        "head_config": {"num_depths": 3, "inner_size": 16},
        "backbone": {"fingerprint": frozen.fingerprint, "path": None},
        "tokenizer": {"fingerprint": load_tokenizer().fingerprint},
        "metrics": {"tree": [[0], [1], [0, 0], [2], [0, 1]], "stats": {"perplexity_before": 3.0}},
        "run": {"steps": 7, "tokens": 700, "train_s": 1.5},
        "trainer": {"seed": 5},
    }
    save_checkpoint(folder / "runs" / "gated_rnn" / "first" / "checkpoint", head, config, {})
    return folder


def write_prompts(path, conversations):
    lines = [
        json.dumps({"question_id": number, "category": f"c{number % 2}", "turns": turns})
        for number, turns in enumerate(conversations)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def run(folder, *arguments):
    """Exit status, stdout and stderr of the entry on this file's prompts and runs."""
    given = ["--greedy", "--runs", str(folder / "runs"), "--max-new-tokens", str(NEW_TOKENS), *map(str, arguments)]
    if "--prompts" not in given:
        given += ["--prompts", str(folder / "prompts.jsonl")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_entry(main, given)
    return status, out.getvalue(), err.getvalue()


def error_of(folder, *arguments):
    """The one line that a mistake is answered with."""
    status, out, err = run(folder, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and out == "" and len(lines) == 1, (status, out, err)
    return lines[0]


@pytest.fixture(scope="module")
def whole_run(folder):
    """One run over all prompts: its folder of results and its output."""
    results = folder / "results"
    status, out, err = run(folder, "--head", "gated_rnn", "--nodes", 5, "--out-dir", results)
    assert status == 0, err
    return results, out, err


@pytest.fixture(scope="module")
def record(whole_run):
    return Record.read(whole_run[0] / "gated_rnn.json")


def test_a_run_writes_the_head_and_its_autoregressive_twin(whole_run, record):
    results, out, _ = whole_run
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


def test_greedy_decoding_with_a_head_gives_the_tokens_of_its_twin(record):
    assert (record.parity.prompts, record.parity.identical, record.parity.first_difference) == (3, 3, None)
    assert [row.turns for row in record.per_prompt] == [1, 2, 1]


def test_both_sides_count_tokens_and_passes_alike(record):
    for row in record.per_prompt:
        assert row.tokens == row.baseline_tokens == row.baseline_passes <= row.turns * (NEW_TOKENS - 1)
        assert row.passes <= row.tokens <= row.passes + sum(row.accepted_by_depth)
        assert row.reached_by_depth[0] == row.passes
        assert row.accept_length == row.tokens / row.passes
    assert record.metrics.tokens == sum(row.tokens for row in record.per_prompt) == record.baseline.tokens
    assert record.metrics.speedup == pytest.approx(record.metrics.accept_length / record.metrics.overhead)
    assert record.metrics.speedup == pytest.approx(record.metrics.tokens_per_s / record.baseline.tokens_per_s)


def test_the_stages_add_up_to_the_total(whole_run, record):
    for each in (record, Record.read(whole_run[0] / "autoregressive.json")):
        t = each.timing
        stages = t.prefill_s + t.draft_s + t.verify_s + t.accept_s + t.cache_s + t.host_s
        assert stages == pytest.approx(t.total_s, rel=0.02)
        assert sum(row.time_s for row in each.per_prompt) == pytest.approx(t.total_s - t.prefill_s, rel=1e-6)
        assert sum(row.draft_s for row in each.per_prompt) == pytest.approx(t.draft_s, rel=1e-6)
    assert record.timing.draft_s > 0


def test_the_record_of_the_twin_holds_what_the_head_was_compared_with(whole_run, record):
    twin = Record.read(whole_run[0] / "autoregressive.json")
    assert twin.head == "autoregressive" and twin.checkpoint is twin.baseline is twin.parity is None
    assert twin.head_stats == {} and twin.adaptation is None
    assert twin.config.decoding.num_nodes == 1 and twin.config.decoding.tree == []
    assert twin.metrics.accept_length == 1 and twin.timing.draft_s == 0
    for row, own in zip(record.per_prompt, twin.per_prompt, strict=True):
        assert (row.baseline_tokens, row.baseline_time_s) == (own.tokens, own.time_s)


@pytest.fixture(scope="module")
def adapted_backbone():
    """The embedded backbone with noise on one matrix, larger than its weights: enough to change some replies."""
    frozen = backbone.model.load_backbone(None, "float16")
    shape = tuple(frozen.blocks[2].matrices()["down"].shape)
    change = np.random.default_rng(0).normal(0, 0.2, shape).astype(np.float32)
    return frozen.adapted({(2, "down"): change}, "test")


@pytest.fixture
def adapting(monkeypatch, adapted_backbone):
    """While the test runs, gated_rnn is a head that decodes with the adapted backbone."""
    monkeypatch.setattr(head_class("gated_rnn"), "decoding_backbone", property(lambda self: adapted_backbone))
    return adapted_backbone


def replies(backbone, prompts):
    """What autoregressive decoding says to each prompt."""
    rules = {"max_new_tokens": NEW_TOKENS, "stop_ids": load_tokenizer().eos_ids}
    return [generate_autoregressive(backbone, ids, **rules).token_ids for ids in prompts]


def test_a_head_that_changes_the_backbone_is_held_to_the_changed_one(folder, tmp_path, record, adapting):
    status, _, err = run(folder, "--head", "gated_rnn", "--nodes", 5, "--out-dir", tmp_path)
    assert status == 0, err
    found = Record.read(tmp_path / "gated_rnn.json")
    assert (found.parity.prompts, found.parity.identical, found.parity.first_difference) == (3, 3, None)
    # the conversations, with the original's replies for history
    tokenizer, frozen = load_tokenizer(), backbone.model.load_backbone(None, "float16")
    first, two, last = ([{"role": "user", "content": turns[0]}] for turns in TURNS)
    said = tokenizer.decode(replies(frozen, [tokenizer.encode_chat(two)])[0]).strip()
    second = [*two, {"role": "assistant", "content": said}, {"role": "user", "content": TURNS[1][1]}]
    prompts = [tokenizer.encode_chat(messages) for messages in (first, two, second, last)]
    original, adapted = replies(frozen, prompts), replies(adapting, prompts)
    same = [first_difference(a, b) for a, b in zip(original, adapted, strict=True)]
    assert {place is None for place in same} == {True, False}  # some replies change, some do not
    agreeing = [len(a) if place is None else place for a, place in zip(original, same, strict=True)]
    texts = [same[0] is None, same[1] is None and same[2] is None, same[3] is None]
    assert found.adaptation.greedy_agreement == sum(texts) / 3
    assert found.adaptation.token_agreement == sum(agreeing) / sum(map(len, original))
    assert found.adaptation.stats == found.head_stats == {"perplexity_before": 3.0}
    assert [row.adapted.agreeing_tokens for row in found.per_prompt] == [
        agreeing[0], agreeing[1] + agreeing[2], agreeing[3],
    ]  # fmt: skip
    assert "note: gated_rnn changes the backbone" in err
    # the head is compared with the original, which is what the run without the change measured too
    for row, plain in zip(found.per_prompt, record.per_prompt, strict=True):
        assert (row.baseline_tokens, row.prompt_tokens) == (plain.baseline_tokens, plain.prompt_tokens)
        assert row.tokens == row.adapted.tokens
    twin = Record.read(tmp_path / "autoregressive.json")
    assert [row.tokens for row in twin.per_prompt] == [row.baseline_tokens for row in record.per_prompt]
    assert found.metrics.speedup == pytest.approx(found.metrics.tokens_per_s / found.baseline.tokens_per_s)
    assert found.baseline.total_s == pytest.approx(sum(row.time_s for row in twin.per_prompt))


@pytest.mark.parametrize("side", ["head", "twin"])
def test_decoding_with_the_wrong_backbone_is_seen(folder, tmp_path, monkeypatch, adapting, side):
    """The control of the test above: either side on the original backbone breaks parity."""
    frozen = backbone.model.load_backbone(None, "float16")
    name = "generate" if side == "head" else "generate_autoregressive"
    right = getattr(bench.measure.attempts, name)
    monkeypatch.setattr(bench.measure.attempts, name, lambda _, *arguments, **rules: right(frozen, *arguments, **rules))
    status, _, err = run(folder, "--head", "gated_rnn", "--nodes", 5, "--out", tmp_path / "out.json")
    assert status == 0 and "prompts gave the tokens of its twin" in err
    record = Record.read(tmp_path / "out.json")
    assert record.parity.identical < 3 and record.parity.first_difference is not None
    assert record.adaptation.greedy_agreement == (1.0 if side == "twin" else pytest.approx(record.parity.identical / 3))


def test_an_adapted_backbone_of_another_shape_is_a_defect_of_the_head(monkeypatch):
    frozen = backbone.model.load_backbone(None, "float16")
    head = build("gated_rnn", {"num_depths": 3, "inner_size": 16}, frozen)
    other = backbone.model.load_backbone(None, "float32")
    monkeypatch.setattr(type(head), "decoding_backbone", property(lambda self: other))
    with pytest.raises(AssertionError, match="the original's shape and dtype"):
        bench.measure.attempts.Setup(frozen, load_tokenizer(), None, 8, head=head)


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


def test_a_checkpoint_with_fewer_paths_than_asked_for_is_said(folder, tmp_path):
    status, _, err = run(folder, "--head", "gated_rnn", "--nodes", 9, "--num-prompts", 1, "--out-dir", tmp_path)
    assert status == 0 and "6 nodes instead of 9" in err
    assert [path.name for path in tmp_path.iterdir()] == ["gated_rnn.json"]  # no twin's record: not the whole set
    assert Record.read(tmp_path / "gated_rnn.json").config.decoding.num_nodes == 6


def test_a_wrong_verification_is_seen_and_its_speedup_refused(folder, tmp_path, monkeypatch, capsys):
    right = decoding.rules.verify_greedy

    def wrong(parents, tokens, chosen):
        path, bonus = right(parents, tokens, chosen)
        return path, bonus if len(parents) == 1 else (bonus + 1) % 4096

    monkeypatch.setattr(decoding.rules, "verify_greedy", wrong)
    status, _, err = run(folder, "--nodes", 4, "--num-prompts", 2, "--out-dir", tmp_path)
    assert status == 0 and "only 0 of 2 prompts gave the tokens of its twin" in err
    record = Record.read(tmp_path / "gated_rnn.json")
    assert record.parity.identical == 0 and [row.identical for row in record.per_prompt] == [False, False]
    difference = record.parity.first_difference
    assert difference.prompt_id == "0" and difference.position == 1 and difference.logit_gap > 0
    assert difference.head_token == difference.baseline_token + 1
    assert record.metrics.speedup is None
    assert bench.compare.main([str(tmp_path / "gated_rnn.json")]) == 0
    assert "parity failed" in capsys.readouterr().out


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


def test_both_sides_end_alike_where_the_cache_is_full(folder, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", (["Tell me a story about a fox."],))
    length = len(load_tokenizer().encode_chat([{"role": "user", "content": "Tell me a story about a fox."}]))
    out = tmp_path / "out.json"
    status, _, err = run(folder, "--prompts", prompts, "--cache-length", length + 4, "--out", out)
    assert status == 0, err
    row = Record.read(out).per_prompt[0]
    assert row.finish_reason == "cache" and row.identical and row.tokens == row.baseline_tokens == 4


def test_when_nothing_fits_there_is_no_result_and_an_error(folder, tmp_path):
    answer = error_of(folder, "--cache-length", 20, "--out", tmp_path / "out.json")
    assert "no prompt could be measured" in answer and list(tmp_path.iterdir()) == []


def test_with_one_file_and_no_trained_head_the_twin_is_measured_alone(folder, tmp_path):
    out_file = tmp_path / "out.json"
    status, out, err = run(folder, "--runs", tmp_path / "none", "--num-prompts", 1, "--out", out_file)
    assert status == 0 and "python train.py --head NAME" in err
    assert json.loads(out.splitlines()[-1])["head"] == Record.read(out_file).head == "autoregressive"


def test_a_bare_run_measures_the_trained_heads_and_those_that_need_no_training(folder, tmp_path):
    status, out, err = run(folder, "--num-prompts", 1, "--out-dir", tmp_path)
    assert status == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gated_rnn.json", "prompt_lookup.json"]
    floor = Record.read(tmp_path / "prompt_lookup.json")
    assert Record.parse(json.loads(out.splitlines()[-1])) == floor
    assert floor.checkpoint is None and floor.config.head == {"num_depths": 8, "max_ngram": 3}
    assert floor.config.decoding.num_nodes == 16 and (floor.parity.prompts, floor.parity.identical) == (1, 1)
    assert Record.read(tmp_path / "gated_rnn.json").checkpoint is not None


def test_a_head_that_needs_no_training_is_measured_with_a_checkpoint_and_without(folder, tmp_path):
    one = ("--head", "prompt_lookup", "--num-prompts", 1, "--nodes", 3, "--out", tmp_path / "out.json")
    status, _, err = run(folder, "--runs", tmp_path / "runs", *one)
    assert status == 0, err
    assert Record.read(tmp_path / "out.json").checkpoint is None
    frozen = backbone.model.load_backbone(None, "float16")
    directory = tmp_path / "runs" / "prompt_lookup" / "a" / "checkpoint"
    config = {
        "head": "prompt_lookup",
        "head_config": {"num_depths": 3, "max_ngram": 2},
        "backbone": {"fingerprint": frozen.fingerprint, "path": None},
        "metrics": {"tree": [[0], [0, 0]]},
    }
    save_checkpoint(directory, build("prompt_lookup", config["head_config"], frozen), config, {})
    status, _, err = run(folder, "--runs", tmp_path / "runs", *one)
    assert status == 0, err
    record = Record.read(tmp_path / "out.json")
    assert record.checkpoint.parameters == 0 and record.config.head["max_ngram"] == 2
    assert record.config.decoding.tree == [[0], [0, 0]]
    config["backbone"]["fingerprint"] = "0123456789abcdef"
    (directory / "config.json").write_text(json.dumps(config))
    status, _, err = run(folder, "--runs", tmp_path / "runs", *one)
    assert status == 0 and "it is of another backbone; prompt_lookup is measured with its defaults" in err
    assert Record.read(tmp_path / "out.json").checkpoint is None


def test_a_checkpoint_of_another_backbone_is_refused_or_passed_over(folder, tmp_path):
    directory = tmp_path / "runs" / "gated_rnn" / "a" / "checkpoint"
    shutil.copytree(folder / "runs" / "gated_rnn" / "first" / "checkpoint", directory)
    config = json.loads((directory / "config.json").read_text())
    del config["digest"]  # as a checkpoint of an earlier version has none
    config["backbone"]["fingerprint"] = "0123456789abcdef"
    (directory / "config.json").write_text(json.dumps(config))
    answer = error_of(folder, "--checkpoint", directory, "--out", tmp_path / "out.json")
    assert "was trained on backbone 0123456789abcdef" in answer
    status, out, err = run(folder, "--runs", tmp_path / "runs", "--num-prompts", 1, "--out", tmp_path / "out.json")
    assert status == 0 and "trained on another backbone" in err
    assert json.loads(out.splitlines()[-1])["head"] == "autoregressive"


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


EARLY = [
    (["--node", "4"], "Did you mean '--nodes'?"),
    (["--nodes", "0"], "--nodes must be at least 1, got 0"),
    (["--nodes", "many"], "--nodes"),
    (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    (["--repeats", "0"], "--repeats must be at least 1"),
    (["--num-prompts", "0"], "--num-prompts must be at least 1"),
    (["--seed", "-1"], "--seed"),
    (["--dtype", "int8"], "int8"),
    (["--nodes", "512"], "leaves no room"),
    (["--cache-length", "513"], "exceeds the 512 positions"),
    (["--template", "vicunna"], "Did you mean 'vicuna'?"),
    (["--backbone", "nowhere"], "nowhere is not a directory"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--prompts", "EMPTY"], "the file is empty"),
    (["--tree", "EMPTY"], "EMPTY: "),
    (["--tree", "ORPHAN"], "has no parent"),
    (["--tree", "ORPHAN", "--nodes", "4"], "drop --nodes"),
    (["--out", "a.json", "--out-dir", "b"], "give one of them"),
    (["stray"], "unexpected argument 'stray'"),
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


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert all(f"(default: {value})" in text for value in ("runs", "float16", "128", "16", "results"))


def test_the_warm_up_leaves_no_kernel_for_the_clock(folder, tmp_path, monkeypatch):
    """Kernels count as they are loaded, from the cache or from the compiler; a new one is seen."""
    before = bench.measure.side_by_side.loaded_kernels()
    if before is None:
        pytest.skip("this system does not list loaded files")
    from runtime import jt

    (jt.array(np.ones((2, 3, 4), np.float32)).cos().sum() * 3.25).sync()
    assert bench.measure.side_by_side.loaded_kernels() > before
    status, _, err = run(folder, "--num-prompts", 2, "--out", tmp_path / "out.json")
    assert status == 0 and "first used on the clock" not in err
