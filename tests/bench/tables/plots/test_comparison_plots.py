"""The plots of a comparison: every head is named, odd results are drawn, and a plot of nothing is refused."""

import os

import pytest

import bench.compare
from tests.bench.helpers import status_of

main = status_of(bench.compare.main)


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_plots_name_every_head_category_and_phase(write_result, faster, make_row, tmp_path, ending, magic):
    failing = [make_row("p0", category="math"), make_row("p1", tokens=11, identical=False, category="chat")]
    paths = [write_result("a.json"), write_result("b.json", faster, head="mlp"), write_result("c.json", head="moe")]
    paths += [write_result("d.json", failing, head="bad"), write_result("e.json", head="autoregressive")]
    plot, frontier = (tmp_path / "plots" / f"{name}.{ending}" for name in ("plot", "frontier"))
    assert main([*paths, "--plot", str(plot), "--frontier", str(frontier)]) == 0
    assert plot.read_bytes().startswith(magic) and frontier.read_bytes().startswith(magic)
    assert sorted(os.listdir(plot.parent)) == sorted([plot.name, frontier.name])
    if ending == "svg":
        text = plot.read_text()
        for word in ("gated_rnn", "mlp", "math", "chat", "writing", "draft", "verify", "cache", "autoregressive"):
            assert f"<!-- {word} -->" in text, word
        text = frontier.read_text()
        for word in ("gated_rnn", "mlp", "moe", "bad (parity failed)", "Pareto frontier", "autoregressive"):
            assert f"<!-- {word} -->" in text, word


def test_the_plots_take_unknown_times_no_rows_and_a_single_prompt(write_result, make_row, tmp_path):
    timing = dict.fromkeys(("prefill_s", "draft_s", "verify_s", "accept_s", "cache_s", "host_s", "total_s"))
    odd = write_result("a.json", timing=timing, baseline=None, parity=None)
    empty = write_result("b.json", [], head="mlp", status="interrupted")
    baseline = write_result("c.json", head="autoregressive")
    for number, paths in enumerate(([odd], [empty], [baseline], [odd, empty, baseline])):
        assert main([*paths, "--plot", str(tmp_path / f"{number}.png")]) == 0
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
    assert main([write_result("d.json", [make_row("p0")]), "--frontier", str(tmp_path / "f.png")]) == 0


def test_the_frontier_leaves_out_what_has_no_draft_time_and_refuses_when_nothing_has(write_result, tmp_path, capsys):
    unknown = write_result("a.json", timing__draft_s=None)
    empty = write_result("b.json", [], head="mlp", status="interrupted")
    baseline = write_result("c.json", head="autoregressive")
    plot, other = tmp_path / "f.svg", tmp_path / "p.png"
    assert main([unknown, empty, baseline, "--frontier", str(plot), "--plot", str(other)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: no head with a draft time") and "a.json" in err
    assert not plot.exists() and not other.exists()
    assert main([unknown, baseline, write_result("d.json", head="moe"), "--frontier", str(plot)]) == 0
    text = plot.read_text()
    assert "<!-- moe -->" in text and "<!-- gated_rnn -->" not in text
