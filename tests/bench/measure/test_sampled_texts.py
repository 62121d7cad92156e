"""Runs whose texts are drawn: their options, their seeds, what their records say, and how they are compared."""

import contextlib
import functools
import io
import json
from types import SimpleNamespace

import pytest

import backbone.model
import bench.compare
from backbone.tokenizer import load_tokenizer
from bench.measure.attempts import Setup
from bench.measure.side_by_side import Measurement
from bench.measure.options import parse
from decoding.options import Acceptance, describe, read_acceptance
from bench.record.metrics import aggregate, total_variation
from bench.record.schema import Record
from bench.run import main
from bench.tables.summary import differences, load_results, summarise
from decoding.generate import generate_autoregressive
from decoding.rules import Greedy, Lossless, Typical
from decoding.sampling import Sampler
from runtime.entry import run_entry

LOSSLESS = ("--accept", "lossless", "--temperature", "0.7", "--top-p", "0.9")
TURNS = (["Please book a table for two."], ["What films do you like?", "And music?"], ["Tell me a story about a fox."])


def acceptance_of(*arguments):
    return read_acceptance(parse(arguments))


def test_the_default_is_greedy():
    for words in ((), ("--greedy",), ("--accept", "greedy"), ("--greedy", "--accept", "greedy")):
        found = acceptance_of(*words)
        assert found == Acceptance() and found.exact and isinstance(found.rule(), Greedy)
        assert describe(found.fields()) == "greedy" and found.fields()["greedy"] is True


def test_options_become_a_rule():
    found = acceptance_of(*LOSSLESS, "--top-k", "40", "--draft", "sampled", "--seed", "5")
    assert found == Acceptance("lossless", Sampler(0.7, 0.9, 40), "sampled", seed=5) and not found.exact
    rule = found.rule(2, 1)
    assert isinstance(rule, Lossless) and rule.sampler == Sampler(0.7, 0.9, 40) and rule.sampled
    assert rule.seed == (5, 2, 1)
    assert describe(found.fields()) == "lossless, temperature 0.7, top-p 0.9, top-k 40, sampled drafts"
    assert not acceptance_of("--accept", "lossless").rule().sampled


def test_options_become_typical_acceptance():
    found = acceptance_of("--accept", "typical", "--alpha", "0.5")
    rule = found.rule()
    assert isinstance(rule, Typical) and (rule.epsilon, rule.alpha, rule.sampler) == (0.09, 0.5, Sampler())
    expected = "typical, temperature 1, top-p 1, top-k 0, top drafts, epsilon 0.09, alpha 0.5"
    assert describe(found.fields()) == expected


def test_nothing_is_left_to_chance_at_temperature_0():
    assert acceptance_of("--accept", "lossless", "--temperature", "0").exact
    assert not acceptance_of("--accept", "lossless", "--top-k", "1").exact  # not looked into


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--temperature", "0.7"], "--temperature needs --accept lossless or typical"),
        (["--greedy", "--top-k", "4"], "--top-k needs --accept lossless or typical"),
        (["--greedy", "--accept", "typical"], "--greedy is --accept greedy; drop it or --accept typical"),
        (["--accept", "lossless", "--epsilon", "0.1"], "--epsilon needs --accept typical, got --accept lossless"),
        (["--draft", "sampled"], "--draft sampled needs --accept lossless, got --accept greedy"),
        (["--accept", "typical", "--draft", "sampled"], "needs --accept lossless, got --accept typical"),
        (["--accept", "lossless", "--temperature", "-1"], "temperature must be a finite number from 0, got -1.0"),
        (["--accept", "lossless", "--top-p", "0"], "top_p must lie above 0 and be at most 1, got 0.0"),
        (["--accept", "lossless", "--top-k", "-3"], "top_k must be a whole number from 0, got -3"),
        (["--accept", "typical", "--epsilon", "2"], "epsilon must lie between 0 and 1, got 2.0"),
        (["--accept", "typical", "--alpha", "-2"], "alpha must be a finite number from 0, got -2.0"),
        (["--accept", "lossles"], "lossles"),
    ],
)
def test_options_that_make_no_rule_are_answered(words, answer, capsys):
    assert run_entry(main, words) == 2
    assert answer in capsys.readouterr().err


@pytest.fixture(scope="module", autouse=True)
def one_backbone():
    """The entry loads the same backbone every time; here it does so once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone.model, "load_backbone", functools.cache(backbone.model.load_backbone))
        yield


def run(folder, *arguments):
    """The record of a head that needs no training on three prompts, that of its twin, and what was said on stderr."""
    lines = [json.dumps({"question_id": n, "category": "c", "turns": turns}) for n, turns in enumerate(TURNS)]
    folder.mkdir(exist_ok=True)
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = ["--head", "prompt_lookup", "--runs", folder / "none", "--prompts", folder / "prompts.jsonl", "--nodes", 5]
    given += ["--max-new-tokens", 16, "--out-dir", folder / "results", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_entry(main, [str(word) for word in given])
    assert status == 0, err.getvalue()
    head, twin = (Record.read(folder / "results" / f"{name}.json") for name in ("prompt_lookup", "autoregressive"))
    assert Record.parse(json.loads(out.getvalue().splitlines()[-1])) == head
    return head, twin, err.getvalue()


def counts(record):
    return [(row.tokens, row.passes, row.baseline_tokens) for row in record.per_prompt]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return run(tmp_path_factory.mktemp("drawn") / "a", *LOSSLESS, "--draft", "sampled", "--seed", "3")


def test_a_drawn_text_has_no_parity_and_keeps_its_speedup(drawn):
    record, twin, err = drawn
    decoding = record.config.decoding
    assert (decoding.greedy, decoding.accept, decoding.draft) == (False, "lossless", "sampled")
    assert (decoding.temperature, decoding.top_p, decoding.top_k) == (0.7, 0.9, 0)
    assert decoding.epsilon is decoding.alpha is None
    assert "lossless, temperature 0.7, top-p 0.9, top-k 0, sampled drafts, 5 nodes" in err
    assert record.parity is None and all(row.identical is None for row in record.per_prompt)
    assert record.metrics.speedup == pytest.approx(record.metrics.tokens_per_s / record.baseline.tokens_per_s)
    assert record.metrics.speedup == pytest.approx(record.metrics.accept_length / record.metrics.overhead)
    assert record.metrics.total_variation is None
    assert all(row.tokens for row in record.per_prompt) and twin.config.decoding.accept == "lossless"
    assert [row.baseline_tokens for row in record.per_prompt] == [row.tokens for row in twin.per_prompt]


def test_a_drawn_run_is_reproduced_by_its_seed(drawn, tmp_path):
    again, _, _ = run(tmp_path / "b", *LOSSLESS, "--draft", "sampled", "--seed", "3", "--repeats", 2)
    assert counts(again) == counts(drawn[0])
    other, _, _ = run(tmp_path / "c", *LOSSLESS, "--draft", "sampled", "--seed", "4")
    assert counts(other) != counts(drawn[0])


def test_the_twin_draws_with_the_seed_of_the_prompt_and_the_turn(drawn):
    frozen, tokenizer = backbone.model.load_backbone(None, "float16"), load_tokenizer()
    for index in (0, 2):
        prompt = tokenizer.encode_chat([{"role": "user", "content": TURNS[index][0]}])
        rule = Lossless(Sampler(0.7, 0.9), (3, index, 0))
        rules = {"max_new_tokens": 16, "stop_ids": tokenizer.eos_ids, "rule": rule}
        tokens = generate_autoregressive(frozen, prompt, **rules).token_ids
        assert drawn[1].per_prompt[index].tokens == len(tokens) - 1


def test_a_drawn_result_is_compared_without_a_refusal(drawn, tmp_path, capsys):
    path = tmp_path / "drawn.json"
    path.write_text(json.dumps(drawn[0].model_dump(mode="json")))
    assert bench.compare.main([str(path)]) == 0
    out, err = capsys.readouterr()
    assert "prompt_lookup (lossless, temperature 0.7, top-p 0.9, top-k 0, sampled drafts)" in out
    assert "not applicable" in out and "parity failed" not in out and "parity" not in err
    (result,), _ = load_results([str(path)])
    assert summarise(result).speedup == drawn[0].metrics.speedup


def test_at_temperature_0_parity_is_checked(tmp_path):
    record, _, _ = run(tmp_path, "--accept", "lossless", "--temperature", 0)
    assert (record.parity.prompts, record.parity.identical) == (3, 3) and record.metrics.speedup is not None
    greedy, _, _ = run(tmp_path, "--greedy")
    assert counts(record) == counts(greedy)


def test_typical_acceptance_reports_its_distance(tmp_path, capsys):
    record, twin, err = run(tmp_path, "--accept", "typical", "--epsilon", 0, "--alpha", 0)
    assert record.parity is None and (record.config.decoding.epsilon, record.config.decoding.alpha) == (0, 0)
    assert 0 < record.metrics.total_variation < 1 and twin.metrics.total_variation == 0
    emitted = sum(row.passes + sum(row.accepted_by_depth) for row in record.per_prompt)
    assert record.metrics.total_variation == sum(row.total_variation for row in record.per_prompt) / emitted
    said = f"{record.metrics.total_variation:.3f} away from a draw"
    assert said in err
    assert bench.compare.main([str(tmp_path / "results" / "prompt_lookup.json")]) == 0
    assert said in capsys.readouterr().err


def test_the_mean_distance_is_over_what_was_emitted(make_row):
    rows = [
        make_row("p0", total_variation=1.5, identical=None),  # 4 passes that accepted 4 + 2: 10 tokens
        make_row(
            "p1", total_variation=0.5, identical=None, passes=2, accepted_by_depth=[2, 1], reached_by_depth=[2, 2]
        ),
    ]
    assert total_variation(rows) == aggregate(rows, num_resamples=2)[0].total_variation == 2.0 / 15
    assert total_variation([make_row()]) is None


DRAWN = {"greedy": False, "accept": "lossless", "temperature": 0.7, "top_p": 0.9, "top_k": 0}


def test_results_with_different_rules_are_warned_about(write_result, make_record, make_row):
    rows = [make_row("p0", identical=None), make_row("p1", identical=None)]
    decoding = make_record()["config"]["decoding"]
    paths = [write_result("greedy.json")]
    for name, changes in (("a", {}), ("b", {"temperature": 1.0}), ("c", {"draft": "sampled"})):
        changed = {**decoding, **DRAWN, **changes}
        paths.append(write_result(f"{name}.json", rows, head=name, parity=None, config__decoding=changed))
    results, _ = load_results(paths)
    (sentence,) = differences(results)
    assert sentence.startswith("acceptance differs: greedy in ")
    assert "lossless, temperature 0.7, top-p 0.9, top-k 0, top drafts in " in sentence
    assert "temperature 1," in sentence and "sampled drafts" in sentence
    assert differences(results[1:2] * 2) == []


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"greedy": True, "accept": "lossless"}, "greedy is True, accept 'lossless'"),
        ({"greedy": False}, "greedy is False, accept 'greedy'"),
        ({"greedy": False, "accept": "typical"}, "accept is 'typical', but there is no temperature"),
        ({"accept": "nucleus"}, "accept"),
        ({"draft": "beam"}, "draft"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(make_record, changes, answer):
    record = make_record()
    record["config"]["decoding"].update(changes)
    with pytest.raises(ValueError, match=answer):
        Record.parse(record)


def test_a_record_from_before_there_were_rules_is_greedy(make_record):
    record = make_record()
    for name in ("accept", "temperature", "top_p", "top_k", "draft", "epsilon", "alpha"):
        del record["config"]["decoding"][name]
    assert Record.parse(record) == Record.parse(make_record())


def test_a_head_that_changes_the_backbone_has_no_third_side_where_texts_are_drawn(write_result, make_row):
    frozen = SimpleNamespace(config="a", dtype="float16")
    head = SimpleNamespace(decoding_backbone=SimpleNamespace(config="a", dtype="float16"))
    sampled = Acceptance("lossless", Sampler())
    assert Setup(frozen, None, None, 8, head=head).sides == ("baseline", "head", "adapted")
    assert Setup(frozen, None, None, 8, head=head, acceptance=sampled).sides == ("baseline", "head")
    found = Measurement(rows=[make_row(identical=None)], adapts=True).adaptation({"rank": 4})
    assert found.stats == {"rank": 4} and found.greedy_agreement is found.token_agreement is None
    path = write_result("a.json", [make_row("p0", identical=None)], adaptation=found.model_dump(), parity=None)
    (result,), _ = load_results([path])
    assert summarise(result).adapted and summarise(result).greedy_agreement is None
    assert bench.compare._doubts([summarise(result)])[0].startswith("parity was not checked")
    assert "changes the backbone; its speedup is over the original" in bench.compare._doubts([summarise(result)])[1]
