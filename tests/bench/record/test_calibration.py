"""A calibration file is read as it was written, and a broken one is refused by name."""

import copy
import json

import pytest

from bench.record.calibration import FILE, Calibration
from decoding.tree import Tree


def test_a_calibration_is_read_as_it_was_written(tmp_path, calibration_content):
    found = Calibration.parse(calibration_content)
    found.write(tmp_path / "a" / FILE)
    assert Calibration.read(tmp_path / "a" / FILE) == found
    assert found.tree == Tree.from_paths([[0], [1]]) and found.best.accept_length == 1.5
    assert found.candidate(Tree.chain(1)) is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.update(kind="generation"), "its kind is 'generation', not 'calibration'"),
        (lambda c: c.update(schema_version=2), "schema_version is 2"),
        (lambda c: c.update(chosen=7), "chosen is 7, there are 2 candidates"),
        (lambda c: c["candidates"][1].update(tree=[[0, 0]]), "has no parent"),
        (lambda c: c["latency"].pop("rows"), "latency.rows"),
    ],
)
def test_a_broken_calibration_is_refused_by_name(tmp_path, calibration_content, change, complaint):
    broken = copy.deepcopy(calibration_content)
    change(broken)
    path = tmp_path / FILE
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=rf"{FILE}: .*{complaint}"):
        Calibration.read(path)
