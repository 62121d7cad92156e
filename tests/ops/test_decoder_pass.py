"""A pass in one kernel equals the plain equations, for every way rows may see each other."""

from types import SimpleNamespace

import numpy as np
import pytest

from ops.cache_rows import keep_rows
from ops.decoder_pass import Decoder, decoder_pass
from ops.layer_weights import LayerShape
from ops.linear import PackedLinear
from ops.packing.quantize import QUANTIZERS
from ops.row_plan import RowPlan
from runtime import jt
from tests.ops.layers import make_layer, rotary
from tests.ops.references import reference_decoder_pass

# No width is a multiple of 16; three layers; two query heads to a key head.
SHAPE = LayerShape(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=40, eps=1e-5)
LAYERS, VOCAB, SLOTS, PADDED = 3, 50, 24, 16
TREE = RowPlan(np.array([-1, 0, 0, 1, 2, 2, 5]))
PLANS = {
    "one row": RowPlan.chain(1),
    "chain": RowPlan.chain(7),
    "tree": TREE,
    "forest": RowPlan(np.array([-1, 0, -1, 2, 1, 3])),
    "sequences": RowPlan.sequences([3, 1, 2]),
    "lanes": RowPlan.lanes([4, 0, 7], capacity=8),
}
STORAGES = ["float32", "float16", "int8", "nf4"]
# Three layers of sums of some 40 terms of size about 1; float16 keys and values may round to either neighbor. On CUDA
# products with weights other than float32 round their rows to float16, twelve times on the way to a logit.
TOLERANCE = {("float32", "cpu"): 1e-4, ("float16", "cpu"): 2e-2, ("float32", "cuda"): 1e-4, "rounded": 8e-2}


def tolerance_of(storage, body):
    if body == "cuda" and storage != "float32":
        return TOLERANCE["rounded"]
    return TOLERANCE["float16" if storage == "float16" else "float32", body]


class Sides:
    """The kernel's decoder and the reference's, which has what 8 or 4 bits keep, over the same cache and tokens."""

    def __init__(self, storage):
        random, s = np.random.default_rng(0), SHAPE
        self.dtype = "float32" if storage in QUANTIZERS else storage
        ours, plain = zip(*(make_layer(s, self.dtype, storage, random, 1.0) for _ in range(LAYERS)), strict=True)
        embedding = jt.array(random.standard_normal((VOCAB, s.hidden_size)).astype(self.dtype))
        norm = jt.array(random.uniform(0.5, 1.5, s.hidden_size).astype(np.float32))
        head = (random.standard_normal((VOCAB, s.hidden_size)) / 5).astype(self.dtype)
        self.reference = Decoder(plain, embedding, norm, SimpleNamespace(packed=jt.array(head)))
        self.ours = Decoder(ours, embedding, norm, PackedLinear(head))
        self.rope = rotary(s.head_dim, 64)
        self.ids = jt.array(random.integers(0, VOCAB, 7).astype(np.int32))
        self.cache = random.standard_normal((LAYERS, 2, 2, SLOTS, PADDED)).astype(self.dtype)
        self.cache[..., s.head_dim :] = 0

    def kernel(self, plan, base, planes=LAYERS, wanted=(), logit_rows=None):
        """(PassOutput, the cache after it)."""
        rows = plan.num_rows
        cache = jt.array(self.cache[:planes])
        cache.sync()
        logit_rows = rows if logit_rows is None else logit_rows
        found = decoder_pass(self.ours, self.ids[:rows], plan, *self.rope, cache, base, wanted, logit_rows)
        found.hidden.sync()
        return found, cache.numpy()

    def by_hand(self, plan, base, wanted=()):
        """(PassOutput, the planes of the cache after it) of the reference."""
        rows, cache = plan.num_rows, jt.array(self.cache)
        return reference_decoder_pass(self.reference, self.ids[:rows], plan, *self.rope, cache, base, wanted, rows)


@pytest.mark.parametrize(
    ("name", "base", "storage"),
    [
        *(("tree", 9, storage) for storage in STORAGES),
        *((name, 0, "float32") for name in PLANS),
        *(("chain", 9, "float16"), ("one row", 9, "float16"), ("lanes", 0, "float16")),
    ],
)
def test_a_pass_equals_the_equations_and_touches_no_other_row(name, base, storage, body):
    sides, plan, tolerance = Sides(storage), PLANS[name], tolerance_of(storage, body)
    found, cache = sides.kernel(plan, base, wanted=(0, 2, 3))
    expected, planes = sides.by_hand(plan, base, wanted=(0, 2, 3))
    for part in ("hidden", "taken", "logits"):
        assert np.abs(getattr(found, part).numpy() - getattr(expected, part).numpy()).max() < tolerance, part
    np.testing.assert_array_equal(found.chosen.numpy(), found.logits.numpy().argmax(1))
    slots = plan.meta_array[:, 1] + base
    for layer, plane in enumerate(planes):
        written = cache[layer][:, :, slots].astype(np.float32)
        assert np.abs(written - plane.numpy()[:, :, slots].astype(np.float32)).max() < tolerance
    others = np.delete(np.arange(SLOTS), slots)
    np.testing.assert_array_equal(cache[:, :, :, others], sides.cache[:, :, :, others])


@pytest.mark.parametrize(
    ("parents", "shift"),
    [([-1, 0, 0, 1, 2, 2, 2], 0), ([-1, 0, 0, 1, 2, 2, 5], 1)],
    ids=["a leaf on its grandparent", "a leaf one position later"],
)
def test_the_comparison_notices_a_wrong_mask_and_a_wrong_position(parents, shift, body):
    sides = Sides("float32")
    wrong = RowPlan(np.array(parents), positions=TREE.positions + shift * (np.arange(7) == 6))
    logits = [output.logits.numpy() for output, _ in (sides.kernel(TREE, 9), sides.by_hand(wrong, 9))]
    assert np.abs(logits[0] - logits[1]).max() > 10 * tolerance_of("float32", body)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_only_the_last_rows_get_logits_and_one_plane_serves_a_pass_without_a_past(storage, body):
    sides = Sides(storage)
    every, last, none, one = (
        sides.kernel(TREE, 0, planes, logit_rows=rows)[0] for planes, rows in ((3, 7), (3, 2), (3, 0), (1, 7))
    )
    np.testing.assert_array_equal(last.logits.numpy(), every.logits.numpy()[-2:])
    np.testing.assert_array_equal(last.chosen.numpy(), every.chosen.numpy()[-2:])
    assert none.logits is None and none.chosen is None and none.taken is None
    np.testing.assert_array_equal(none.hidden.numpy(), every.hidden.numpy())
    np.testing.assert_array_equal(one.logits.numpy(), every.logits.numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("path", [[0, 2, 5], [1], [3, 4, 5], [1, 2, 3, 6], [1, 3, *range(4, 15)]])
def test_kept_rows_of_a_cache_move_as_in_numpy(dtype, path, body):
    data = np.random.default_rng(1).standard_normal((2, 2, 2, SLOTS, PADDED)).astype(dtype)
    cache = jt.array(data)
    cache.sync()
    keep_rows(cache, 8 + np.array(path, np.int32), 8 + np.arange(len(path), dtype=np.int32))
    expected = data.copy()
    expected[:, :, :, 8 : 8 + len(path)] = data[:, :, :, 8 + np.array(path)]
    np.testing.assert_array_equal(cache.numpy(), expected)
