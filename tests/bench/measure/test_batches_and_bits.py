"""What --batch-size, --tree dynamic, --load-in-8bit and --load-in-4bit change in a result, and what they must not."""

import numpy as np
import pytest

import backbone.model
from backbone.tokenizer import load_tokenizer
from bench.measure.quantization import agreement, perplexity
from bench.record.schema import Record
from bench.run import main
from ops.row_plan import RowPlan
from tests.bench.helpers import call, error_of, write_prompts
from trainer.data.tokens import TokenizedData

TURNS = (
    ["Please book a table for two."],
    ["What films do you like?", "And music?"],
    ["Tell me a story about a fox."],
    ["Repeat after me: one two three one two three."],
    ["What is 3 plus 4?"],
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", TURNS)


@pytest.fixture
def measured(prompts, tmp_path):
    """measured(*options) -> (record of prompt_lookup, stderr)."""

    def run(*options):
        given = ["--head", "prompt_lookup", "--runs", tmp_path / "none", "--prompts", prompts, "--max-new-tokens", 24]
        status, _, err = call(main, *given, "--out-dir", tmp_path, *options)
        assert status == 0, err
        return Record.read(tmp_path / "prompt_lookup.json"), err

    return run


def counts(record):
    """A prompt's row without its times."""
    return [
        (r.prompt_id, r.turns, r.tokens, r.passes, r.accepted_by_depth, r.baseline_tokens) for r in record.per_prompt
    ]


def test_a_batch_counts_what_prompts_alone_count(measured):
    alone, _ = measured("--greedy", "--nodes", 6)
    together, err = measured("--greedy", "--nodes", 6, "--batch-size", 3)
    assert counts(together) == counts(alone)
    assert (alone.config.decoding.batch_size, together.config.decoding.batch_size) == (1, 3)
    assert together.parity.identical == together.parity.prompts == len(TURNS)
    assert "3 prompts at once" in err
    stages = together.timing.model_dump()
    total = stages.pop("total_s")
    assert sum(stages.values()) == pytest.approx(total, rel=1e-6) and total > 0


def test_sampled_texts_are_the_same_in_a_batch(measured):
    sampled = ("--accept", "lossless", "--temperature", 0.5, "--seed", 3, "--nodes", 6)
    assert counts(measured(*sampled)[0]) == counts(measured(*sampled, "--batch-size", 4)[0])


def test_a_dynamic_tree_keeps_parity_and_is_recorded_as_one(measured):
    record, err = measured("--greedy", "--tree", "dynamic", "--nodes", 6)
    decoding = record.config.decoding
    assert (decoding.tree, decoding.num_nodes, decoding.tree_width) == (None, 6, 8)
    assert record.parity.identical == len(TURNS) and record.metrics.accept_length > 1
    assert "up to 6 nodes" in err


@pytest.mark.long
@pytest.mark.parametrize(
    ("bits", "storage", "share", "change"), [(8, "int8", 0.53, 0.01), (4, "nf4", 0.28, 0.1)], ids=["8 bits", "4 bits"]
)
def test_fewer_bits_are_measured_against_the_original(measured, bits, storage, share, change):
    record, err = measured("--greedy", f"--load-in-{bits}bit", "--nodes", 4)
    found = record.quantization
    assert record.config.backbone.storage == storage and found.bits == bits
    assert found.layer_bytes_after < share * found.layer_bytes_before
    assert 2 < found.perplexity_before < 3 and 0 < abs(found.perplexity_after / found.perplexity_before - 1) < change
    assert 0 <= found.greedy_agreement <= 1 and 0 < found.token_agreement <= 1
    assert record.parity.identical == len(TURNS)  # with the backbone of fewer bits
    assert f"{bits} bits    layers take 0." in err
    assert measured("--greedy", "--nodes", 4)[0].quantization is None


def test_perplexity_is_that_of_the_assistants_tokens():
    frozen = backbone.model.load_backbone()
    talk = [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Hi, how are you today?"}]
    ids, mask = (np.array(each) for each in load_tokenizer().encode_with_mask(talk))
    data = TokenizedData.of([(ids.astype(np.int32), mask.astype(bool))] * 2)
    logits = frozen.forward(ids[None].astype(np.int32), attend=RowPlan.chain(len(ids))).logits.numpy()[0].astype(float)
    rows = np.flatnonzero(mask[1:])
    scores = logits[rows] - np.log(np.exp(logits[rows]).sum(1, keepdims=True))
    expected = np.exp(-scores[np.arange(len(rows)), ids[rows + 1]].mean())
    assert perplexity(frozen, data) == pytest.approx(expected, rel=1e-4)
    shifted = TokenizedData.of([(ids.astype(np.int32), np.ones(len(ids), bool))])
    assert perplexity(frozen, shifted) != pytest.approx(expected, rel=1e-2)  # the user's tokens would be noticed


def test_texts_agree_up_to_their_first_difference():
    assert agreement([[1, 2, 3], [5]], [[1, 2, 4], [5]]) == (0.5, 0.75)
    assert agreement([[1, 2]], [[1, 2, 3]]) == (0.0, 1.0)
    assert agreement([], []) == (None, None)
    assert agreement([[]], [[]]) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load-in-8bit", "--load-in-4bit"], "exclude each other; choose one"),
        (["--tree", "dynamic", "--accept", "lossless", "--draft", "sampled"], "needs a tree that is fixed"),
        (["--tree", "dynamic", "--nodes", "1"], "a dynamic tree needs at least 2 nodes"),
        (["--tree", "dynamik"], "--tree takes auto, dynamic, chain:K or a JSON file"),
    ],
)
def test_options_that_make_no_run_are_refused(prompts, tmp_path, options, message):
    given = ["--head", "prompt_lookup", "--runs", tmp_path, "--prompts", prompts, "--out-dir", tmp_path]
    assert message in error_of(main, *given, *options)
