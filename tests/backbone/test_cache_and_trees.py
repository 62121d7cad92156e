"""A row's numbers do not depend on how it came to be run: with a cache, in a tree, after a commit or a rewind."""

import numpy as np
import pytest

from backbone.cache import CacheFull
from ops.row_plan import RowPlan
from tests.backbone.passes import prefilled, rows, run_pass, tree_behind_a_prefix
from tests.small import path_to


def assert_same_bits(got, want, note=""):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=note)


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 1, 13, 2, 17]])
def test_cached_equals_uncached_bitwise(small, chunks, tokens):
    ids, cache, parts = tokens(40), small.new_cache(40), []
    for count in chunks:
        parts.append(rows(small.forward(ids[:, cache.length : cache.length + count], cache=cache)))
        cache.commit(np.arange(count))
    assert_same_bits([np.concatenate(p) for p in zip(*parts, strict=True)], run_pass(small, ids), str(chunks))


def test_a_sequence_of_a_batch_equals_the_sequence_alone_bitwise(small, tokens):
    ids = np.concatenate([tokens(17, seed) for seed in range(3)])
    output = small.forward(ids)
    for row in range(3):
        alone = run_pass(small, ids[row : row + 1])
        assert_same_bits((output.hidden.numpy()[row], output.logits.numpy()[row]), alone)


@pytest.mark.parametrize("seed", range(8))
def test_each_row_of_a_tree_equals_its_path_run_alone_bitwise(small, seed, tokens):
    parents, base = tree_behind_a_prefix(seed)
    prefix, nodes = tokens(base, seed), tokens(len(parents), seed + 100)
    cache = prefilled(small, prefix)
    tree = rows(small.forward(nodes, cache=cache, attend=parents))
    for row in range(len(parents)):
        path = path_to(parents, row)
        alone = run_pass(small, np.concatenate([prefix, nodes[:, path]], 1))
        assert_same_bits([a[row] for a in tree], [a[-1] for a in alone], f"row {row} of {parents.tolist()}")


@pytest.mark.parametrize("seed", range(6))
def test_committing_a_path_and_going_on_equals_running_the_text_from_scratch_bitwise(small, seed, tokens):
    parents, base = tree_behind_a_prefix(seed)
    prefix, nodes, more = tokens(base, seed), tokens(len(parents), seed + 100), tokens(5, seed + 200)
    cache = prefilled(small, prefix)
    run_pass(small, nodes, cache, parents)
    path = max((path_to(parents, row) for row in range(len(parents))), key=len)
    cache.commit(path)
    assert cache.length == base + len(path)
    text = np.concatenate([prefix, nodes[:, path], more], 1)
    going_on = rows(small.forward(more, cache=cache))
    assert_same_bits(going_on, [a[-5:] for a in run_pass(small, text)])


def test_the_comparison_notices_a_commit_of_the_wrong_rows(small, tokens):
    parents = np.array([-1, 0, 0, 1, 2])
    prefix, nodes, more = tokens(6), tokens(5, 1), tokens(3, 2)
    text = np.concatenate([prefix, nodes[:, [0, 2, 4]], more], 1)
    expected = [a[-3:] for a in run_pass(small, text)]
    for path, same in (([0, 2, 4], True), ([0, 1, 3], False), ([0, 1, 4], False), ([0, 2, 3], False)):
        cache = prefilled(small, prefix)
        run_pass(small, nodes, cache, parents)
        cache.commit(path)
        assert (rows(small.forward(more, cache=cache))[0] == expected[0]).all() == same, path


def test_a_pass_whose_output_nobody_reads_still_writes_the_cache(small, tokens):
    ids, cache = tokens(8), small.new_cache(16)
    small.forward(ids[:, :5], cache=cache, logits=None)
    cache.commit(np.arange(5))
    assert_same_bits(run_pass(small, ids[:, 5:], cache), [a[5:] for a in run_pass(small, ids)])


def test_a_rewound_cache_goes_on_as_if_the_rows_had_never_been_there(small, tokens):
    ids, cache = tokens(30), prefilled(small, tokens(30))
    cache.rewind(12)
    other = tokens(9, 5)
    expected = run_pass(small, np.concatenate([ids[:, :12], other], 1))
    assert_same_bits(rows(small.forward(other, cache=cache)), [a[12:] for a in expected])


def test_given_positions_replace_those_that_follow_from_the_rows(small, tokens):
    parents, positions = np.array([-1, 0, 0, 2]), np.array([7, 8, 8, 9])
    cache = prefilled(small, tokens(7))
    given = rows(small.forward(tokens(4, 3), positions=positions, cache=cache, attend=parents))
    assert_same_bits(given, rows(small.forward(tokens(4, 3), cache=cache, attend=parents)))
    assert_same_bits(given, rows(small.forward(tokens(4, 3), cache=cache, attend=RowPlan(parents))))
    shifted = rows(
        small.forward(tokens(4, 3), positions=positions + np.array([0, 0, 0, 1]), cache=cache, attend=parents)
    )
    assert (shifted[1][:3] == given[1][:3]).all() and (shifted[1][3] != given[1][3]).any()


# Mistakes


def test_what_a_cache_cannot_do_is_refused(small, tokens):
    cache = prefilled(small, tokens(4), room=8)
    run_pass(small, tokens(3), cache)
    for path in ([0, 3], [-1], [1, 1], [2, 0]):
        with pytest.raises(ValueError, match="cannot commit rows"):
            cache.commit(path)
    cache.commit([0, 2])
    with pytest.raises(ValueError, match="of a pass of 0 rows"):
        cache.commit([0])
    for length in (-1, 7):
        with pytest.raises(ValueError, match=f"cannot rewind a cache of 6 rows to {length}"):
            cache.rewind(length)
    with pytest.raises(CacheFull, match="holds 6 of 8 rows, 3 more do not fit"):
        small.forward(tokens(3), cache=cache)
    small.forward(tokens(2), cache=cache)  # what fits is still taken
    with pytest.raises(ValueError, match="batch of 1, got 2"):
        small.forward(np.zeros((2, 3), np.int32), cache=cache)
    for length, reason in ((129, "129 rows exceeds the 128 positions"), (0, "at least one row")):
        with pytest.raises(ValueError, match=reason):
            small.new_cache(length)
    for attend in (np.array([-1, 0]), RowPlan.chain(2)):
        with pytest.raises(ValueError, match="attend covers 2 rows, the tokens 3"):
            small.forward(tokens(3), cache=prefilled(small, tokens(4)), attend=attend)
