"""The options of decoding: every rule, every way to name a tree, and what is refused."""

import re

import pytest

from decoding.options import (
    AUTO,
    Acceptance,
    AcceptanceOptions,
    DecodingOptions,
    check_room,
    describe_acceptance,
    parse_tree,
)
from decoding.rules import Greedy, Lossless, Typical
from decoding.sampling import Sampler
from decoding.tree import Tree
from runtime.entry import Parser
from runtime.options import add_options, read_options

LOSSLESS = ("--accept", "lossless", "--temperature", "0.7", "--top-p", "0.9")


def acceptance_of(*words, seed=0):
    parser = Parser()
    add_options(parser, AcceptanceOptions)
    return read_options(AcceptanceOptions, parser.parse_args(words)).acceptance(seed)


def test_the_default_is_greedy():
    for words in ((), ("--greedy",), ("--accept", "greedy"), ("--greedy", "--accept", "greedy")):
        found = acceptance_of(*words)
        assert found == Acceptance() and found.exact and isinstance(found.rule(), Greedy)
        assert describe_acceptance(found.fields()) == "greedy" and found.fields()["greedy"] is True


def test_options_become_a_rule():
    found = acceptance_of(*LOSSLESS, "--top-k", "40", "--draft", "sampled", seed=5)
    assert found == Acceptance("lossless", Sampler(0.7, 0.9, 40), "sampled", seed=5) and not found.exact
    rule = found.rule(2, 1)
    assert isinstance(rule, Lossless) and rule.sampler == Sampler(0.7, 0.9, 40) and rule.sampled
    assert rule.seed == (5, 2, 1)
    assert describe_acceptance(found.fields()) == "lossless, temperature 0.7, top-p 0.9, top-k 40, sampled drafts"
    assert not acceptance_of("--accept", "lossless").rule().sampled


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"tree": "chain:2", "nodes": 4}, "--tree already says how many nodes there are; drop --nodes"),
        ({"min_confidence": 0.5}, "--min-confidence needs --tree dynamic, got no --tree"),
        ({"tree": "dynamic", "draft": "sampled"}, "--draft sampled needs a tree that is fixed before drafting"),
    ],
)
def test_options_of_the_tree_that_exclude_each_other_are_refused(options, answer):
    with pytest.raises(ValueError, match=answer):
        DecodingOptions(**options).check_tree()
    DecodingOptions(**options | {"tree": "dynamic", "nodes": 4, "draft": None}).check_tree()  # the control


def test_options_become_typical_acceptance():
    found = acceptance_of("--accept", "typical", "--alpha", "0.5")
    rule = found.rule()
    assert isinstance(rule, Typical) and (rule.epsilon, rule.alpha, rule.sampler) == (0.09, 0.5, Sampler())
    expected = "typical, temperature 1, top-p 1, top-k 0, top drafts, epsilon 0.09, alpha 0.5"
    assert describe_acceptance(found.fields()) == expected


def test_nothing_is_left_to_chance_at_temperature_0():
    assert acceptance_of("--accept", "lossless", "--temperature", "0").exact
    assert not acceptance_of("--accept", "lossless", "--top-k", "1").exact  # not examined


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
def test_options_that_make_no_rule_are_refused(words, answer):
    with pytest.raises(ValueError, match=re.escape(answer)):
        acceptance_of(*words)


def test_a_tree_is_named_by_kind_or_by_file(tmp_path):
    assert parse_tree("auto") == AUTO
    assert parse_tree("chain:0") == Tree.autoregressive() and parse_tree("chain:3") == Tree.chain(3)
    (tmp_path / "paths.json").write_text("[[0], [1], [1, 0]]")
    assert parse_tree(str(tmp_path / "paths.json")) == Tree.from_paths([[0], [1], [1, 0]])


@pytest.mark.parametrize("text", ["chain:-1", "chain:x", "chain:", "chain:1.5", "chain:+2", "chain:²"])
def test_a_chain_takes_a_number(text):
    with pytest.raises(ValueError, match=r"--tree chain:K takes a number of draft tokens from 0, got 'chain:"):
        parse_tree(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[0, 0]]", r"path \[0, 0\] has no parent; add \[0\]"),
        ("[[0], [1, 0, 2], [1]]", r"path \[1, 0, 2\] has no parent; add \[1, 0\]"),
        ("[[0], [1], [0]]", r"path \[0\] is given twice"),
        ("[[0], [-1]]", "must hold ranks"),
        ("[[0], [0.5]]", "must hold ranks"),
        ("[[0], [true]]", "must hold ranks"),
        ("[[0], []]", "empty path"),
        ("[0, 1]", "expected a list of rank paths"),
        ('{"tree": []}', "expected a list of rank paths"),
        ("[[0]", "Expecting"),
        ("[[4294967296]]", "must hold ranks, integers from 0 to 2,147,483,647"),
        (f"[[1{'0' * 40}]]", "must hold ranks"),
        (f"[{', '.join(f'[{n}]' for n in range(3000))}]", "at most 2,048 nodes, got 3,001"),
    ],
)
def test_a_file_that_holds_no_tree_is_named_with_its_mistake(tmp_path, text, complaint):
    path = tmp_path / "tree.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"tree\.json.*{complaint}"):
        parse_tree(str(path))


def test_a_missing_file_is_answered_with_what_there_is():
    with pytest.raises(ValueError, match=r"--tree takes auto, dynamic, chain:K or .* there is no file 'atuo'"):
        parse_tree("atuo")


def test_a_tree_needs_room_in_the_cache():
    check_room(15, 16)
    with pytest.raises(ValueError, match="a tree of 16 nodes leaves no room for text in a cache of 16 rows"):
        check_room(16, 16)


def test_the_cache_has_as_many_rows_as_the_backbone_has_positions_up_to_a_limit():
    assert DecodingOptions().cache_rows(512, 16) == 512 and DecodingOptions().cache_rows(4096, 16) == 2048
    assert DecodingOptions(cache_length=3000).cache_rows(4096, 16) == 3000
    with pytest.raises(ValueError, match="--cache-length 513 exceeds the 512 positions"):
        DecodingOptions(cache_length=513).cache_rows(512, 16)
