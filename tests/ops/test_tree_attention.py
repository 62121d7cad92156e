"""CUDA's attention: a row's bits do not depend on how its keys lie in the cache, nor on how the rows are dealt out.

Emulated where there is no GPU. The CPU's body is held to the same in ``tests/backbone``.
"""

import shutil

import numpy as np
import pytest

import ops.kernel
import runtime
from ops.layer_weights import LayerShape
from ops.row_plan import RowPlan
from runtime import jt
from tests.ops.layers import decoder_layer, make_layer, rotary
from tests.ops.references import reference_decoder_layer
from tests.small import bodies, path_to, random_tree

SLOTS = 400
STRETCH, MANY = "row_plan.STRETCH", "decoder_pass.MANY_TILES"
# Four query heads to two key heads; three to one, which no tile of 16 queries divides; eight to one.
HEADS = [(4, 2), (3, 1), (8, 1)]


@pytest.fixture(autouse=True)
def cuda():
    with bodies("cuda"):
        yield


class Case:
    """A random layer, a cache with ``base`` rows and as many states as wanted."""

    def __init__(self, dtype, heads=(4, 2), head_dim=6, seed=0):
        self.shape = LayerShape(24, *heads, head_dim, 40, 1e-5)
        self.packed, self.plain = make_layer(self.shape, dtype)
        self.rope = rotary(head_dim, SLOTS)
        self.random = np.random.default_rng(seed)
        padded = -(-head_dim // 16) * 16
        self.data = self.random.standard_normal((1, 2, heads[1], SLOTS, padded)).astype(dtype)
        self.data[..., head_dim:] = 0

    def states(self, rows):
        return self.random.standard_normal((rows, 24)).astype(np.float32)

    def run(self, x, plan, base, data=None):
        """(y, cache) as they come."""
        cache = jt.array(self.data if data is None else data)
        cache.sync()
        y = decoder_layer(jt.array(x), self.packed, plan, *self.rope, cache, base).numpy()
        return y, cache.numpy()

    def alone(self, x, path, base):
        """The last row of a path whose rows come one a pass."""
        data = None
        for place, row in enumerate(path):
            y, data = self.run(x[row : row + 1], RowPlan.chain(1), base + place, data)
        return y[0]


def assert_same_bits(found, expected, note=""):
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), err_msg=note)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("heads", HEADS)
# Extras after, across and before the boundary of a chunk; a forest; no past.
@pytest.mark.parametrize(
    ("rows", "base", "back"), [(64, 120, 3), (37, 127, 12), (19, 250, 63), (33, 0, 63), (2, 128, 1)]
)
def test_a_node_has_the_same_bits_in_a_tree_and_with_its_path_in_the_cache(dtype, heads, rows, base, back):
    case = Case(dtype, heads, seed=rows)
    parents, x = random_tree(case.random, rows, back, lowest=-1 if base == 250 else 0), case.states(rows)
    tree, _ = case.run(x, RowPlan(parents), base)
    assert np.isfinite(tree).all()
    for row in {0, rows - 1, *case.random.choice(rows, 2)}:
        path = path_to(parents, row)
        assert_same_bits(case.alone(x, path, base), tree[row], f"row {row}, one a pass")
        chain, _ = case.run(x[path], RowPlan.chain(len(path)), base)
        assert_same_bits(chain[-1], tree[row], f"row {row}, its path in one pass")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_row_has_the_same_bits_beside_0_to_64_others(dtype):
    case = Case(dtype)
    x = case.states(65)
    whole, _ = case.run(x, RowPlan.chain(65), 101)
    for rows in [*range(1, 20), 31, 32, 33, 48, 63, 64]:
        part, _ = case.run(x[:rows], RowPlan.chain(rows), 101)
        assert_same_bits(part, whole[:rows], f"{rows} rows")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("base", [100, 300])
def test_how_rows_and_keys_are_dealt_out_to_blocks_and_what_runs_first_decide_no_bit(dtype, base, monkeypatch):
    case = Case(dtype)
    x, parents = case.states(50), random_tree(case.random, 50, 12)
    monkeypatch.setenv("GORGON_EMULATOR_ORDER", "ascending")
    usual, cache = case.run(x, RowPlan(parents), base)
    for setting in ({}, {MANY: 1}, {STRETCH: 8}, {STRETCH: 16, MANY: 1}):
        with monkeypatch.context() as patch:
            patch.setenv("GORGON_EMULATOR_ORDER", "descending")
            for name, value in setting.items():
                patch.setattr(f"ops.{name}", value)
            found, written = case.run(x, RowPlan(parents), base)
        assert_same_bits(found, usual, str(setting))
        np.testing.assert_array_equal(written, cache)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_lane_has_the_same_bits_as_its_sequence_alone(dtype):
    case, lengths, starts = Case(dtype), [70, 0, 131, 5], np.array([0, 100, 150, 300])
    tree = RowPlan(np.array([-1, 0, 0, 2, 1]))
    x = case.states(20)
    together, _ = case.run(x, RowPlan.after([tree] * 4, starts, lengths), 0)
    for lane, length in enumerate(lengths):
        data = np.roll(case.data, -starts[lane], 3)
        alone, _ = case.run(x[lane * 5 : lane * 5 + 5], tree, length, data)
        assert_same_bits(alone, together[lane * 5 : lane * 5 + 5], f"lane {lane}")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_a_row_does_not_see_changes_no_bit(dtype):
    case = Case(dtype)
    x, parents = case.states(30), random_tree(case.random, 30, 12)
    expected, _ = case.run(x, RowPlan(parents), 120)
    data = case.data.copy()
    data[:, :, :, 120:] = np.nan  # slots that nobody has written, after the rows of this pass
    found, _ = case.run(x, RowPlan(parents), 120, data)
    assert_same_bits(found, expected)


@pytest.mark.parametrize(("heads", "head_dim"), [((2, 1), 64), ((2, 2), 128), ((3, 1), 80)])
def test_wide_heads_equal_the_equations_and_their_paths(heads, head_dim):
    case = Case("float16", heads, head_dim)
    x, parents = case.states(18), random_tree(case.random, 18, 5)
    plan, base = RowPlan(parents), 125
    y, cache = case.run(x, plan, base)
    expected, plane = reference_decoder_layer(jt.array(x), case.plain, plan, *case.rope, jt.array(case.data), 0, base)
    # As in test_decoder_pass, for sums of up to 256 terms.
    assert np.abs(y - expected.numpy()).max() < 4e-2
    assert np.abs(cache[0].astype(np.float32) - plane.numpy()).max() < 4e-2
    for row in (9, 17):
        assert_same_bits(case.alone(x, path_to(parents, row), base), y[row])


# Controls


@pytest.mark.skipif(runtime.device == "cuda", reason="the emulated kernel is the one that is edited")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if (i >= low && i < high)", "if (true)"),  # a row's own scores are written for its neighbours too
        (
            "const int j = first_key + 2 * t + e % 2 + e / 2 * 8;",
            "const int j = first_key + 2 * t + e % 2 + 8 - e / 2 * 8;",
        ),
        ("if (upper) acc", "if (true) acc"),
    ],
    ids=["scores of another row", "values of other keys", "values of another row"],
)
def test_the_comparison_notices_a_defect(right, wrong, tmp_path, monkeypatch):
    shutil.copytree(ops.kernel.KERNELS, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "cuda" / "attention_halves.h"
    text = file.read_text()
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    case = Case("float16")
    x, plan = case.states(18), RowPlan(random_tree(case.random, 18, 5))
    expected, _ = case.run(x, plan, 125)
    with monkeypatch.context() as patch:
        patch.setattr(ops.kernel, "KERNELS", tmp_path)
        ops.kernel.cuda_header.cache_clear()
        found, _ = case.run(x, plan, 125)
    ops.kernel.cuda_header.cache_clear()
    assert (found.view(np.uint32) != expected.view(np.uint32)).any()
