"""A pass in one kernel equals the pass made of the plain equations, whatever is asked of it."""

from types import SimpleNamespace

import numpy as np
import pytest

from ops.decoder_pass import Decoder, decoder_pass
from ops.layer_weights import LayerShape, LayerWeights
from ops.linear import PackedLinear
from ops.packing.quantize import QUANTIZERS
from ops.row_plan import RowPlan
from runtime import jt
from tests.ops.references import reference_decoder_pass

# No width is a multiple of 16; three layers; two query heads to a key head.
SHAPE = LayerShape(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=40, eps=1e-5)
LAYERS, VOCAB, SLOTS, PADDED, ROWS = 3, 50, 24, 16, 7
TREE = [-1, 0, 0, 1, 2, 2, 5]
# Three layers of sums of some 40 terms of size about 1; float16 keys and values may round to either neighbour. On CUDA
# products with weights other than float32 round their rows to float16, twelve times on the way to a logit.
TOLERANCE = {("float32", "cpu"): 1e-4, ("float16", "cpu"): 2e-2, ("float32", "cuda"): 1e-4, "rounded": 8e-2}


def tolerance_of(storage, body):
    if body == "cuda" and storage != "float32":
        return TOLERANCE["rounded"]
    return TOLERANCE["float16" if storage == "float16" else "float32", body]


@pytest.fixture(params=["float32", "float16", "int8", "nf4"])
def sides(request, body):
    """(kernel's Decoder, reference's, dtype of the cache, tolerance). The reference has what 8 or 4 bits keep."""
    random, s = np.random.default_rng(0), SHAPE
    dtype = "float32" if request.param in QUANTIZERS else request.param
    q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    sizes = dict(q=(q, s.hidden_size), k=(kv, s.hidden_size), v=(kv, s.hidden_size), o=(s.hidden_size, q))
    sizes |= {n: (s.intermediate_size, s.hidden_size) for n in ("gate", "up")}
    sizes["down"] = (s.hidden_size, s.intermediate_size)
    ours, plain = [], []
    for _ in range(LAYERS):
        parts = {n: (random.standard_normal(size) / np.sqrt(size[1])).astype(dtype) for n, size in sizes.items()}
        norms = {n: random.uniform(0.5, 1.5, s.hidden_size).astype(np.float32) for n in ("norm1", "norm2")}
        ours.append(LayerWeights(s, **norms, **parts, storage=request.param))
        parts = ours[-1].matrices()
        plain.append(
            SimpleNamespace(
                shape=s,
                qkv=jt.array(np.concatenate([parts[n] for n in "qkv"])),
                o=jt.array(parts["o"]),
                gate_up=jt.array(np.concatenate([parts["gate"], parts["up"]])),
                down=jt.array(parts["down"]),
                **{n: jt.array(v) for n, v in norms.items()},
            )
        )
    embedding = jt.array(random.standard_normal((VOCAB, s.hidden_size)).astype(dtype))
    norm = jt.array(random.uniform(0.5, 1.5, s.hidden_size).astype(np.float32))
    head = (random.standard_normal((VOCAB, s.hidden_size)) / 5).astype(dtype)
    packed, unpacked = PackedLinear(head), SimpleNamespace(packed=jt.array(head))
    reference = Decoder(plain, embedding, norm, unpacked)
    return Decoder(ours, embedding, norm, packed), reference, dtype, tolerance_of(request.param, body)


@pytest.fixture(scope="module")
def rope():
    angles = np.arange(64, dtype=np.float32)[:, None] * 100.0 ** (-np.arange(3, dtype=np.float32) / 3)
    return jt.array(np.cos(angles)), jt.array(np.sin(angles))


def run(sides, rope, base=9, planes=LAYERS, wanted=(), logit_rows=ROWS, parents=TREE, told=None):
    """(kernel's PassOutput, its cache, the reference's PassOutput, its planes)."""
    ours, plain, dtype, _ = sides
    random = np.random.default_rng(3)
    ids = jt.array(random.integers(0, VOCAB, ROWS).astype(np.int32))
    data = random.standard_normal((planes, 2, 2, SLOTS, PADDED)).astype(dtype)
    data[..., SHAPE.head_dim :] = 0
    cache = jt.array(data)
    cache.sync()
    got = decoder_pass(ours, ids, RowPlan(np.array(parents)), *rope, cache, base, wanted, logit_rows)
    got.hidden.sync()
    expected, written = reference_decoder_pass(
        plain, ids, RowPlan(np.array(told or parents)), *rope, jt.array(data), base, wanted, logit_rows
    )
    return got, cache.numpy(), expected, written


def assert_close(a, b, tolerance):
    assert np.abs(a.numpy().astype(np.float64) - b.numpy()).max() < tolerance


def test_a_pass_equals_its_layers_one_by_one(sides, rope):
    got, cache, expected, planes = run(sides, rope, wanted=(0, 2, 3))
    for name in ("hidden", "taken", "logits"):
        assert_close(getattr(got, name), getattr(expected, name), sides[3])
    for layer in range(LAYERS):
        assert np.abs(cache[layer].astype(np.float32) - planes[layer].numpy()).max() < sides[3]


def test_the_chosen_tokens_are_the_first_of_the_largest_logits(sides, rope):
    got, _, _, _ = run(sides, rope)
    np.testing.assert_array_equal(got.chosen.numpy(), got.logits.numpy().argmax(1))


def test_the_comparison_notices_another_tree(sides, rope):
    got, _, expected, _ = run(sides, rope, told=[-1, 0, 0, 1, 2, 2, 2])
    assert np.abs(got.logits.numpy() - expected.logits.numpy()).max() > sides[3]


def test_only_the_last_rows_get_logits_if_so_asked(sides, rope):
    every, _, _, _ = run(sides, rope)
    last, _, _, _ = run(sides, rope, logit_rows=2)
    none, _, _, _ = run(sides, rope, logit_rows=0)
    np.testing.assert_array_equal(last.logits.numpy(), every.logits.numpy()[-2:])
    np.testing.assert_array_equal(last.chosen.numpy(), every.chosen.numpy()[-2:])
    assert none.logits is None and none.chosen is None and none.taken is None
    np.testing.assert_array_equal(none.hidden.numpy(), every.hidden.numpy())


def test_without_a_past_one_plane_serves_all_layers_bitwise(sides, rope):
    many, _, _, _ = run(sides, rope, base=0)
    one, _, _, _ = run(sides, rope, base=0, planes=1)
    np.testing.assert_array_equal(many.logits.numpy(), one.logits.numpy())
