"""Runs whose texts are sampled: their seeds, what their records hold, and how they are compared."""

import json
from types import SimpleNamespace

import pytest

import backbone.model
import bench.compare
from backbone.tokenizer import load_tokenizer
from bench.measure.attempts import Setup
from bench.measure.side_by_side import Measurement
from bench.record.schema import Record
from bench.run import main
from bench.tables.comparison import doubts
from bench.tables.results import load_results
from decoding.generate import generate_autoregressive
from decoding.options import Acceptance
from decoding.rules import Lossless
from decoding.sampling import Sampler
from tests.bench.helpers import call, write_prompts
from tests.bench.measure.runs import TURNS

LOSSLESS = ("--accept", "lossless", "--temperature", "0.7", "--top-p", "0.9")


def run(folder, *arguments):
    """The record of a head that needs no training on three prompts, that of the baseline, and stderr."""
    folder.mkdir(exist_ok=True)
    prompts = write_prompts(folder / "prompts.jsonl", TURNS)
    given = ["--head", "prompt_lookup", "--runs", folder / "none", "--prompts", prompts, "--nodes", 5]
    given += ["--max-new-tokens", 16, "--out-dir", folder / "results", *arguments]
    status, out, err = call(main, *given)
    assert status == 0, err
    head, baseline = (Record.read(folder / "results" / f"{name}.json") for name in ("prompt_lookup", "autoregressive"))
    assert Record.parse(json.loads(out.splitlines()[-1])) == head
    return head, baseline, err


def counts(record):
    return [(row.tokens, row.passes, row.baseline_tokens) for row in record.per_prompt]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    return run(tmp_path_factory.mktemp("sampled") / "a", *LOSSLESS, "--draft", "sampled", "--seed", "3")


def test_a_sampled_text_has_no_parity_and_keeps_its_speedup(sampled):
    record, baseline, err = sampled
    decoding = record.config.decoding
    assert (decoding.greedy, decoding.accept, decoding.draft) == (False, "lossless", "sampled")
    assert (decoding.temperature, decoding.top_p, decoding.top_k) == (0.7, 0.9, 0)
    assert decoding.epsilon is decoding.alpha is None
    assert "lossless, temperature 0.7, top-p 0.9, top-k 0, sampled drafts, 5 nodes" in err
    assert record.parity is None and all(row.identical is None for row in record.per_prompt)
    assert record.metrics.speedup == pytest.approx(record.metrics.tokens_per_s / record.baseline.tokens_per_s)
    assert record.metrics.speedup == pytest.approx(record.metrics.accept_length / record.metrics.overhead)
    assert record.metrics.total_variation is None
    assert all(row.tokens for row in record.per_prompt) and baseline.config.decoding.accept == "lossless"
    assert [row.baseline_tokens for row in record.per_prompt] == [row.tokens for row in baseline.per_prompt]


def test_a_sampled_run_is_reproduced_by_its_seed(sampled, tmp_path):
    again, _, _ = run(tmp_path / "b", *LOSSLESS, "--draft", "sampled", "--seed", "3", "--repeats", 2)
    assert counts(again) == counts(sampled[0])
    other, _, _ = run(tmp_path / "c", *LOSSLESS, "--draft", "sampled", "--seed", "4")
    assert counts(other) != counts(sampled[0])


def test_the_baseline_draws_with_the_seed_of_the_prompt_and_the_turn(sampled):
    frozen, tokenizer = backbone.model.load_backbone(None, "float16"), load_tokenizer()
    for index in (0, 2):
        prompt = tokenizer.encode_chat([{"role": "user", "content": TURNS[index][0]}])
        rule = Lossless(Sampler(0.7, 0.9), (3, index, 0))
        rules = {"max_new_tokens": 16, "stop_ids": tokenizer.eos_ids, "rule": rule}
        tokens = generate_autoregressive(frozen, prompt, **rules).token_ids
        assert sampled[1].per_prompt[index].tokens == len(tokens) - 1


def test_a_sampled_result_is_compared_without_a_refusal(sampled, tmp_path):
    path = tmp_path / "sampled.json"
    path.write_text(json.dumps(sampled[0].model_dump(mode="json")))
    status, out, err = call(bench.compare.main, path)
    assert status == 0
    assert "prompt_lookup (lossless, temperature 0.7, top-p 0.9, top-k 0, sampled drafts)" in out
    assert "not applicable" in out and "parity failed" not in out and "parity" not in err
    assert load_results([path])["speedup"].item() == sampled[0].metrics.speedup


def test_at_temperature_0_parity_is_checked(tmp_path):
    record, _, _ = run(tmp_path, "--accept", "lossless", "--temperature", 0)
    assert (record.parity.prompts, record.parity.identical) == (3, 3) and record.metrics.speedup is not None
    greedy, _, _ = run(tmp_path, "--greedy")
    assert counts(record) == counts(greedy)


def test_typical_acceptance_reports_its_distance(tmp_path):
    record, baseline, err = run(tmp_path, "--accept", "typical", "--epsilon", 0, "--alpha", 0)
    assert record.parity is None and (record.config.decoding.epsilon, record.config.decoding.alpha) == (0, 0)
    assert 0 < record.metrics.total_variation < 1 and baseline.metrics.total_variation == 0
    emitted = sum(row.passes + sum(row.accepted_by_depth) for row in record.per_prompt)
    assert record.metrics.total_variation == sum(row.total_variation for row in record.per_prompt) / emitted
    distance = f"{record.metrics.total_variation:.3f} away from sampling"
    assert distance in err and distance in call(bench.compare.main, tmp_path / "results" / "prompt_lookup.json")[2]


def test_a_head_that_changes_the_backbone_has_no_third_side_when_texts_are_sampled(write_result, make_row):
    frozen = SimpleNamespace(config="a", dtype="float16")
    head = SimpleNamespace(decoding_backbone=SimpleNamespace(config="a", dtype="float16"))
    sampling = Acceptance("lossless", Sampler())
    assert Setup(frozen, None, None, 8, head=head).sides == ("baseline", "head", "adapted")
    assert Setup(frozen, None, None, 8, head=head, acceptance=sampling).sides == ("baseline", "head")
    found = Measurement(rows=[make_row(identical=None)], adapts=True).adaptation({"rank": 4})
    assert found.stats == {"rank": 4} and found.greedy_agreement is found.token_agreement is None
    path = write_result("a.json", [make_row("p0", identical=None)], adaptation=found.model_dump(), parity=None)
    frame = load_results([path])
    assert frame["adapted"].item() and frame["greedy_agreement"].isna().item()
    trust, original = doubts(frame)
    assert trust.startswith("parity was not checked") and "its speedup is over the original" in original
