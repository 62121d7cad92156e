"""The result schema: what fits is read back to the last digit, what does not is refused by name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from bench.record.engine import EngineRecord
from bench.record.schema import AdaptedText, Record
from runtime.records import OtherKindError
from tests.bench.helpers import set_fields

ROOT = Path(__file__).resolve().parents[3]


def test_a_record_read_back_equals_the_one_written(tmp_path, make_record):
    path = tmp_path / "new" / "folder" / "a.json"
    record = Record.parse(make_record())
    record.write(path)
    assert Record.read(path) == record
    assert json.loads(path.read_text()) == make_record() == json.loads(record.to_json())
    assert "\n" not in record.to_json()  # the last line of stdout
    assert os.listdir(path.parent) == ["a.json"]


def test_a_file_from_before_a_field_was_added_is_read_with_its_default(tmp_path, make_record):
    data = make_record()
    del data["checkpoint"]["seed"], data["checkpoint"]["tree_nodes"], data["head_stats"], data["adaptation"]
    for name in ("accept", "temperature", "top_p", "top_k", "draft", "epsilon", "alpha"):  # greedy decoding alone
        del data["config"]["decoding"][name]
    for row in data["per_prompt"]:
        del row["adapted"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    assert Record.read(path) == Record.parse(make_record(checkpoint__seed=None, head_stats={}))


OTHER_KINDS = {"losses", "conversion", "hybrid", "served", "gpu-check"}  # written and read by one entry each


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.json")), ids=lambda path: path.name)
def test_the_results_of_the_repository_are_read(path):
    kind = json.loads(path.read_text())["kind"]
    if kind in OTHER_KINDS:
        with pytest.raises(OtherKindError):  # the tables leave it out with a note
            Record.read(path)
    elif path.name.startswith("engine-"):
        assert all(shape.passes for shape in EngineRecord.read(path).shapes)
    else:
        assert Record.read(path).per_prompt


def test_numpy_numbers_tuples_paths_and_rows_are_taken_as_they_are(make_record, make_row):
    data = make_record()
    data["metrics"]["tokens"] = np.int64(7)
    data["metrics"]["speedup"] = np.float32(0.5)
    data["config"]["decoding"]["tree"] = ((0,), (0, 1))
    data["checkpoint"]["path"] = Path("runs/a")
    data["per_prompt"] = [make_row("p0")]
    record = Record.parse(data)
    assert (record.metrics.tokens, record.metrics.speedup) == (7, 0.5)
    assert record.config.decoding.tree == [[0], [0, 1]]
    assert record.checkpoint.path == "runs/a"
    assert record.per_prompt == [make_row("p0")]


def test_a_number_that_json_does_not_know_becomes_null_in_free_form_parts(make_record):
    data = make_record()
    data["provenance"]["load"] = float("nan")  # must not cost a finished run
    assert json.loads(Record.parse(data).to_json(), parse_constant=pytest.fail)["provenance"]["load"] is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"metrics__speedup": "fast"}, r"metrics\.speedup: .*got 'fast'"),
        ({"metrics__speedup": float("nan")}, r"metrics\.speedup: .*finite"),
        ({"metrics__tokens": "7"}, r"metrics\.tokens: .*got '7'"),
        ({"metrics__accept_rate": [1.5]}, r"metrics\.accept_rate\.0"),
        ({"metrics__speed_up": 2.0}, r"metrics\.speed_up: Extra inputs"),
        ({"config__backbone__engine": "numpy"}, r"config\.backbone\.engine"),
        ({"config__repeats": 0}, r"config\.repeats"),
        ({"provenance__threads": object}, r"a type cannot be written"),
        ({"parity__identical": 3}, r"identical \(3\) exceeds prompts \(2\)"),
        ({"adaptation": {"stats": {}}}, r"adaptation\.greedy_agreement: Field required"),
        ({"config__decoding__accept": "lossless"}, "greedy is True, accept 'lossless'"),
        ({"config__decoding__greedy": False, "config__decoding__accept": "typical"}, "there is no temperature"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_field(make_record, changes, complaint):
    data = set_fields(make_record(), changes)
    with pytest.raises(ValueError, match=complaint):
        Record.parse(data)


def test_a_missing_field_and_a_repeated_prompt_are_named(make_record, make_row):
    data = make_record()
    del data["timing"]["host_s"]
    with pytest.raises(ValueError, match=r"x\.json: timing\.host_s: Field required"):
        Record.parse(data, "x.json")
    data = make_record()
    data["per_prompt"][1]["prompt_id"] = "p0"
    with pytest.raises(ValueError, match="'p0' twice"):
        Record.parse(data)


@pytest.mark.parametrize(
    ("accepted", "reached"),
    [([5, 0], [4, 4]), ([4], [4, 4]), ([2, 1], [4, 3])],
    ids=["more accepted than tried", "unequal depths", "reached below a refusal"],
)
def test_depth_counts_that_contradict_each_other_are_refused(make_row, accepted, reached):
    assert make_row(accepted_by_depth=[3, 1], reached_by_depth=[4, 3])
    with pytest.raises(ValueError, match="depth"):
        make_row(accepted_by_depth=accepted, reached_by_depth=reached)


def test_an_identical_row_cannot_differ_in_its_number_of_tokens(make_row):
    assert make_row(identical=False, tokens=10, baseline_tokens=9)
    with pytest.raises(ValueError, match="10 tokens against the baseline's 9"):
        make_row(identical=True, tokens=10, baseline_tokens=9)


def test_an_identical_row_of_an_adapted_backbone_has_the_tokens_of_that_backbone(make_row):
    adapted = AdaptedText(tokens=9, agreeing_tokens=10)  # the first token of the turn counts among the agreeing ones
    assert make_row(tokens=9, baseline_tokens=12, adapted=adapted)
    with pytest.raises(ValueError, match="12 tokens against the adapted backbone's 9"):
        make_row(tokens=12, baseline_tokens=12, adapted=adapted)
    for baseline_tokens in (12, 8):  # no more can agree than the shorter text has
        with pytest.raises(ValueError, match="agreeing_tokens is 11, of at most"):
            make_row(tokens=9, baseline_tokens=baseline_tokens, adapted=AdaptedText(tokens=9, agreeing_tokens=11))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b'{"kind": "generation",\n "schema_version": }', r"a\.json line 2: not valid JSON"),
        (b'{"head": "\xff"}', r"a\.json is not UTF-8"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"kind": "generation", "schema_version": 2}', "schema_version is 2; .* reads 1"),
        (b"{}", "its kind is 'missing', not 'generation'"),
        (b'{"kind": "engine", "schema_version": 7}', "its kind is 'engine'"),  # the kind before the version
        (b'{"kind": "generation", "schema_version": 1}', r"Field required.*and \d+ more"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, text, complaint):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        Record.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
