"""Cross-entropy of a language-model head that never holds all logits, and makes the gradients as it goes.

The logits of a batch are the largest thing in training: 2,048 rows of 32,000 tokens take 262 MB a depth, and as much
again for their gradient. Here a chunk of rows at a time becomes logits, losses, and gradients of the rows and of the
weight, before the next chunk takes its memory: the weights of the losses are known beforehand, so nothing has to be
computed again (the way of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from ops.kernel import cpu_header, on_cpu
from ops.training import reference_cross_entropy
from runtime import jt

HEADER = "linear_loss.h"
# Logits of a chunk on the CPU: 6 MB stay in the last-level cache beside what they are multiplied with. 5,000 rows of
# 4,096 tokens, 256 wide, took 143, 140, 138 and 160 ms in chunks of 3, 6, 13 and 25 MB. Where that would be fewer than
# 384 rows, passing over weight and gradient again and again costs more: 768 rows of 32,000 tokens, 4,096 wide, took
# 3.4, 3.2 and 2.8 s in chunks of 96, 192 and 384 rows, of which the last are 49 MB.
CHUNK_BYTES, ENOUGH_ROWS, MOST_BYTES = 6 << 20, 384, 48 << 20
ROW_STEP = 48  # whole tiles of 6 rows and vectors of 16
PLAIN_CHUNK_BYTES = 128 << 20  # elsewhere: enough work for a launch


def linear_cross_entropy(terms, targets, row_weights, soft=None, soft_share: float = 0.0):
    """The weighted sum of the losses of rows whose logits are a sum of products, hidden weight^T:

        total = sum_r w_r loss_r
        loss_r = (1 - soft_share) CE(logits_r, target_r) + soft_share KL(p_r || softmax(logits_r))

    terms: (hidden (rows, in), weight (vocab, in)) float32 each: one for a language-model head, two for one with a
    low-rank correction. A list for hidden holds parts of equally many rows that lie on top of each other. A Var whose
    gradient is stopped gets none, and none is computed. targets: (rows,) int32, negative where a row is ignored: it has
    no loss at all. row_weights: (rows,) float32. soft: p as (ids (rows, k) int32, probabilities (rows, k) float32) of
    the tokens listed, normalised by the caller; id -1 fills up.

    Returns total, a scalar with gradients; losses (rows,) float32, the cross-entropy in nats, 0 where ignored, without
    gradient; ranks (rows,) int32 as ``ops.training.cross_entropy`` defines them, -1 where ignored. Gradients are made
    together with the losses, unless none can be wanted.
    """
    terms = [(hidden if isinstance(hidden, list) else [hidden], weight) for hidden, weight in terms]
    rows, vocab = targets.shape[0], terms[0][1].shape[0]
    assert row_weights.shape[0] == rows > 0, (row_weights.shape, rows)
    for parts, weight in terms:
        shapes = [tuple(part.shape) for part in parts]
        assert rows % len(parts) == 0 and weight.shape[0] == vocab, (rows, len(parts), weight.shape, vocab)
        assert shapes == [(rows // len(parts), weight.shape[1])] * len(parts), (shapes, rows, weight.shape)
    factors = [factor for parts, weight in terms for factor in (*parts, weight)]
    wanted = [not jt.flags.no_grad and not factor.is_stop_grad() for factor in factors]
    problem = _Problem([len(parts) for parts, _ in terms], wanted, targets, row_weights, soft, soft_share)
    function = _LinearCrossEntropy(problem)
    total = function(*factors) if any(wanted) else function.execute(*factors)
    return total, function.losses, function.ranks


@dataclass
class _Problem:
    """What a sweep is told beside the factors, which are every term's parts and weight, one behind the other.

    num_parts: of each term; wanted: which factors get a gradient.
    """

    num_parts: list[int]
    wanted: list[bool]
    targets: object
    row_weights: object
    soft: tuple | None
    soft_share: float

    def groups(self) -> list[tuple[range, int]]:
        """(which factors are its parts, which is its weight) of each term."""
        starts = [0, *accumulate(num + 1 for num in self.num_parts)]
        return [(range(start, start + num), start + num) for start, num in zip(starts, self.num_parts, strict=False)]


class _LinearCrossEntropy(jt.Function):
    def __init__(self, problem: _Problem):
        super().__init__()
        self.problem = problem

    def execute(self, *factors):
        sweep = _sweep_by_kernel if on_cpu() else sweep_by_reference
        total, losses, self.ranks, self.grads = sweep(self.problem, factors)
        self.losses = losses.stop_grad()
        return total

    def grad(self, upstream):
        # The usual scale is 1, and a second copy of a weight's gradient is worth a look at one number.
        scale = float(upstream.item())
        return tuple(grad if grad is None or scale == 1 else grad * scale for grad in self.grads)


def _sweep_by_kernel(problem: _Problem, factors):
    """total, losses, ranks and a gradient or None for each factor, in one call of the kernel."""
    targets, soft = problem.targets, problem.soft
    rows, vocab = targets.shape[0], factors[problem.num_parts[0]].shape[0]
    fixed = [targets, problem.row_weights, *(soft or ())]
    inputs = [f"in{len(fixed) + i}" for i in range(len(factors))]
    terms, given = [], []  # given: the factors that get a gradient, in the order of the outputs
    for parts, weight in problem.groups():
        grads = []
        for group in (parts, (weight,)):
            # The kernel makes gradients of all parts or of none.
            asked = list(group) if any(problem.wanted[i] for i in group) else []
            grads.append(", ".join(f"out{3 + len(given) + i}_p" for i in range(len(asked))))
            given += asked
        hidden = ", ".join(f"{inputs[i]}_p" for i in parts)
        own = f"{inputs[weight]}_p, {inputs[weight]}_shape1"
        terms.append(f"{{{{{hidden}}}, {own}, {{{grads[0]}}}, {grads[1] or 'nullptr'}}}")
    told = "in2_shape1, in0_p, in2_p, in1_p, in3_p" if soft else "0, in0_p, nullptr, in1_p, nullptr"
    total, losses, ranks, *made = jt.code(
        [(1,), (rows,), (rows,), *(tuple(factors[i].shape) for i in given)],
        ["float32", "float32", "int32", *("float32" for _ in given)],
        [*fixed, *factors],
        cpu_header=cpu_header(HEADER),
        cpu_src=f"""
        gorgon::LinearLoss loss{{in0_shape0, {inputs[problem.num_parts[0]]}_shape0, {told},
                                 (float)data["soft_share"], out0_p, out1_p, out2_p}};
        gorgon::LinearTerm terms[{len(terms)}] = {{{", ".join(terms)}}};
        gorgon::linear_cross_entropy(loss, terms, (int64_t)data["chunk_rows"]);
        """,
        data={"soft_share": problem.soft_share, "chunk_rows": chunk_rows(vocab)},
    )
    grads = dict(zip(given, made, strict=True))
    return total, losses, ranks, [grads.get(i) for i in range(len(factors))]


def chunk_rows(vocab: int) -> int:
    """Rows whose logits the kernel holds at once, at most."""
    rows = max(CHUNK_BYTES // (4 * vocab), min(ENOUGH_ROWS, MOST_BYTES // (4 * vocab)))
    return max(1, rows // ROW_STEP) * ROW_STEP


def sweep_by_reference(problem: _Problem, factors, rows_at_once: int | None = None):
    """The same in plain Jittor, where there is no kernel: the reference chunk by chunk, with Jittor's own gradients."""
    groups = problem.groups()
    rows, vocab = problem.targets.shape[0], factors[groups[0][1]].shape[0]
    size = rows_at_once or max(1, PLAIN_CHUNK_BYTES // (4 * vocab))
    # One hidden Var and one weight a term, outside of the graph.
    hidden = [jt.concat([factors[i].detach() for i in parts], 0) for parts, _ in groups]
    weights = [factors[i].detach() for _, i in groups]
    asked_rows = [any(problem.wanted[i] for i in parts) for parts, _ in groups]
    asked_weights = [problem.wanted[i] for _, i in groups]
    total, losses, ranks = jt.zeros((1,)), [], []
    row_grads, weight_grads = [[] for _ in groups], [None for _ in groups]
    for first in range(0, rows, size):
        chunk = slice(first, min(first + size, rows))
        own = [(h[chunk].detach(), w.detach()) for h, w in zip(hidden, weights, strict=True)]
        soft = (problem.soft[0][chunk], problem.soft[1][chunk]) if problem.soft else None
        loss, hard, rank = reference_linear_cross_entropy(
            own, problem.targets[chunk], problem.row_weights[chunk], soft, problem.soft_share
        )
        asked = [own[i][0] for i, ask in enumerate(asked_rows) if ask]
        asked += [own[i][1] for i, ask in enumerate(asked_weights) if ask]
        made = iter(jt.grad(loss, asked) if asked else [])
        for i, ask in enumerate(asked_rows):
            if ask:
                row_grads[i].append(next(made).detach())
        for i, ask in enumerate(asked_weights):
            if ask:
                more = next(made).detach()
                weight_grads[i] = more if weight_grads[i] is None else weight_grads[i] + more
        total = total + loss.detach()
        losses.append(hard.detach())
        ranks.append(rank)
        # Jittor is lazy: without this the logits of all chunks would be alive at once.
        jt.sync([total, hard, rank, *(g[-1] for g in row_grads if g), *(g for g in weight_grads if g is not None)])
    grads = []
    for (parts, _), made, weight_grad in zip(groups, row_grads, weight_grads, strict=True):
        whole, num = jt.concat(made, 0) if made else None, rows // len(parts)
        grads += [None if whole is None else whole[i * num : (i + 1) * num] for i in range(len(parts))]
        grads.append(weight_grad)
    return total, jt.concat(losses, 0), jt.concat(ranks, 0), grads


def reference_soft_cross_entropy(logits, targets, soft=None, soft_share: float = 0.0):
    """Plain Jittor, with all logits (rows, vocab) at hand: the loss of each row, the cross-entropy in it, and ranks;
    see ``linear_cross_entropy``."""
    hard, ranks = reference_cross_entropy(logits, targets)
    if soft is None:
        return hard, hard, ranks
    ids, p = soft
    listed = jt.logical_and(ids >= 0, p > 0)
    log_q = jt.nn.log_softmax(logits, 1).gather(1, jt.maximum(ids, 0))
    log_p = jt.where(listed, p, jt.ones_like(p)).log()
    divergence = (p * listed.float32() * (log_p - log_q)).sum(1)
    return (1 - soft_share) * hard + soft_share * divergence * (targets >= 0).float32(), hard, ranks


def reference_linear_cross_entropy(terms, targets, row_weights, soft=None, soft_share: float = 0.0):
    """Plain Jittor: ``linear_cross_entropy`` of one hidden Var a term, with all logits and Jittor's own gradients."""
    logits = sum(jt.nn.matmul_transpose(hidden, weight) for hidden, weight in terms)
    losses, hard, ranks = reference_soft_cross_entropy(logits, targets, soft, soft_share)
    return (losses * row_weights).sum(), hard, ranks
