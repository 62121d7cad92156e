"""The Hydra head against its equation in NumPy: each depth reads every token drafted before it."""

import numpy as np
import pytest

from heads.decoder import HeadCache
from heads.registry import build
from runtime import jt
from tests.heads.parity import (
    DEPTHS,
    DIM,
    ROWS,
    TOLERANCE,
    VOCAB,
    apart,
    array,
    close,
    draw_text,
    lm_weight_of,
    logits_of,
    norm,
    parameters_of,
    read_tokens,
    run,
    silu,
)


def hydra(p, backbone, h, embedded, num_layers):
    """Logits of the depth that reads these embeddings, oldest first. h: (rows, dim); embedded: list of (rows, dim)."""
    depth = len(embedded) - 1
    x = np.concatenate([h, *[norm(e, p["token_norm.weight"]) for e in embedded]], 1)
    weight, bias = p[f"blocks.{depth}.0.linear.weight"], p[f"blocks.{depth}.0.linear.bias"]
    y = x @ weight[:DIM].T + bias[:DIM] + silu(x @ weight[DIM:].T + bias[DIM:])
    for layer in range(1, num_layers):
        block = f"blocks.{depth}.{layer}.linear"
        y = y + silu(y @ p[f"{block}.weight"].T + p[f"{block}.bias"])
    return y @ lm_weight_of(p, depth, backbone).T


@pytest.mark.parametrize(("lm_head", "num_layers"), [("own", 1), ("shared", 3), ("low_rank", 2)])
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_are_those_of_the_equation(random_head, backbone, lm_head, num_layers, training):
    head = random_head("hydra", num_depths=DEPTHS, num_layers=num_layers, lm_head=lm_head, rank=4)
    head.train() if training else head.eval()
    h, ids = draw_text()
    p, embedded = parameters_of(head), read_tokens(backbone, ids)
    for depth, logits in enumerate(logits_of(run(head, h, ids))):
        assert close(logits, hydra(p, backbone, h, embedded[: depth + 1], num_layers))
        late = [*embedded[:depth], array(backbone.embedding)[ids[0, depth : depth + ROWS]]]  # the token before it
        assert apart(logits, hydra(p, backbone, h, late, num_layers))


def test_the_order_of_the_tokens_counts(random_head):
    head = random_head("hydra", num_depths=DEPTHS)
    head.eval()
    h, ids = draw_text()
    swapped = ids[:, [0, 2, 1, *range(3, ids.shape[1])]]  # those that depth 1 of the first row reads
    forward, backward = (logits_of(run(head, h, each))[1][0] for each in (ids, swapped))
    assert apart(forward, backward)


def test_the_number_of_parameters_is_that_of_the_readme(backbone):
    def count(**options):
        return build("hydra", {"num_depths": DEPTHS, **options}, backbone).num_parameters

    first = DIM * DIM * DEPTHS * (DEPTHS + 3) + 2 * DEPTHS * DIM + DIM
    assert first == DIM + sum(2 * ((k + 2) * DIM * DIM + DIM) for k in range(DEPTHS))
    block = DIM * DIM + DIM
    assert count(num_layers=3) == first + DEPTHS * (2 * block + VOCAB * DIM)
    assert count(lm_head="shared") == first
    assert count(lm_head="low_rank", rank=4) == first + DEPTHS * 4 * (VOCAB + DIM)


def test_the_prefix_layer_feeds_every_depth_and_stays_in_its_sequence(random_head, backbone):
    """Hydra++: h' is the decoder layer's output over n_p(h). The layer itself is compared with NumPy in the EAGLE
    heads' tests."""
    head = random_head("hydra", num_depths=DEPTHS, prefix_layer=True)
    head.eval()
    h, ids = draw_text()
    lengths = ROWS - 2, 2
    found = logits_of(run(head, h, ids, lengths))
    normed, parts = head.prefix_norm(jt.array(h)), []
    for rows in np.split(np.arange(ROWS), [ROWS - 2]):
        cache = HeadCache(head.prefix)
        parts += [array(head.prefix.extend(cache, jt.array(h[t : t + 1]), normed[t : t + 1])) for t in rows.tolist()]
    p, embedded = parameters_of(head), read_tokens(backbone, ids)
    for depth, logits in enumerate(found):
        assert close(logits, hydra(p, backbone, np.concatenate(parts), embedded[: depth + 1], 1))
        assert apart(logits, hydra(p, backbone, h, embedded[: depth + 1], 1))


def test_the_prefix_layer_adds_one_decoder_layer(backbone):
    plain, prefixed = (build("hydra", {"prefix_layer": prefix}, backbone).num_parameters for prefix in (False, True))
    c = backbone.config
    attention = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) * DIM
    assert prefixed - plain == 2 * DIM + attention + 3 * DIM * c.intermediate_size


def test_a_draft_vocabulary_has_the_most_frequent_tokens_and_their_rows(backbone):
    counts = np.zeros(VOCAB, np.int64)
    counts[[40, 3, 17, 60]] = [9, 5, 7, 7]
    head = build("hydra", {"num_depths": 2, "draft_vocab_size": 3}, backbone)
    whole = build("hydra", {"num_depths": 2}, backbone)
    assert whole.draft_vocab is None and head.num_draftable == 3
    assert whole.num_parameters - head.num_parameters == 2 * (VOCAB - 3) * DIM
    head.prepare(counts)
    assert head.draft_vocab.tolist() == [17, 40, 60]
    for depth in range(2):
        rows = backbone.lm_head_weight.numpy()[[17, 40, 60]]
        np.testing.assert_array_equal(head.lm_heads[depth].weight.numpy(), rows)
    assert "drafted" in dict(head.named_parameters()) and "drafted" not in head.trainable()
    h, ids = draw_text(depths=2)
    logits, full = (logits_of(run(each, h, ids))[1] for each in (head, whole))
    np.testing.assert_allclose(logits, full[:, [17, 40, 60]], atol=TOLERANCE)
