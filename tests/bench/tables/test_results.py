"""The data frame of results: one row per file, figures as recorded, unknown ones missing."""

from pathlib import Path

import pandas as pd
import pytest

from bench.record.schema import Record
from bench.tables.results import load_results

RESULTS = Path(__file__).resolve().parents[3] / "results"


def test_the_results_of_the_repository_are_one_row_each_with_their_own_figures():
    paths = [path for path in sorted(RESULTS.glob("*.json")) if path.stem in ("mlp", "eagle", "autoregressive")]
    frame = load_results([*paths, RESULTS / "losses.json"]).set_index("head")  # losses.json is of another kind
    assert list(frame.index) == [path.stem for path in paths]
    for path in paths:
        metrics, row = Record.read(path).metrics, frame.loc[path.stem]
        assert (row["accept_length"], row["tokens_per_s"]) == (metrics.accept_length, metrics.tokens_per_s)
        assert (row["accept_length_low"], row["accept_length_high"]) == metrics.accept_length_ci
    assert frame["speedup"].isna().tolist() == [True, False, False] and frame["parameters"].dtype == "Int64"
    assert frame.groupby("backbone")["speedup"].max().item() == frame["speedup"].max()


def test_a_failed_parity_check_has_no_speedup_and_missing_values_are_missing(write_result, make_row):
    rows = [make_row("p0"), make_row("p1", tokens=11, identical=False)]
    frame = load_results([write_result("a.json", rows, metrics__speedup=9.0, checkpoint=None)])
    row = frame.iloc[0]
    assert row["parity_failed"] and pd.isna(row["speedup"]) and pd.isna(row["speedup_low"])
    assert pd.isna(row["parameters"]) and pd.isna(row["seed"]) and row["parity"] == "1/2"


def test_a_file_that_is_no_result_is_refused_by_name(write_result, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: its kind is 'missing'"):
        load_results([write_result("a.json"), tmp_path / "bad.json"])
