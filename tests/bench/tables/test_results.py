"""The data frame of results: one row per file, figures as recorded, unknown ones missing."""

from pathlib import Path

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
