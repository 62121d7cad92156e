"""Prompt lookup against an exhaustive search of the text, and a case worked by hand."""

import json
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import save_file

import train
from decoding.generate import generate, generate_autoregressive
from decoding.tree import Tree, default_tree
from heads.base import Features, Head
from heads.checkpoint import load_head, save_checkpoint
from heads.prompt_lookup.head import DOUBT, EVIDENCE, Followers
from heads.registry import build
from runtime import jt
from runtime.entry import run_entry

VOCAB, DEPTHS = 64, 3
SHIFT = np.log(VOCAB) - DOUBT


def searched(context, max_ngram, nearest=True, longest=True):
    """The logits after a context, by trying every token, every length and every place.

    nearest, longest: the two rules; without one of them the answer is wrong on purpose.
    """
    logits = -np.arange(VOCAB) / VOCAB
    for token in range(VOCAB):
        for n in range(1, max_ngram + 1):
            places = [
                p
                for p in range(n, len(context))
                if context[p] == token and context[p - n : p] == context[len(context) - n :]
            ]
            if places and (longest or logits[token] <= 0):
                logits[token] = EVIDENCE * n + (max(places) if nearest else min(places)) / len(context) + SHIFT
    return logits.astype(np.float32)


def rows(num):
    """Features of ``num`` rows, which the head does not read."""
    return jt.zeros((1, num, 32))


def begun(head, tokens, cuts=()):
    """The state after a text: its rows are all but the last token, which is the root; given at once or in parts."""
    state, edges = None, [0, *cuts, len(tokens) - 1]
    for first, last in pairwise(edges):
        following = jt.array(np.array([tokens[first + 1 : last + 1]], np.int32))
        state = head.begin(Features(rows(last - first)), following, state)
    return state


def stepped(head, state, tokens, parents):
    logits, state = head.step(state, jt.array(np.array(tokens, np.int32)), jt.array(np.array(parents, np.int32)))
    return logits.numpy(), state


@pytest.fixture(params=[1, 3, 5])
def head(request, backbone):
    return build("prompt_lookup", {"num_depths": DEPTHS, "max_ngram": request.param}, backbone)


@pytest.fixture(params=[(2, 9), (3, 20), (5, 30)], ids=lambda p: f"alphabet{p[0]}")
def texts(request):
    """Random texts over a few tokens, in which much repeats."""
    alphabet, length = request.param
    return np.random.default_rng(alphabet).integers(3, 3 + alphabet, (4, length + DEPTHS)).tolist()


def test_execute_equals_an_exhaustive_search(head, texts):
    seq = len(texts[0]) - DEPTHS
    positions = np.arange(len(texts) * seq, dtype=np.int32)[::2]
    output = head(Features(jt.zeros((len(texts), seq, 32))), np.array(texts, np.int32), positions)
    for depth, logits in enumerate(output.logits):
        expected = [searched(texts[p // seq][1 : p % seq + 2 + depth], head.config.max_ngram) for p in positions]
        np.testing.assert_array_equal(logits.numpy(), np.array(expected))


def test_packed_conversations_are_read_separately(head, texts):
    """What makes up a packed batch: lengths 2, 5 and the rest. A draft at the end of one runs into the next."""
    text, seq = texts[0], len(texts[0]) - DEPTHS
    lengths = (2, 5, seq - 7)
    output = head(Features(rows(seq), lengths=lengths), np.array([text], np.int32), np.arange(seq, dtype=np.int32))
    begins = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    differ = 0
    for depth, logits in enumerate(output.logits):
        for t, logits_t in enumerate(logits.numpy()):
            expected = searched(text[begins[t] + 1 : t + 2 + depth], head.config.max_ngram)
            np.testing.assert_array_equal(logits_t, expected)
            differ += (searched(text[1 : t + 2 + depth], head.config.max_ngram) != expected).any()
    assert differ > 0, "reading across the border would go unnoticed"


def test_every_node_of_a_tree_is_looked_up_with_its_own_path(head, texts):
    for text in texts:
        state = begun(head, text, cuts=(1, 4))
        logits, state = stepped(head, state, text[-1:], [0])
        np.testing.assert_array_equal(logits[0], searched(text[1:], head.config.max_ngram))
        first = [3, 4, 5]
        logits, state = stepped(head, state, first, [0, 0, 0])
        for row, token in zip(logits, first, strict=True):
            np.testing.assert_array_equal(row, searched([*text[1:], token], head.config.max_ngram))
        parents, second = [2, 0, 1, 2], [5, 4, 3, 3]
        logits, state = stepped(head, state, second, parents)
        for row, parent, token in zip(logits, parents, second, strict=True):
            np.testing.assert_array_equal(row, searched([*text[1:], first[parent], token], head.config.max_ngram))


@pytest.mark.parametrize("rule", ["nearest", "longest"])
def test_the_search_notices_a_missing_rule(backbone, rule):
    text = np.random.default_rng(0).integers(3, 6, 40).tolist()
    head = build("prompt_lookup", {"num_depths": DEPTHS}, backbone)
    logits, _ = stepped(head, begun(head, text), [text[-1]], [0])
    np.testing.assert_array_equal(logits[0], searched(text[1:], 3))
    assert np.abs(logits[0] - searched(text[1:], 3, **{rule: False})).max() > 0.01


def test_a_case_worked_by_hand(backbone):
    """x a b a c with n-grams up to 2; x, the first token, is not seen.
    The root is a: c = a b a c a. Its last two tokens c a never stood before; a alone was followed by b at 1 and by c
    at 3, so b gets n = 1 and 1/5, c 1 and 3/5. Then b: c = a b a c a b, of which a b was followed by a at 2: 2 and 2/6.
    Then a: c = a b a c a b a, b a was followed by c at 3: 2 and 3/7; a alone by b at 1 and again, drafted, at 5: 1 and
    5/7.
    """
    x, a, b, c = 9, 10, 11, 12
    text = Followers(2)
    text.extend([a, b, a, c])
    assert text.scores() == {} and text.scores([a, b]) == {a: 2 * EVIDENCE + 2 / 6}
    head = build("prompt_lookup", {"max_ngram": 2}, backbone)
    state = begun(head, [x, a, b, a, c, a])
    for token, expected in [
        (a, {b: (1, 1 / 5), c: (1, 3 / 5)}),
        (b, {a: (2, 2 / 6)}),
        (a, {c: (2, 3 / 7), b: (1, 5 / 7)}),
    ]:
        logits, state = stepped(head, state, [token], [0])
        logits_by_hand = -np.arange(VOCAB) / VOCAB
        logits_by_hand[list(expected)] = [EVIDENCE * n + place + SHIFT for n, place in expected.values()]
        np.testing.assert_allclose(logits[0], logits_by_hand, atol=1e-6)


def test_no_two_tokens_tie(head, texts):
    """The rank of a token is the number of logits above its own: a tie would count as a hit."""
    for text in texts:
        logits, _ = stepped(head, begun(head, text), [text[-1]], [0])
        assert len(np.unique(logits)) == VOCAB


def test_begin_reads_every_token_once(head, texts, monkeypatch):
    read, extend = [], Followers.extend

    def counted(text, tokens):
        read.extend(tokens)
        extend(text, tokens)

    monkeypatch.setattr(Followers, "extend", counted)
    in_parts = begun(head, texts[0], cuts=(1, 2, 5))
    assert read == texts[0][1:-1] and in_parts.root == texts[0][-1]
    assert in_parts.text.tokens.tolist() == begun(head, texts[0]).text.tokens.tolist() == texts[0][1:-1]


def test_a_long_text_outgrows_its_buffer(head):
    text = np.random.default_rng(1).integers(3, 60, 300).tolist()
    logits, _ = stepped(head, begun(head, text, cuts=(40, 41, 170)), text[-1:], [0])
    np.testing.assert_array_equal(logits[0], searched(text[1:], head.config.max_ngram))


def test_a_draft_does_not_change_the_text(head, texts):
    state = begun(head, texts[0])
    _, later = stepped(head, state, [texts[0][-1]], [0])
    stepped(head, later, [3, 4], [0, 0])
    assert state.paths == [[]] and state.text.tokens.tolist() == texts[0][1:-1]


@pytest.mark.parametrize("prompt", [[5], [5, 6], [7, 8, 9, 7, 8, 9, 7]])
def test_decoding_with_it_gives_the_autoregressive_text(head, backbone, prompt):
    expected = generate_autoregressive(backbone, prompt, max_new_tokens=60).token_ids
    for tree in (Tree.chain(DEPTHS), default_tree(16, DEPTHS)):
        assert generate(backbone, head, prompt, tree, max_new_tokens=60).token_ids == expected


def test_a_text_that_repeats_is_drafted_to_repeat_again(backbone):
    text = [1, 3, 4, 5, 3, 4, 5]
    head = build("prompt_lookup", {"num_depths": 4}, backbone)
    state, drafted = begun(head, text), text[-1:]
    for _ in range(4):
        logits, state = stepped(head, state, drafted[-1:], [0])
        drafted.append(int(logits[0].argmax()))
    assert drafted == [5, 3, 4, 5, 3]


def test_a_checkpoint_holds_no_tensor_and_refuses_one(backbone, tmp_path):
    head = build("prompt_lookup", {"max_ngram": 2}, backbone)
    config = {"head": "prompt_lookup", "head_config": vars(head.config)}
    config["backbone"] = {"fingerprint": backbone.fingerprint, "path": None}
    save_checkpoint(tmp_path / "checkpoint", head, config, {})
    loaded, _ = load_head(tmp_path, backbone)
    assert loaded.config == head.config and loaded.num_parameters == 0
    save_file({"stranger": np.zeros(2, np.float32)}, tmp_path / "checkpoint" / "head.safetensors")
    with pytest.raises(ValueError, match="does not fit head PromptLookupHead: unexpected stranger"):
        load_head(tmp_path, backbone)


def test_training_takes_no_step_and_saves_the_fitted_tree(tmp_path, capsys):
    talk = [{"from": "human", "value": "Say it {}"}, {"from": "gpt", "value": "one two three one two three one two {}"}]
    lines = [json.dumps({"conversations": talk}).replace("{}", str(i)) for i in range(12)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    arguments = ["--head", "prompt_lookup", "--data", tmp_path / "talks.jsonl", "--out", tmp_path / "run"]
    assert run_entry(train.main, [str(a) for a in arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["status"], result["steps"]) == ("done", 0) and result["expected_accept_length"] > 1
    config = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
    assert config["num_parameters"] == 0 and config["trainer"]["features"] == "online"
    Tree.from_paths(config["metrics"]["tree"])


@pytest.mark.parametrize("num", [1, 3, 8])
def test_the_best_guesses_are_those_of_its_logits(head, texts, num):
    for text in texts:
        state = begun(head, text)
        tokens, parents = np.array([text[-1]], np.int32), np.zeros(1, np.int32)
        for after in ([3, 4, 5], [5, 3]):
            values, guesses, ours = head.best(state, tokens, parents, num)
            expected, columns, state = Head.best(head, state, tokens, parents, num)
            np.testing.assert_array_equal(guesses, columns)
            np.testing.assert_allclose(values, expected, atol=1e-5)
            assert ours.paths == state.paths
            tokens, parents = np.array(after, np.int32), np.zeros(len(after), np.int32)
