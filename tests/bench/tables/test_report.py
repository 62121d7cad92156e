"""The Markdown table: numbers from the JSON files alone, one row a file, nothing else of the page touched."""

from pathlib import Path

import pytest

import bench.report
from bench.tables.report import BEGIN, END
from tests.bench.helpers import status_of

main = status_of(bench.report.main)


def rows_of(path):
    """Cells of the table's lines, header first, without the rule."""
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert set("".join(cells[1])) <= set("-:")
    return [cells[0], *cells[2:]]


def test_a_row_holds_the_numbers_of_its_file_and_names_it(write_result, tmp_path):
    path = write_result("a.json", metrics__speedup=1.93, metrics__speedup_ci=[1.81, 2.04], metrics__overhead=1.31,
                        metrics__tokens_per_s=123.456, metrics__accept_length_ci=[2.5, 3.5])  # fmt: skip
    out = tmp_path / "pages" / "README.md"
    assert main([path, "--out", str(out)]) == 0
    header, row = rows_of(out)
    assert header[7:10] == ["accept length [95%]", "tokens/s", "speedup [95%]"]
    assert row == [
        "gated_rnn", "tiny-vicuna", "a processor", "float16", "prompts/question.jsonl", "2", "64", "3.00 [2.50, 3.50]",
        "123.5", "1.93 [1.81, 2.04]", "1.31", "25.0%", "156.2", "0.000123", "2/2", "[a.json](../a.json)",
    ]  # fmt: skip


def test_refused_and_interrupted_results_say_so_in_the_language_of_the_page(write_result, make_row, tmp_path):
    rows = [make_row("p0"), make_row("p1", tokens=11, identical=False)]
    path = write_result("a.json", rows, metrics__speedup=9.87, status="interrupted", data__num_prompts=5)
    for name, title, refused, mark in (
        ("a.md", "head", "parity failed", "interrupted"), ("a_zh.md", "草稿头", "一致性检查未通过", "已中断")
    ):  # fmt: skip
        assert main([path, "--out", str(tmp_path / name)]) == 0
        header, row = rows_of(tmp_path / name)
        assert header[0] == title and refused in row and f"gated_rnn ({mark})" in row and "2/5" in row
        assert "9.87" not in (tmp_path / name).read_text(encoding="utf-8")


def test_unknown_costs_are_a_dash_and_a_changed_backbone_is_marked(write_result, tmp_path):
    adaptation = {"stats": {}, "greedy_agreement": 0.5, "token_agreement": 0.75}
    path = write_result("a.json", checkpoint=None, timing__draft_s=None, adaptation=adaptation)
    for name, mark in (("a.md", "gated_rnn (adapted backbone)"), ("a_zh.md", "gated_rnn (改动主干)")):
        assert main([path, "--out", str(tmp_path / name)]) == 0
        row = rows_of(tmp_path / name)[1]
        assert row[0] == mark and row[-5:-2] == ["-", "-", "-"]


def test_comparable_results_stand_together_with_the_fastest_first(write_result, tmp_path):
    paths = [
        write_result(f"{name}.json", head=name, metrics__speedup=speed, provenance__device_name=device)
        for name, speed, device in (("a", 1.5, "x"), ("b", 9.0, "y"), ("c", None, "x"), ("d", 2.5, "x"))
    ]
    assert main([*paths, "--out", str(tmp_path / "a.md")]) == 0
    assert [row[0] for row in rows_of(tmp_path / "a.md")[1:]] == ["d", "a", "c", "b"]


def test_updating_replaces_the_block_alone_and_twice_is_once(write_result, tmp_path):
    path = write_result("a.json")
    pages = [tmp_path / "README.md", tmp_path / "README_zh.md"]
    for page in pages:
        page.write_text(f"before\r\n{BEGIN}\nold | table\n{END}\nafter 结果\n", encoding="utf-8", newline="")
    assert main([path, "--update", *map(str, pages)]) == 0
    first = [page.read_bytes() for page in pages]
    for text in (page.decode() for page in first):
        assert text.startswith(f"before\r\n{BEGIN}\n|") and text.endswith(f"|\n{END}\nafter 结果\n")
        assert "old" not in text and "| [gated_rnn](a.json) |" in text
    assert "草稿头" in first[1].decode() and "草稿头" not in first[0].decode()
    assert main([path, "--update", *map(str, pages)]) == 0
    assert [page.read_bytes() for page in pages] == first


def test_the_table_of_a_text_has_the_main_columns_and_the_settings_that_differ(write_result, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    a = write_result("a.json")
    for paths, more in (([a], []), ([a, write_result("b.json", provenance__device_name="x")], ["device"])):
        assert main([*paths, "--update", str(page)]) == 0
        assert rows_of(page)[0] == ["head", "accept length [95%]", "tokens/s", "speedup [95%]", "parity", *more]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no marker", f"expected the marker {BEGIN} once, found it 0 times"),
        (f"{BEGIN}\n", f"expected the marker {END} once, found it 0 times"),
        (f"{BEGIN}{END}{BEGIN}", f"expected the marker {BEGIN} once, found it 2 times"),
        (f"{END}\n{BEGIN}\n", f"{END} comes before {BEGIN}"),
    ],
)
def test_a_page_without_its_markers_is_refused_and_no_page_changes(write_result, tmp_path, capsys, text, complaint):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(f"{BEGIN}\n{END}\n")
    bad.write_text(text)
    assert main([write_result("a.json"), "--out", str(tmp_path / "new.md"), "--update", str(good), str(bad)]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {bad}: {complaint}\n"
    assert (good.read_text(), bad.read_text()) == (f"{BEGIN}\n{END}\n", text)
    assert not (tmp_path / "new.md").exists()


def test_a_missing_page_is_one_line_and_status_2(write_result, tmp_path, capsys):
    words = [write_result("good.json"), "--update", str(tmp_path / "missing.md"), "--out", str(tmp_path / "new.md")]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and not (tmp_path / "new.md").exists()


def test_no_page_is_written_when_one_of_them_cannot_be(write_result, tmp_path, capsys, monkeypatch):
    pages = [tmp_path / "a.md", tmp_path / "b.md"]
    for page in pages:
        page.write_text(f"{BEGIN}\n{END}\n")

    def refuse_the_second(path):
        if str(path) == str(pages[1]):
            raise OSError(f"cannot write {path}: read-only")

    monkeypatch.setattr("bench.tables.report.check_writable", refuse_the_second)
    assert main([write_result("a.json"), "--update", *map(str, pages)]) == 2
    assert "read-only" in capsys.readouterr().err
    assert pages[0].read_text() == f"{BEGIN}\n{END}\n"


def test_without_a_page_the_table_is_printed_and_no_name_breaks_it(write_result, capsys):
    assert main([write_result("a b.json", head="x|y")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| head |") and "| x\\|y |" in out and "[a b.json](" in out and "a%20b.json)" in out
