"""A projection is arithmetic on a measured result and a measured curve, and says that it is nothing more."""

import json
from pathlib import Path

import pandas as pd
import pytest

import bench.compare
from bench.tables.projection.projection import project, project_published, read_profile
from bench.tables.projection.published import PUBLISHED, Published, eagle, medusa
from bench.tables.results import load_results
from tests.bench.helpers import status_of

PASSES = [(1, 8, 2.0), (4, 8, 2.5), (64, 8, 4.5), (1, 500, 3.0), (64, 500, 9.0), (16, 999, 1.0)]
ENGINE = json.loads((Path(__file__).resolve().parents[4] / "results" / "engine-tiny-vicuna.json").read_text())
main = status_of(bench.compare.main)


def shape(name, passes=PASSES, **changes):
    """A shape of an engine measurement with these passes of (rows, context, milliseconds)."""
    one = ENGINE["shapes"][0]
    passes = [{**one["passes"][0], "rows": rows, "context": context, "ms": ms} for rows, context, ms in passes]
    return {**one, "name": name, "passes": passes, **changes}


def engine(**changes):
    """An engine measurement: a small shape with two contexts that have a one-row pass, and a large one with one."""
    shapes = [shape("tiny-vicuna"), shape("large", PASSES[:3], dtype="float32")]
    return {**ENGINE, "provenance": {}, "device": "a card", "shapes": shapes, **changes}


@pytest.fixture
def write_profile(tmp_path):
    def write(content=None):
        path = tmp_path / "engine.json"
        path.write_text(json.dumps(engine() if content is None else content))
        return str(path)

    return write


def result_of(write_result, rows=None, **changes):
    """The result a 64-node tree gave: two prompts of 7 tokens, 24 tokens in 8 passes and 5 s against 24 passes in 8 s,
    a quarter of the 5 s drafting: a draft takes 1.25 / 8 s, a one-row pass 8 / 24 s."""
    return load_results([write_result("a.json", rows, **changes)])


def test_a_profile_is_read_by_shape_and_interpolated_by_rows(write_profile):
    profile = read_profile(write_profile())
    assert (profile.device, profile.shape, profile.dtype) == ("a card", "tiny-vicuna", "float16")
    assert sorted(profile.curves) == [8, 500]  # after 999 rows there is no one-row pass
    assert [profile.ms(rows, 8) for rows in (1, 2, 4, 34, 64, 65, 0)] == [
        2.0, pytest.approx(2.0 + 0.5 / 3), 2.5, 3.5, 4.5, None, None,
    ]  # fmt: skip
    assert [profile.nearest(context) for context in (0, 254, 255, 9999)] == [8, 8, 500, 500]
    assert read_profile(write_profile(), "large").dtype == "float32"
    named = engine(provenance={"device_name": "its name"})
    assert read_profile(write_profile(named)).device == "its name"


def test_a_projection_is_verification_by_the_curve_and_drafting_in_one_row_passes(write_result, write_profile):
    frame, profile = result_of(write_result), read_profile(write_profile())
    assert frame["context_rows"].item() == 7 + (5 + 7) / 2
    (found,) = project(frame, profile).itertuples()
    assert (found.nodes, found.context, found.verify_ms) == (64, 8, 4.5) and pd.isna(found.refused)
    assert found.accept_length == 3.0 and found.draft_passes == pytest.approx((1.25 / 8) / (8 / 24))
    assert found.pass_ms == pytest.approx(4.5 + 2.0 * 0.46875)
    assert found.tokens_per_s == pytest.approx(3e3 / found.pass_ms)
    assert found.speedup == pytest.approx(3 * 2.0 / found.pass_ms)
    assert found.speedup_free_drafts == pytest.approx(3 * 2.0 / 4.5)


def test_a_projection_onto_the_curve_of_the_measurement_is_the_measurement(write_result, write_profile):
    """Control: with a curve whose passes take what they took here, the speedup that was measured comes out."""
    frame = result_of(write_result)
    curve = [(1, 9, 1e3 * 8 / 24), (64, 9, 1e3 * (5 / 8 - 1.25 / 8))]
    found = project(frame, read_profile(write_profile(engine(shapes=[shape("here", curve)]))))
    assert found["speedup"].item() == pytest.approx(frame["speedup"].item())
    assert found["tokens_per_s"].item() == pytest.approx(frame["tokens_per_s"].item())


def test_what_cannot_be_projected_is_refused_with_its_reason(write_result, write_profile, make_row):
    profile = read_profile(write_profile())
    failing = [make_row("p0"), make_row("p1", identical=False)]
    for rows, changes, reason in (
        (failing, {}, "parity failed"),
        (None, {"config__decoding__num_nodes": 65}, "the profile ends at 64 rows"),
        (None, {"baseline": None}, "no baseline to express drafting in"),
        (None, {"timing__draft_s": None}, "nothing measured"),
    ):
        assert project(result_of(write_result, rows, **changes), profile)["refused"].item() == reason
    alone = result_of(write_result, head="autoregressive", config__decoding__num_nodes=1, baseline=None)
    (found,) = project(alone, profile).itertuples()
    assert (found.draft_passes, found.pass_ms) == (0, 2.0)


def test_the_comparison_keeps_projections_apart(write_result, write_profile, tmp_path, capsys):
    paths = [write_result("a.json"), write_result("b.json", head="mlp", config__decoding__tree=None)]
    assert main([*paths, "--json", str(tmp_path / "plain.json")]) == 0
    measured = capsys.readouterr().out
    arguments = ["--profile", write_profile(), "--profile-shape", "large", "--json", str(tmp_path / "out.json")]
    assert main([*paths, *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(measured) and "Projection, not measured: large, float32, on a card" in out
    assert "with free drafts: the upper bound" in " ".join(out.split())
    assert "measured on tiny-vicuna (4 layers, 256 wide), the profile is of large: another backbone" in err
    assert "the tree of mlp changes from step to step" in err
    plain, content = (json.loads((tmp_path / name).read_text()) for name in ("plain.json", "out.json"))
    assert plain["projection"] is None and plain["results"] == content["results"]
    assert [row["label"] for row in content["projection"]["results"]] == ["gated_rnn", "mlp"]
    assert "one-row passes" in content["projection"]["assumed"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (engine(kind="generation"), "its kind is 'generation', not 'engine'"),
        (engine(shapes=[]), "there are none"),
        (engine(shapes=[{"name": "a", "dtype": "b"}]), r"shapes\.0\.num_layers: Field required"),
        (engine(shapes=[shape("a", [(2, 1, 1.0)])]), "a profile needs passes of one row"),
        (engine(shapes=[shape("a", [(1, 1, 0.0)])]), "times above 0 ms"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(write_profile, content, complaint):
    with pytest.raises(ValueError, match=rf"engine\.json: .*{complaint}"):
        read_profile(write_profile(content))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("GOOD --profile PROFILE --profile-shape huge", "no shape 'huge'; there are tiny-vicuna, large"),
        ("GOOD --profile-shape large", "give --profile FILE as well"),
        ("GOOD --profile GOOD", "its kind is 'generation', not 'engine'"),
        ("", "give result files of bench/run.py, or --published with --profile FILE"),
        ("--published", "--published needs the curve of a machine; give --profile FILE as well"),
        ("--published --profile PROFILE", "those of a 7B backbone, the profile is of tiny-vicuna"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(write_result, write_profile, capsys, words, complaint):
    words = words.replace("GOOD", write_result("a.json")).replace("PROFILE", write_profile())
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and complaint in err


# What others have published -------------------------------------------------------------------------------------------


def seven_b():
    """The curve of a made-up card: 5 ms a row, 6 ms for 64, 2000 GB/s."""
    bounds = {**ENGINE["shapes"][0]["bounds"], "read_gb_s": 2000.0}
    return engine(shapes=[shape("7b", [(1, 500, 5.0), (64, 500, 6.0)], bounds=bounds)])


def test_a_published_result_is_projected_as_in_the_worked_example(write_profile):
    profile = read_profile(write_profile(seven_b()))
    result = Published("a", 4.0, None, 64, 10**9, "a paper")
    (found,) = project_published(profile, [result]).itertuples()
    assert (found.verify_ms, found.draft_ms, found.context) == (6.0, 1.0, 500)
    assert found.speedup == pytest.approx(20 / 7)
    (wide,) = project_published(profile, [Published("b", 4.0, None, 65, 1, "a paper")]).itertuples()
    assert wide.refused == "the profile ends at 64 rows" and pd.isna(wide.speedup)


def test_the_weights_of_published_heads_are_those_that_their_papers_give():
    # Medusa's head: 4096^2 and 32000 x 4096; EAGLE's draft model for a 7B has 0.24 billion weights beside the LM head
    assert medusa(1) == 147_849_216
    assert eagle(1) - 32000 * 4096 == pytest.approx(0.24e9, rel=0.02)


def test_every_published_number_names_its_source():
    for each in PUBLISHED:
        assert "arXiv" in each.source and each.accept_length > 1 and 1 < each.rows <= 64
    others = [each for each in PUBLISHED if each.backbone != "Vicuna 7B"]
    assert [each.name for each in others] == ["EAGLE-3"] and "Vicuna 13B" in others[0].source


def test_published_results_are_kept_separate_from_measured_ones(write_result, write_profile, tmp_path, capsys):
    profile = write_profile(seven_b())
    assert main(["--profile", profile, "--published", "--json", str(tmp_path / "out.json")]) == 0
    out, _ = capsys.readouterr()
    assert "Projection of published accept lengths, not measured: 7b" in out and "arXiv 2406.16858" in out
    assert "accept lengths as published (temperature 0, batch 1), not measured here" in out and "Results" not in out
    content = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in content["published"]["results"]] == [each.name for each in PUBLISHED]
    assert content["results"] == [] and content["projection"] is None
    assert main([write_result("a.json"), "--profile", profile, "--published"]) == 0
    both = capsys.readouterr().out
    assert "Results" in both and "Projection, not measured: 7b" in both and "published accept lengths" in both
