"""A calibration predicts the loop: its ranks give the exact passes of generate, and bench/run.py uses its files."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest

import backbone.model
import bench.calibrate
import bench.measure.texts
import bench.run
from backbone.tokenizer import load_tokenizer
from bench.measure.calibrate import choose, improve, interval, sample
from bench.measure.latency import bundle, row_counts
from bench.measure.options import DEFAULT_PROMPTS
from bench.measure.texts import GreedyText, distinct, held_out_prompts, rank_texts
from bench.record.calibration import Calibration, CandidateTree
from bench.record.schema import Record
from decoding.acceptance import RankedText, replay
from decoding.generate import generate, generate_autoregressive
from decoding.search import Candidate, LatencyCurve, refine
from decoding.tree import Tree, default_tree
from heads.checkpoint import save_checkpoint
from heads.registry import build
from runtime import jt
from tests.bench.helpers import call, write_prompts
from tests.small import small_backbone
from trainer.data.conversations import load_conversations
from trainer.data.splits import split_held_out
from trainer.data.tokens import encode_conversations

NEW_TOKENS = 10
TREES = [Tree.chain(1), Tree.chain(3), Tree.from_paths([[0], [1], [1, 0]]), default_tree(12, 3)]


# From texts to passes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return small_backbone()


def noisy(name, backbone, noise, **options):
    """An untrained head, its parameters moved off their start."""
    head, random = build(name, {"num_depths": 3, **options}, backbone), np.random.default_rng(0)
    for _, parameter in sorted(head.named_parameters()):
        start = parameter.numpy()
        change = random.standard_normal(start.shape) * noise / max(1, start.shape[-1]) ** 0.5
        parameter.update(jt.array((start + change).astype(np.float32)))
    head.eval()
    return head


@pytest.fixture(scope="module")
def texts(small):
    """Greedy texts of random prompts: one of a single token, one of two, longer ones, and one that fills the model."""
    random, found = np.random.default_rng(0), []
    for number, (length, new) in enumerate(((1, 20), (3, 1), (5, 2), (9, 30), (17, 30), (90, 37))):
        prompt = random.integers(3, 64, length).tolist()
        reply = generate_autoregressive(small, prompt, max_new_tokens=new).token_ids
        after = []
        if len(prompt) + len(reply) < 124:
            after = generate_autoregressive(small, [*prompt, *reply], max_new_tokens=3).token_ids
        found.append(GreedyText(str(number), prompt, reply, after))
    return found


@pytest.mark.parametrize(
    ("name", "noise", "options"),
    [("mlp", 0.3, {}), ("gated_rnn", 0.5, {"inner_size": 24}), ("hydra", 0.3, {}), ("prompt_lookup", 0, {})],
)
def test_the_ranks_of_a_forced_head_replay_what_generate_does(small, texts, name, noise, options):
    head = noisy(name, small, noise, **options)
    ranked, accepted = rank_texts(head, small, texts), 0
    assert [text.num_tokens for text in ranked] == [len(text.token_ids) for text in texts]
    for tree in TREES:
        for text, ranks in zip(texts, ranked, strict=True):
            result = generate(small, head, text.prompt_ids, tree, max_new_tokens=len(text.token_ids))
            rows = min(len(text.prompt_ids) + len(text.token_ids) + tree.num_nodes, small.config.max_positions)
            found = replay([ranks], tree, None, rows)
            assert result.token_ids == text.token_ids
            assert found.accepted_per_pass == [result.accepted_per_pass], (text.prompt_id, tree.paths)
            if text.after:
                assert found.reached_by_depth == result.reached_by_depth
                assert found.accepted_by_depth == result.accepted_by_depth
            accepted += sum(result.accepted_by_depth)
    assert accepted > 20, "nothing was accepted: nothing was compared"


def test_the_replay_notices_a_head_that_read_other_tokens(small, texts):
    """Control of the test above: the ranks of another text of the same length."""
    head = noisy("gated_rnn", small, 0.5, inner_size=24)
    text = texts[3]
    wrong = dataclasses.replace(text, token_ids=[*text.token_ids[5:], *text.token_ids[:5]])
    result = generate(small, head, text.prompt_ids, TREES[3], max_new_tokens=len(text.token_ids))
    right, other = (replay(rank_texts(head, small, [each]), TREES[3]).accepted_per_pass for each in (text, wrong))
    assert right == [result.accepted_per_pass] != other
    alone, together = rank_texts(head, small, [text]), rank_texts(head, small, texts)
    assert (alone[0].ranks == together[3].ranks).all()


def test_a_reply_counts_once():
    texts = [GreedyText(str(n), [n], reply, []) for n, reply in enumerate(([5, 6], [7], [5, 6], [5]))]
    assert [text.prompt_id for text in distinct(texts)] == ["0", "1", "3"]


def test_the_prompts_are_those_of_the_conversations_that_training_holds_out(tmp_path, monkeypatch):
    lines = [
        {"id": f"c{n}", "category": f"k{n % 3}", "conversations": [
            {"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": f"Answer {n} " + "and more " * n},
            {"from": "human", "value": f"And {n}?"}, {"from": "gpt", "value": "Yes."}]}
        for n in range(40)
    ]  # fmt: skip
    corpus, tokenizer = tmp_path / "corpus.jsonl", load_tokenizer()
    corpus.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(bench.measure.texts, "EMBEDDED_CORPUS", corpus)
    prompts, sha256 = held_out_prompts(tokenizer, 512, None)
    conversations, report = load_conversations(corpus)
    data = encode_conversations(conversations, tokenizer, 512, report)
    training, held_out = split_held_out(data, 4, 0)
    assert len(prompts.prompts) == len(held_out) == 4
    learnt = {tokenizer.decode(training.conversation(n)[0].tolist()) for n in range(len(training))}
    for prompt in prompts.prompts:
        number = prompt.prompt_id[1:]
        assert prompt.turns == (f"Question {number}?", f"And {number}?")
        assert not any(f"Question {number}?" in text for text in learnt)
    assert len(held_out_prompts(tokenizer, 512, 3)[0].prompts) == 3
    assert held_out_prompts(tokenizer, 512, 3)[1] == sha256


# Decisions -----------------------------------------------------------------------------------------------------------


def candidate(depth, speed):
    return CandidateTree(
        tree=[[0] * (d + 1) for d in range(depth)], num_nodes=depth + 1, depth=depth, accept_length=1.0,
        accept_length_ci=None, predicted_s_per_pass=1.0, measured_s_per_pass=1.0, predicted_tokens_per_s=9.0,
        measured_tokens_per_s=speed,
    )  # fmt: skip


def test_the_fastest_tree_is_chosen_only_if_it_beats_decoding_without_one():
    candidates = [candidate(0, 100.0), candidate(1, 120.0), candidate(2, 110.0)]
    assert choose(candidates, 105.0) == 1
    assert choose(candidates, 125.0) == 0  # the baseline was faster
    assert choose([candidate(0, 130.0), *candidates[1:]], 105.0) == 0
    assert choose(candidates[:1], 200.0) == 0


def test_a_chain_that_drafts_fast_is_not_refined_into_a_tree_that_does_not():
    # Where passes start, the second guess is right twice as often as the guess after the first.
    ranked = [RankedText(np.array([[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]))]
    slow = LatencyCurve(10, [1, 2, 3], [1.0, 1.0, 1.0], 0.5, [1], [[0.5, 1.0]], 0.1, 0.1)
    pair = Tree.from_paths([[0], [1]])
    assert refine(ranked, Tree.chain(2)) == pair

    def improved(curve):
        tree = Tree.chain(2)
        return improve([Candidate(tree, replay(ranked, tree), curve.seconds_per_pass(tree))], ranked, curve, 99)[0].tree

    assert improved(slow) == pair
    assert improved(dataclasses.replace(slow, chain_s=[0.1, 0.1])) == Tree.chain(2)


def test_the_interval_draws_prompts_with_all_their_turns():
    random = np.random.default_rng(0)
    texts = [RankedText(random.integers(0, 2, (2, 30))) for _ in range(40)]
    found = replay(texts, Tree.chain(2))
    low, high = interval(found, [str(n // 2) for n in range(40)])
    assert low < found.accept_length < high
    wide = interval(found, [str(n // 10) for n in range(40)])
    assert wide[0] < wide[1] and interval(found, ["0"] * 40) is None
    same = replay([texts[0]] * 6, Tree.chain(2))
    assert interval(same, list("abcdef")) == pytest.approx((same.accept_length, same.accept_length))


def test_timed_texts_stand_for_all_by_their_length():
    texts = [GreedyText(str(n), [1], [0] * length, []) for n, length in enumerate((2, 11, 2, 91))]
    assert sample(texts, 1) == [3] and sample(texts, 12) == [1, 3] and sample(texts, 500) == [0, 1, 2, 3]
    assert sample(texts[:1], 3) == [0]


def test_what_is_timed():
    assert bundle(2, 2) == Tree.from_paths([[0], [1], [0, 0], [1, 0]])
    assert row_counts(64)[-3:] == [32, 48, 64] and row_counts(5) == [1, 2, 3, 4, 5] and row_counts(1) == [1]


# The entry -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts, the runs of an untrained head, and that head calibrated."""
    folder = tmp_path_factory.mktemp("calibrate")
    turns = (["Please book a table for two."], ["What films do you like?", "And music?"], ["Tell me a story."])
    write_prompts(folder / "prompts.jsonl", turns)
    frozen, options = backbone.model.load_backbone(None, "float16"), {"num_depths": 2, "inner_size": 16}
    config = {
        "head": "gated_rnn",
        "head_config": {**options, "cell": "gated"},
        "backbone": {"fingerprint": frozen.fingerprint, "path": None},
        "tokenizer": {"fingerprint": load_tokenizer().fingerprint},
        "metrics": {"tree": [[0], [1], [0, 0]]},
    }
    directory = folder / "runs" / "gated_rnn" / "first" / "checkpoint"
    save_checkpoint(directory, build("gated_rnn", options, frozen), config, {})
    status, out, err = calibrate(folder, "--head", "gated_rnn")
    assert status == 0, err
    return folder, directory, out, err


def calibrate(folder, *arguments):
    small = ("--max-nodes", 6, "--timed", 2, "--repeats", 1, "--candidates", 3, "--max-new-tokens", NEW_TOKENS)
    given = ("--runs", folder / "runs", "--prompts", folder / "prompts.jsonl", *small, *arguments)
    return call(bench.calibrate.main, *given)


def measure(folder, *arguments):
    given = ("--runs", folder / "runs", "--prompts", folder / "prompts.jsonl", "--max-new-tokens", NEW_TOKENS)
    return call(bench.run.main, "--greedy", *given, *arguments)


def test_a_calibration_lies_in_the_checkpoint_and_holds_all_that_was_found(folder):
    _, directory, out, err = folder
    found = Calibration.read(directory / "calibration.json")
    assert json.loads(out.splitlines()[-1]) == json.loads((directory / "calibration.json").read_text())
    assert found.subject.head == "gated_rnn" and found.subject.dtype == "float16"
    assert (found.texts.prompts, found.texts.texts) == (3, 4) and found.texts.max_new_tokens == NEW_TOKENS
    assert found.loop == {"texts": 2, "repeats": 1, "agreeing": 2}
    assert found.latency.rows == [1, 2, 3, 4, 6] and len(found.latency.verify_s) == 5
    assert found.latency.widths == [1, 4] and np.shape(found.latency.draft_s) == (2, 2)
    assert len(found.latency.chain_s) == 2 and min(found.latency.chain_s) > 0
    assert found.latency.draft_dtype == "float16"
    assert min(found.latency.verify_s) > 0 and np.min(found.latency.draft_s) > 0
    assert len(found.candidates) == 3 and found.candidates[0].tree == [] and found.candidates[0].accept_length == 1
    assert found.acceptance.positions == found.texts.tokens
    assert all(more >= less for more, less in pairwise(found.acceptance.path_counts))
    for each in found.candidates:
        assert each.predicted_tokens_per_s == pytest.approx(each.accept_length / each.predicted_s_per_pass)
        assert each.measured_tokens_per_s == pytest.approx(each.accept_length / each.measured_s_per_pass)
    assert "no draft" in out and "(chosen)" in out and "autoregressive" in out and "written to" in err


def test_the_accept_length_of_every_candidate_is_what_a_run_measures_and_auto_takes_the_chosen_one(folder, tmp_path):
    """On the calibration's own prompts the replay is exact, whatever the machine does."""
    root, directory, _, _ = folder
    for number, each in enumerate(Calibration.read(directory / "calibration.json").candidates):
        tree = tmp_path / f"{number}.tree"
        tree.write_text(json.dumps(each.tree))
        status, _, err = measure(root, "--head", "gated_rnn", "--tree", tree, "--out", tmp_path / "out.json")
        assert status == 0, err
        record = Record.read(tmp_path / "out.json")
        assert record.metrics.accept_length == pytest.approx(each.accept_length)
        assert record.prediction.accept_length == each.accept_length and record.prediction.same_machine
        assert "prediction gated_rnn: accept length" in err and "measured / predicted 1.00" in err
        assert "made on these very prompts" in err
    status, _, err = measure(root, "--head", "gated_rnn", "--tree", "auto", "--out", tmp_path / "out.json")
    assert status == 0, err
    chosen, record = Calibration.read(directory / "calibration.json").best, Record.read(tmp_path / "out.json")
    assert record.config.decoding.tree == chosen.tree and record.parity.identical == 3
    assert record.prediction.tokens_per_s == chosen.measured_tokens_per_s


def test_a_head_without_a_checkpoint_is_calibrated_under_the_runs(folder, tmp_path):
    root, *_ = folder
    asked = ("--runs", tmp_path, "--head", "prompt_lookup")
    status, _, err = measure(root, *asked, "--tree", "auto", "--out", tmp_path / "out.json")
    assert status == 2 and "run python bench/calibrate.py --head prompt_lookup" in err
    status, _, err = calibrate(root, *asked)
    assert status == 0, err
    assert Calibration.read(tmp_path / "prompt_lookup" / "calibration.json").subject.weights_sha256 is None
    status, _, err = measure(root, *asked, "--tree", "auto", "--out", tmp_path / "out.json")
    assert status == 0 and Record.read(tmp_path / "out.json").prediction is not None, err


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([], "either --head NAME or --checkpoint DIR"),
        (["--head", "mpl"], "Did you mean 'mlp'?"),
        (["--head", "mlp"], "run python train.py --head mlp"),
        (["--checkpoint", "nowhere"], "no checkpoint in nowhere"),
        (["--head", "prompt_lookup", "--max-nodes", "512"], "leaves no room"),
        (["--head", "prompt_lookup", "--max-new-tokens", "1"], "--max-new-tokens must be at least 2"),
        (["--head", "prompt_lookup", "--cache-length", "513"], "exceeds the 512 positions"),
        (["--head", "prompt_lookup", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_answered_in_one_line(tmp_path, arguments, answer):
    status, out, err = call(bench.calibrate.main, "--runs", tmp_path, *arguments)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert answer in err


def test_the_prompts_of_bench_run_are_taken_with_a_warning(tmp_path):
    out = tmp_path / "mine" / "out.json"
    asked = ("--head", "prompt_lookup", "--prompts", DEFAULT_PROMPTS, "--num-prompts", 1, "--out", out)
    few = ("--max-new-tokens", 4, "--max-nodes", 2, "--timed", 1, "--repeats", 1)
    status, _, err = call(bench.calibrate.main, *asked, *few)
    assert status == 0 and "bench/run.py measures on these prompts" in err
    assert Calibration.read(out).texts.path == "assets/prompts/chat.jsonl"
