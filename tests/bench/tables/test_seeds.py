"""Several seeds of a head: which results are put together, how the ratio pairs them, and what is refused."""

import json
from pathlib import Path

import pytest

import bench.seeds
from bench.tables.results import read_results
from bench.tables.seeds import find_group, group_runs, partners
from bench.tables.seeds_report import BEGIN, END
from tests.bench.helpers import cells_of, status_of

main = status_of(bench.seeds.main)


@pytest.fixture
def write_run(write_result, make_row):
    """Write the result of one seed: three prompts of two categories, 10, 20 and 30 tokens in ``passes``."""

    def write(head, seed, passes=(4, 8, 10), name=None, **changes):
        rows = [
            make_row(f"p{number}", category="math" if number else "chat", tokens=10 * (number + 1), passes=count,
                     baseline_tokens=10 * (number + 1), reached_by_depth=[count, 0], accepted_by_depth=[0, 0])
            for number, count in enumerate(passes)
        ]  # fmt: skip
        changes = {"checkpoint__seed": seed, **changes}
        if changes.get("checkpoint", True) is None:
            del changes["checkpoint__seed"]
        return write_result(name or f"{head}-{seed}.json", changes.pop("rows", rows), head=head, **changes)

    return write


def read(*paths):
    return read_results(paths)[0]


def table_of(text, title):
    """Cells of the printed table under a title, by the first one."""
    lines = text[text.index(title) :].splitlines()
    found = {}
    for line in lines[4:]:
        if not line.startswith("│"):
            break
        first, *found[first] = cells_of(line)
    return found


def test_a_line_is_a_head_with_means_over_its_seeds(write_run, tmp_path, capsys):
    paths = [
        write_run("mlp", 0, (5, 10, 15), checkpoint__train_s=10.0, checkpoint__parameters=2_000_000),
        write_run("mlp", 1, (10, 20, 30), checkpoint__train_s=20.0, checkpoint__parameters=2_000_000),
        write_run("moe", 1, (5, 5, 5), checkpoint__train_s=None),
        write_run("moe", 0, (4, 4, 4)),
    ]
    assert main([*paths, "--against", "mlp", "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    heads = table_of(out, "Heads over training seeds, 3 prompts")
    assert list(heads) == ["moe", "mlp"]  # the best first
    assert heads["mlp"][0] == "2 (0, 1)" and heads["mlp"][1].startswith("1.50 [") and heads["mlp"][2] == "1"
    assert heads["moe"][1].startswith("4.50 [")
    assert heads["moe"][2].startswith("3.25 [")  # by seed 5 / 2 and 4 / 1, whatever the order of the files
    assert (heads["mlp"][3], heads["mlp"][4], heads["moe"][4]) == ("2.00", "15.00", "-")
    by_category = table_of(out, "category")
    assert by_category["mlp"] == ["1.50", "1.50"] and by_category["moe"] == ["2.25", "5.62"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["kind"], written["against"], written["num_prompts"]) == ("seeds", "mlp", 3)
    moe, mlp = written["heads"]
    assert (moe["seeds"], moe["accept_length"]["by_run"]) == ([0, 1], [5.0, 4.0])
    assert moe["ratio"]["by_run"] == [2.5, 4.0] and moe["ratio"]["value"] == 3.25
    assert mlp["ratio"] is None and mlp["draft_ms"] is not None and moe["train_s"] is None


def test_options_tell_the_variants_of_a_head_apart(write_run):
    results = read(
        write_run("mlp", 0, name="a.json", config__head={"num_layers": 1, "num_depths": 4}),
        write_run("mlp", 0, name="b.json", config__head={"num_depths": 4, "num_layers": 2}),
        write_run("mlp", 1, name="c.json", config__head={"num_depths": 4, "num_layers": 2, "norm": True}),
        write_run("mlp", 1, name="d.json", config__head={"num_depths": 4, "num_layers": 1}),
        write_run("moe", 0),
    )
    groups = group_runs(results)
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("mlp (num_layers=1, norm=unset)", 2),
        ("mlp (num_layers=2, norm=unset)", 1),
        ("mlp (num_layers=2, norm=True)", 1),
        ("moe", 1),
    ]
    assert find_group(groups, "mlp (num_layers=2, norm=True)") is groups[2] and find_group(groups, "moe") is groups[3]
    with pytest.raises(ValueError, match="'mlp' names 3 heads"):
        find_group(groups, "mlp")
    with pytest.raises(ValueError, match=r"Unknown head 'meo'\. Did you mean 'moe'\?"):
        find_group(groups, "meo")


def test_runs_are_partners_by_seed_and_a_head_with_nothing_to_train_is_the_partner_of_every_seed(write_run):
    mlp = [write_run("mlp", seed) for seed in (2, 0, 1)]
    first, second = group_runs(read(*mlp, *(write_run("moe", seed) for seed in (1, 5, 2))))
    pairs = partners(first, second)
    assert pairs["seed"].tolist() == [1, 2] and all("moe" in path for path in pairs["path_reference"])
    for seeds, changes in ((None,), {"checkpoint": None}), ((0, 1), {"checkpoint__parameters": 0}):
        trained, floor = group_runs(read(*mlp, *(write_run("lookup", seed, **changes) for seed in seeds)))
        assert (trained.trained, floor.trained) == (True, False)
        assert partners(trained, floor)["seed"].tolist() == [0, 1, 2]
        assert partners(floor, trained)["seed_reference"].tolist() == [0, 1, 2]


def test_two_single_runs_are_compared_whatever_their_seeds(write_run, capsys):
    paths = [write_run("mlp", None), write_run("moe", 7)]
    assert main([*paths, "--against", "mlp"]) == 0
    heads = table_of(capsys.readouterr().out, "Heads over training seeds")
    assert heads["moe"][2].startswith("1.00 [") and heads["mlp"][0] == "1" and heads["moe"][0] == "1 (7)"
    assert all("one seed: interval over prompts alone" in cells[-1] for cells in heads.values())


def test_seeds_without_a_partner_are_noted_and_none_in_common_gives_no_ratio(write_run, capsys):
    paths = [write_run("mlp", 0), write_run("mlp", 1), write_run("moe", 1), write_run("moe", 2)]
    paths += [write_run("rnn", 8), write_run("rnn", 9)]
    assert main([*paths, "--against", "mlp"]) == 0
    heads = table_of(capsys.readouterr().out, "Heads over training seeds")
    assert heads["moe"][2].startswith("1.00 [") and "1 of 2 seeds are also mlp's" in heads["moe"][-1]
    assert heads["rnn"][2] == "-" and "0 of 2 seeds are also mlp's" in heads["rnn"][-1]


def test_unequal_training_is_a_warning_in_the_line(write_run, capsys):
    # The tokens of mlp's seeds differ as batches packed in another order do: no warning.
    paths = [write_run("mlp", s, checkpoint__train_steps=10, checkpoint__train_tokens=1000 + s) for s in (0, 1)]
    paths += [write_run("moe", seed, checkpoint__train_steps=10 + seed) for seed in (0, 1)]
    paths += [write_run("rnn", seed, checkpoint__train_tokens=None) for seed in (0, 1)]
    paths += [write_run("lookup", None, checkpoint=None)]
    assert main([*paths, "--against", "mlp"]) == 0
    heads = table_of(capsys.readouterr().out, "Heads over training seeds")
    assert heads["mlp"][-1] == heads["lookup"][-1] == "-"
    assert heads["moe"][-1] == "steps 10 to 11, mlp 10" and heads["rnn"][-1] == "tokens unknown"
    assert main([*paths[2:4]]) == 0  # without a reference the first head is the norm, here alone
    out = capsys.readouterr().out
    assert table_of(out, "Heads over training seeds")["moe"][-1] == "steps 10 to 11" and "ratio" not in out


def test_all_figures_are_of_the_prompts_that_count_in_every_result(write_run, make_row, tmp_path, capsys):
    failing = [
        make_row("p0", tokens=10, passes=5, baseline_tokens=10),
        make_row("p1", tokens=20, passes=10, baseline_tokens=20),
        make_row("p2", tokens=31, passes=1, baseline_tokens=30, identical=False),
    ]
    paths = [write_run("mlp", 0, (5, 5, 1)), write_run("moe", 0, rows=failing)]
    paths += [write_run("rnn", 0, rows=failing[:2], status="interrupted", data__num_prompts=3)]
    assert main([*paths, "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    heads = table_of(out, "Heads over training seeds, 2 prompts")
    assert heads["mlp"][1].startswith("3.00 [") and heads["moe"][1].startswith("2.00 [")
    assert "2 of 3 prompts count in every result" in err and "interrupted after 2 prompts" in err
    assert "parity failed (2/3 identical)" in err and "moe-0.json" in err
    assert json.loads((tmp_path / "out.json").read_text())["num_prompts"] == 2


def test_other_conditions_changed_backbones_and_the_baseline_are_mentioned(write_run, write_result, capsys):
    adaptation = {"stats": {}, "greedy_agreement": 0.5, "token_agreement": 0.75}
    paths = [write_run("mlp", 0), write_run("lora", 0, adaptation=adaptation, provenance__device_name="another")]
    assert main([*paths, write_result("ar.json", head="autoregressive", data__num_prompts=3)]) == 0
    out, err = capsys.readouterr()
    assert "device_name differs" in err and "lora-0.json" in err and "it changes the backbone" in err
    assert "note: left out" in err and "ar.json" in err and "autoregressive" not in out


def test_markdown_is_a_new_page_or_the_block_of_one(write_run, tmp_path):
    paths = [write_run("mlp", 0), write_run("mlp", 1), write_run("a|b", 0)]
    for name, word in (("new.md", "| head | seeds |"), ("new_zh.md", "| 草稿头 | 种子数 |")):
        page = tmp_path / "pages" / name
        assert main([*paths, "--against", "mlp", "--markdown", str(page)]) == 0
        text = page.read_text(encoding="utf-8")
        assert word in text and "| a\\|b |" in text and text.count(BEGIN) == text.count(END) == 1
        tables = [line for line in text.splitlines() if line.startswith("|")]
        assert len(tables) == 8
        assert main([*paths, "--against", "mlp", "--markdown", str(page)]) == 0
        assert page.read_text(encoding="utf-8") == text  # twice is once
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main([*paths, "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| head |") and text.endswith(f"|\n{END}\nafter\n") and "old" not in text


MISTAKES = {
    "prompts": (lambda write: [write("mlp", 0), write("mlp", 1, data__sha256="babe")], "prompts sha256 differs"),
    "nodes": (lambda write: [write("mlp", 0), write("moe", 0, config__decoding__num_nodes=8)], "tree budget"),
    "seed twice": (lambda write: [write("mlp", 0), write("mlp", 0, name="b.json")], "2 results of mlp have training"),
    "no seed": (lambda write: [write("mlp", 0), write("mlp", None)], "does not record its training seed"),
    "no head": (lambda write: [write("autoregressive", 0)], "no result of a head"),
    "no prompt": (lambda write: [write("mlp", 0), write("mlp", 1, rows=[])], "no prompt counts"),
    "against": (lambda write: [write("mlp", 0), "--against", "mpl"], "Did you mean 'mlp'?"),
}


@pytest.mark.parametrize(("make_arguments", "complaint"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_status_2_with_nothing_written(
    write_run, tmp_path, capsys, make_arguments, complaint
):
    def write(head, seed, **changes):
        return write_run(head, seed, **{"data__num_prompts": 3, **changes})

    arguments = make_arguments(write)
    targets = [tmp_path / "out" / "a.json", tmp_path / "out" / "a.md"]
    assert main([*arguments, "--json", str(targets[0]), "--markdown", str(targets[1])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and complaint in err
    assert not any(target.exists() for target in targets)


def test_a_target_that_would_be_lost_is_refused(write_run, tmp_path, capsys):
    path, page = write_run("mlp", 0), tmp_path / "README.md"
    page.write_text("a page without markers")
    for arguments, complaint in (
        (["--markdown", str(page)], f"expected the marker {BEGIN} once, found it 0 times"),
        (["--json", path], "is one of the results"),
    ):
        before = Path(path).read_bytes()
        assert main([path, *arguments]) == 2
        assert complaint in capsys.readouterr().err
        assert (page.read_text(), Path(path).read_bytes()) == ("a page without markers", before)
