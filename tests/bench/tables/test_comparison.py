"""The comparison: what it warns about, what it refuses, and that a bad file writes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bench.compare
from bench.tables.comparison import head_to_head
from bench.tables.numbers import format_number
from bench.tables.results import differences, find_result, load_results, read_results, sort_results
from tests.bench.helpers import cells_of, status_of

ROOT = Path(__file__).resolve().parents[3]
main = status_of(bench.compare.main)
DIFFERENT = {"tokens": 11, "identical": False}


def test_the_table_shows_the_numbers_of_each_file(write_result, capsys):
    path = write_result("a.json", metrics__speedup=1.93, metrics__speedup_ci=[1.81, 2.04], metrics__overhead=1.31,
                        metrics__tokens_per_s=123.456, metrics__accept_length_ci=[2.5, 3.5])  # fmt: skip
    assert main([path]) == 0
    out, err = capsys.readouterr()
    assert cells_of(next(line for line in out.splitlines() if "gated_rnn" in line)) == [
        "gated_rnn", "tiny-vicuna", "64", "float16", "2", "3.00 [2.50, 3.50]", "123.5", "1.93 [1.81, 2.04]", "1.31",
        "25.0%", "156.2", "0.000123", "1.50", "2/2",
    ]  # fmt: skip
    assert err == ""


def test_a_failed_parity_check_refuses_the_speedup_everywhere(write_result, make_row, tmp_path, capsys):
    rows = [make_row("p0"), make_row("p1", **DIFFERENT)]
    bad = write_result("bad.json", rows, metrics__speedup=9.87, head="mlp")
    good = write_result("good.json", metrics__speedup=1.23)
    assert main([good, bad, "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    assert "9.87" not in out and "1.23" in out
    assert out.count("parity failed") == 2  # the table's speedup and the ratio of tokens/s
    assert "parity failed (1/2 identical), speedup refused" in err and "bad.json" in err
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["speedup"] for row in written["results"]] == [1.23, None]
    assert [row["speedup_ci"] for row in written["results"]][1] is None
    assert written["head_to_head"][0]["tokens_per_s"] is None
    assert written["head_to_head"][0]["accept_length"] is not None


def test_an_unchecked_parity_shows_its_speedup_with_a_warning(write_result, make_row, capsys):
    rows = [make_row("p0", identical=None), make_row("p1", identical=None)]
    assert main([write_result("a.json", rows, metrics__speedup=1.23)]) == 0
    out, err = capsys.readouterr()
    assert "1.23" in out and "not checked" in out
    assert "parity was not checked" in err


def test_an_interrupted_result_is_marked(write_result, capsys):
    assert main([write_result("a.json", status="interrupted", data__num_prompts=80)]) == 0
    out, err = capsys.readouterr()
    assert "gated_rnn (interrupted)" in out and "2/80" in out
    assert "interrupted after 2 of 80 prompts" in err


@pytest.mark.parametrize(
    ("field", "value", "name", "shown"),
    [
        ("provenance__device", "cuda", "device differs", "cpu in {a}; cuda in {b}"),
        ("provenance__device_name", None, "device_name", "a processor in {a}; unknown in {b}"),
        ("config__backbone__fingerprint", "0ff", "backbone fingerprint", "f00d in {a}; 0ff in {b}"),
        ("data__sha256", "babe", "prompts sha256", "cafe in {a}; babe in {b}"),
        ("config__decoding__num_nodes", 16, "tree budget", "64 in {a}; 16 in {b}"),
        ("config__backbone__storage", "int8", "weights differs", "float16 in {a}; int8 in {b}"),
        ("config__decoding__tree", None, "kind of tree", "fixed in {a}; dynamic in {b}"),
    ],
)
def test_each_unequal_condition_is_named_with_its_values_by_file(write_result, field, value, name, shown):
    a, b = write_result("a.json"), write_result("b.json", head="mlp", **{field: value})
    (sentence,) = differences(load_results([a, b]))
    assert name in sentence
    assert shown.format(a=a, b=b) in sentence


def test_only_uncommitted_changes_are_reported_where_conditions_are_equal(write_result):
    baseline = write_result("ar.json", head="autoregressive", config__decoding__num_nodes=1)  # it has no tree
    paths = [write_result("a.json"), write_result("b.json", head="mlp"), baseline]
    assert differences(load_results(paths)) == []
    paths += [write_result("c.json", head="moe", provenance__git_dirty=True)]
    (sentence,) = differences(load_results(paths))
    assert "git_dirty" in sentence and "c.json" in sentence and "a.json" not in sentence


def test_heads_are_compared_with_the_first_on_shared_prompts(write_result, faster, tmp_path, capsys):
    paths = [write_result("a.json"), write_result("b.json", faster, head="mlp")]
    assert main([*paths, "--json", str(tmp_path / "out.json")]) == 0
    assert "mlp / gated_rnn" in capsys.readouterr().out
    (pair,) = json.loads((tmp_path / "out.json").read_text())["head_to_head"]
    assert (pair["head"], pair["against"], pair["prompts"]) == ("mlp", "gated_rnn", 2)
    assert pair["accept_length"] == {"ratio": 2.0, "interval": [2.0, 2.0]}
    assert pair["tokens_per_s"]["ratio"] == 2.0


def test_a_named_pair_is_compared_alone_and_in_the_order_asked(write_result, faster, capsys):
    paths = [write_result("a.json"), write_result("b.json", faster, head="mlp"), write_result("c.json", head="moe")]
    assert main([*paths, "--head-to-head", "gated_rnn", "mlp"]) == 0
    out = capsys.readouterr().out
    assert "gated_rnn / mlp" in out and "0.50 [0.50, 0.50]" in out
    assert "moe /" not in out


def test_prompts_of_another_file_are_never_paired(write_result, capsys):
    paths = [write_result("a.json"), write_result("b.json", head="mlp", data__sha256="babe")]
    assert main(paths) == 0
    out, err = capsys.readouterr()
    assert "mlp / gated_rnn" not in out
    assert "no paired ratio: mlp and gated_rnn were measured on different prompt files" in err
    assert main([*paths, "--head-to-head", "mlp", "gated_rnn"]) == 2
    results, _ = read_results(paths)
    with pytest.raises(ValueError, match="different prompt files"):
        head_to_head(*results)


def test_results_of_one_head_are_distinguished_by_file(write_result):
    results, _ = read_results([write_result("a.json"), write_result("b.json"), write_result("c.json", head="mlp")])
    assert [result.label for result in results] == ["gated_rnn (a)", "gated_rnn (b)", "mlp"]
    assert find_result(results, "b") is results[1]
    assert find_result(results, "mlp") is results[2]
    with pytest.raises(ValueError, match=r"names 2 results.*a\.json"):
        find_result(results, "gated_rnn")
    with pytest.raises(ValueError, match=r"Unknown head 'mpl'\. Did you mean 'mlp'\?"):
        find_result(results, "mpl")


def test_what_a_head_costs_is_shown_and_null_where_unknown(write_result, tmp_path, capsys):
    known = write_result("a.json", checkpoint__parameters=4_457_472, timing__draft_s=0.002, checkpoint__train_s=119.52)
    unknown = write_result("b.json", head="mlp", checkpoint=None, timing__draft_s=None)
    assert main([known, unknown, "--json", str(tmp_path / "out.json")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "float16" in line]
    cells = [cells_of(line)[-5:-1] for line in lines]
    assert cells == [["0.0%", "0.25", "4.46", "119.5"], ["-", "-", "-", "-"]]
    written = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["parameters"], row["draft_ms"], row["train_s"]) for row in written] == [
        (4_457_472, 0.25, 119.52),
        (None, None, None),
    ]


ADAPTATION = {"stats": {"perplexity_after": 3.5}, "greedy_agreement": 0.5, "token_agreement": 0.75}


def test_a_head_that_changes_the_backbone_is_warned_about(write_result, tmp_path, capsys):
    paths = [write_result("a.json"), write_result("b.json", head="mlp", adaptation=ADAPTATION)]
    assert main([*paths, "--json", str(tmp_path / "out.json")]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "changes the backbone" in line]
    assert len(warnings) == 1 and "b.json" in warnings[0]
    assert "50% of its texts are the original's, 75.0% of the tokens" in warnings[0]
    written = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["greedy_agreement"], row["token_agreement"]) for row in written] == [(None, None), (0.5, 0.75)]


def test_sorting_puts_the_best_first_and_the_unknown_last(write_result):
    paths = [
        write_result(f"{name}.json", head=name, metrics__speedup=speed, metrics__overhead=cost, timing__draft_s=draft)
        for name, speed, cost, draft in (("b", 1.5, 1.2, 0.2), ("a", None, None, None), ("c", 2.5, 2.0, 0.1))
    ]
    frame = load_results(paths)
    for column, order in (("speedup", "cba"), ("overhead", "bca"), ("head", "abc"), ("draft_ms", "cba")):
        assert sort_results(frame, column)["head"].tolist() == list(order)
    with pytest.raises(ValueError, match=r"Did you mean 'speedup'\?"):
        sort_results(frame, "speed_up")


def test_files_of_another_kind_are_skipped_with_a_note(write_result, tmp_path, capsys):
    (tmp_path / "engine.json").write_text('{"kind": "engine", "schema_version": 3}')
    assert main([write_result("a.json"), str(tmp_path / "engine.json")]) == 0
    out, err = capsys.readouterr()
    assert "gated_rnn" in out
    assert "note: skipped" in err and "engine.json: its kind is 'engine'" in err
    assert main([str(tmp_path / "engine.json")]) == 2
    assert "no generation result" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "GOOD F/bad.json", "GOOD F/missing.json", "GOOD --sort speeed", "GOOD --head-to-head mlp gated_rnn",
        "GOOD --head-to-head gated_rnn gated_rnn", "GOOD --plot F/plot.gif", "GOOD --plot F/bad.json/plot.png",
        "GOOD --json GOOD", "GOOD --frontier F/plot.gif", "GOOD --plot F/a.png --frontier F/a.png",
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2_with_nothing_written(write_result, tmp_path, capsys, words):
    good = write_result("good.json")
    (tmp_path / "bad.json").write_text('{"kind": "generation", "schema_version": 1}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = words if "--json" in words else f"{words} --json F/out.json"
    assert main(words.replace("GOOD", good).replace("F/", f"{tmp_path}/").split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_it_runs_as_a_script_and_a_pipe_gets_complete_lines(write_result):
    path = write_result("a.json", head="a_head_with_a_name_so_long_that_eighty_columns_cannot_hold_the_table")
    done = subprocess.run(
        [sys.executable, "bench/compare.py", path], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert any("cannot_hold_the_table" in line and "2/2" in line for line in done.stdout.splitlines())
    assert max(map(len, done.stdout.splitlines())) < 250


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [(None, None, "-"), (1.5, None, "1.50"), (123.45, None, "123.5"), (0.01234, None, "0.0123"),
     (2.0, (1.9, 2.1), "2.00 [1.90, 2.10]"), (0.0, None, "0")],
)  # fmt: skip
def test_numbers_are_printed_with_three_figures(value, interval, text):
    assert format_number(value, interval) == text


SAMPLED = {"greedy": False, "accept": "lossless", "temperature": 0.7, "top_p": 0.9, "top_k": 0}


def test_results_with_different_rules_are_warned_about(write_result, make_record, make_row):
    rows = [make_row("p0", identical=None), make_row("p1", identical=None)]
    decoding = make_record()["config"]["decoding"]
    paths = [write_result("greedy.json")]
    for name, changes in (("a", {}), ("b", {"temperature": 1.0}), ("c", {"draft": "sampled"})):
        changed = {**decoding, **SAMPLED, **changes}
        paths.append(write_result(f"{name}.json", rows, head=name, parity=None, config__decoding=changed))
    frame = load_results(paths)
    (sentence,) = differences(frame)
    assert sentence.startswith("acceptance differs: greedy in ")
    assert "lossless, temperature 0.7, top-p 0.9, top-k 0, top drafts in " in sentence
    assert "temperature 1," in sentence and "sampled drafts" in sentence
    assert differences(frame[1:2]) == []
