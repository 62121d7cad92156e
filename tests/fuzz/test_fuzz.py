"""A few inputs of every kind, always the same ones; ``make fuzz`` tries more. And: the search finds what is planted."""

import json
import pickle

import pytest

from backbone import config
from backbone.config import parse_config
from tests.fuzz import judge as judging
from tests.fuzz.campaign import examine
from tests.fuzz.judge import Fault, judge
from tests.fuzz.kinds import KINDS

INPUTS = 30


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_from_outside_is_accepted_or_refused_in_one_line(kind, tmp_path):
    figures = examine(kind, INPUTS, 1, tmp_path / "input")
    assert 0 < figures["accepted"] + figures["refused"] <= INPUTS and figures["refused"]


# Controls ------------------------------------------------------------------------------------------------------------


def careless_json(folder):
    parse_config(json.loads((folder / "config.json").read_text()), where=str(folder))


def careless_pickle(folder):
    pickle.loads((folder / "backbone.pkl").read_bytes())


def swallowing(folder):
    """Executes what it reads, and hides that it did."""
    try:
        careless_pickle(folder)
    except Exception as error:
        raise ValueError(f"{folder} is damaged") from error


@pytest.mark.parametrize(
    ("kind", "read", "fault"),
    [
        ("config", careless_json, "JSONDecodeError|UnicodeDecodeError|RecursionError|names no file"),
        ("pickle", careless_pickle, "Error"),
        ("pickle", swallowing, r"it did (os\.system|os\.mkdir)"),
    ],
)
def test_a_careless_reader_is_found(kind, read, fault, tmp_path):
    with pytest.raises(Fault, match=fault):
        examine(kind, 300, 1, tmp_path / "input", read)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
def test_a_defect_that_is_put_into_a_reader_of_the_project_is_found(monkeypatch, tmp_path):
    examine("config", 200, 3, tmp_path / "input")
    monkeypatch.setattr(config, "shown", repr)  # values are no longer cut
    with pytest.raises(Fault, match="characters"):
        examine("config", 200, 3, tmp_path / "input")


def refuse(text):
    def read(folder):
        raise ValueError(text.format(folder))

    return read


@pytest.mark.parametrize("text", ["", "it is damaged", "{}: " + "x" * 10_000])
def test_a_refusal_that_names_no_file_or_fills_the_screen_is_a_fault(text, tmp_path):
    with pytest.raises(Fault, match="names no file"):
        judge(refuse(text), tmp_path)
    assert judge(refuse("{}: it is damaged"), tmp_path)[0] is False


def test_memory_time_and_files_are_faults(monkeypatch, tmp_path):
    monkeypatch.setattr(judging, "MOST_BYTES", 50 << 20)
    with pytest.raises(Fault, match="GB of memory"):
        judge(lambda folder: len(b"x" * (200 << 20)), tmp_path)
    with pytest.raises(Fault, match=r"more than 0\.2 s"):
        judge(_forever, tmp_path, seconds=0.2)
    with pytest.raises(Fault, match="it did open"):
        judge(lambda folder: (folder / "new").write_text("x"), tmp_path)
    assert judge(lambda folder: len(b"x" * (10 << 20)), tmp_path)[0]


def _forever(folder):
    while True:
        pass

