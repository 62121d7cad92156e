"""Train records beside results: matched by the hash of the weights, and a missed promise is marked."""

import json
from types import SimpleNamespace

import pytest

import bench.compare
from bench.record.schema import Record
from bench.tables.training import describe_prediction, read_train_records
from tests.bench.helpers import cells_of, status_of
from trainer.config import TrainConfig
from trainer.report.record import make_record

main = status_of(bench.compare.main)

PREDICTION = {
    "accept_length": 3.1, "accept_length_ci": None, "tokens_per_s": 5.0, "autoregressive_tokens_per_s": 2.5,
    "calibration": "runs/gated_rnn/a/calibration.json", "prompts_sha256": "cafe", "same_machine": True,
}  # fmt: skip


@pytest.fixture
def write_train_record(tmp_path):
    """write(name, expected, weights): a train record of a head with these weights that expects this accept length."""

    def write(name, expected=3.0, weights="beef", checkpoint="runs/gated_rnn/a/checkpoint"):
        best = SimpleNamespace(expected_accept_length=expected, top1=[0.5], top5=[0.5], loss=[1.0])
        result = SimpleNamespace(
            best=best, best_step=10, steps=1500, tokens=10, train_s=7.5, skipped=0, history=[], interrupted=False,
            sessions=[{"first_step": 0, "last_step": 1500, "provenance": {}}],
        )  # fmt: skip
        record = make_record(
            TrainConfig(head="gated_rnn", tree_nodes=64),
            result, data={}, provenance={}, parameters=123, checkpoint=checkpoint, weights_sha256=weights,
        )  # fmt: skip
        path = tmp_path / name
        path.write_text(record.model_dump_json())
        return str(path)

    return write


def cells(out, head):
    return cells_of(next(line for line in out.splitlines() if head in line and "float16" in line))


def test_a_train_record_adds_steps_promise_and_ratio_to_the_result_of_its_weights(
    write_result, write_train_record, tmp_path, capsys
):
    results = [write_result("a.json"), write_result("b.json", head="mlp", checkpoint__sha256="f00d")]
    record = write_train_record("train.json", expected=2.9)
    assert main([results[0], record, results[1], "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    assert "measured / expected" in out and err == ""
    assert cells(out, "gated_rnn")[-3:] == ["1,500", "2.90", "1.03"]
    assert cells(out, "mlp")[-3:] == ["-", "-", "-"]
    written = json.loads((tmp_path / "out.json").read_text())["trainings"]
    assert list(written) == [results[0]]
    assert written[results[0]] == {
        "steps": 1500, "train_s": 7.5, "expected": 2.9, "nodes": 64, "ratio": pytest.approx(3 / 2.9),
        "source": "training", "path": record,
    }  # fmt: skip


@pytest.mark.parametrize(("expected", "shown"), [(2.85, "1.05 !"), (2.86, "1.05"), (3.16, "0.95 !")])
def test_more_than_five_percent_between_promise_and_measurement_is_marked(
    write_result, write_train_record, capsys, expected, shown
):
    assert main([write_result("a.json"), write_train_record("train.json", expected)]) == 0
    out, err = capsys.readouterr()
    assert cells(out, "gated_rnn")[-1] == shown
    assert ("training expected" in err) == shown.endswith("!")


def test_a_missed_promise_is_reported_with_both_trees(write_result, write_train_record, capsys):
    path = write_result("a.json", config__decoding__num_nodes=16)
    assert main([path, write_train_record("train.json", 4.0)]) == 0
    assert capsys.readouterr().err == (
        "warning: training expected 4.00 tokens per pass of gated_rnn, 3.00 were measured (-25%), the one with 64 "
        f"nodes and the other with 16: {path}\n"
    )


def test_a_calibrated_result_needs_no_train_record(write_result, write_train_record, capsys):
    path = write_result("a.json", prediction=PREDICTION)
    assert main([path]) == 0
    assert cells(capsys.readouterr().out, "gated_rnn")[-3:] == ["10", "3.10", "0.97"]
    assert main([path, write_train_record("train.json", 2.9)]) == 0
    assert cells(capsys.readouterr().out, "gated_rnn")[-3:] == ["1,500", "2.90", "1.03"]


def test_a_train_record_that_matches_no_result_is_reported(write_result, write_train_record, capsys):
    path = write_result("a.json")
    other = write_train_record("train.json", weights="0ff", checkpoint="runs/other/checkpoint")
    again = write_train_record("again.json", weights="123")
    assert main([path, other, again]) == 0
    out, err = capsys.readouterr()
    assert f"{other}: no result here measured its weights" in err
    assert f"{again}: {path} measured other weights of runs/gated_rnn/a; one of the two was" in err
    assert "expected" not in out and cells(out, "gated_rnn")[-1] == "2/2"  # no columns about promises


def test_train_records_alone_broken_ones_and_overwriting_one_are_refused(
    write_result, write_train_record, tmp_path, capsys
):
    result, record, broken = write_result("a.json"), write_train_record("train.json"), str(tmp_path / "broken.json")
    (tmp_path / "broken.json").write_text('{"kind": "train", "schema_version": 1}')
    for words, complaint in (
        ([record], "error: only train records among 1 file(s)"),
        ([result, record, "--json", record], "is one of the results to compare"),
        ([result, broken], "broken.json: head: Field required"),
    ):
        assert main(words) == 2
        assert complaint in capsys.readouterr().err


def test_files_that_are_no_train_records_are_left_to_others(write_result, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    paths = [write_result("a.json"), str(tmp_path / "list.json"), str(tmp_path / "broken.json"), "nowhere.json"]
    assert read_train_records(paths) == (paths, [])


def test_a_result_holds_the_promise_of_its_checkpoint(write_result, capsys):
    own = {"checkpoint__expected_accept_length": 2.9, "checkpoint__tree_nodes": 64}
    other = {**own, "head": "mlp", "checkpoint__tree_nodes": 16}  # decoded with 64: nothing was promised of that
    assert main([write_result("a.json", **own), write_result("b.json", **other)]) == 0
    out, _ = capsys.readouterr()
    assert cells(out, "gated_rnn")[-3:] == ["10", "2.90", "1.03"]
    assert cells(out, "mlp")[-3:] == ["-", "-", "-"]


def test_predictions_are_set_beside_what_was_measured(make_record):
    prediction = {**PREDICTION, "accept_length": 2.0, "accept_length_ci": [1.8, 2.2], "prompts_sha256": "c0de"}
    prediction |= {"tokens_per_s": 4.0, "autoregressive_tokens_per_s": 2.0}
    record = Record.parse(make_record(prediction=prediction))
    lines = describe_prediction(record)
    assert len(lines) == 4 and all(line.startswith("prediction gated_rnn: ") for line in lines)
    measured = record.metrics.accept_length
    assert (
        f"accept length 2.00 [1.80, 2.20] predicted, {measured:.2f}: measured / predicted {measured / 2:.2f}"
        in lines[0]
    )
    assert f"measured / predicted {record.baseline.tokens_per_s / 2:.2f}" in lines[2]
    assert f"measured / predicted {record.metrics.speedup / 2:.2f}" in lines[3]
    elsewhere = {**prediction, "same_machine": False, "prompts_sha256": "cafe"}
    lines = describe_prediction(Record.parse(make_record(prediction=elsewhere)))
    assert "these very prompts" in lines[4] and "another machine" in lines[5]
    assert describe_prediction(Record.parse(make_record())) == []
