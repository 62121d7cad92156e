"""Cross-entropy of a language-model head that never holds all logits and computes gradients on the way.

The logits of a batch are the largest thing in training: 2,048 rows of 32,000 tokens take 262 MB a depth, and as much
again for their gradient. Here a chunk of rows at a time is turned into logits, losses, and gradients of the rows and
the weight, before the next chunk reuses the memory: the weights of the losses are known beforehand, so nothing has to
be computed twice (as in Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, section 3.2).

On the CPU all of it is one kernel. On CUDA the products are cuBLAS's, and one kernel turns a chunk's logits into
losses, ranks and, in their place, their gradient. Besides the requested gradients it holds a chunk of logits,
two where they are a sum, and the next term of a weight's gradient. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from ops.kernel import cpu_header, cuda_in_place, launch, on_cpu
from ops.training import cross_entropy, outer_product
from runtime import jt
from runtime.types import Var

HEADER = "linear_loss.h"
CUDA_FILES = ["loss.h"]
# Logits of a chunk on the CPU: 6 MB fit into the last-level cache together with their factors. 5,000 rows of
# 4,096 tokens, 256 wide, took 143, 140, 138 and 160 ms in chunks of 3, 6, 13 and 25 MB. Below 384 rows the repeated
# passes over weight and gradient cost more: 768 rows of 32,000 tokens, 4,096 wide, took
# 3.4, 3.2 and 2.8 s in chunks of 96, 192 and 384 rows, the last of 49 MB.
CHUNK_BYTES, ENOUGH_ROWS, MOST_BYTES = 6 << 20, 384, 48 << 20
ROW_STEP = 48  # whole tiles of 6 rows and vectors of 16
CUDA_CHUNK_BYTES = 128 << 20  # logits of a chunk on CUDA: 1,048 rows of 32,000 tokens, enough for a product


def linear_cross_entropy(terms, targets, row_weights, soft=None, soft_share: float = 0.0):
    """The weighted sum of the losses of rows whose logits are a sum of products, hidden weight^T:

        total = sum_r w_r loss_r
        loss_r = (1 - soft_share) CE(logits_r, target_r) + soft_share KL(p_r || softmax(logits_r))

    terms: (hidden (rows, in), weight (vocab, in)) float32 each: one for a language-model head, two for one with a
    low-rank correction. A list for hidden holds parts with equal numbers of rows, to be stacked. No gradient is
    computed for a Var whose gradient is stopped. targets: (rows,) int32, negative where a row is ignored: it has
    no loss. row_weights: (rows,) float32. soft: p as (ids (rows, k) int32, probabilities (rows, k) float32) of
    the tokens listed, normalised by the caller; id -1 fills up.

    Returns total, a scalar with gradients; losses (rows,) float32, the cross-entropy in nats, 0 where ignored, without
    gradient; ranks (rows,) int32 as ``ops.training.cross_entropy`` defines them, -1 where ignored. Gradients are
    computed together with the losses, unless no factor needs one. On CUDA they are returned once: request several with
    one ``jt.grad``.
    """
    terms = [(hidden if isinstance(hidden, list) else [hidden], weight) for hidden, weight in terms]
    rows, vocab = targets.shape[0], terms[0][1].shape[0]
    assert row_weights.shape[0] == rows > 0, (row_weights.shape, rows)
    for parts, weight in terms:
        shapes = [tuple(part.shape) for part in parts]
        assert rows % len(parts) == 0 and weight.shape[0] == vocab, (rows, len(parts), weight.shape, vocab)
        assert shapes == [(rows // len(parts), weight.shape[1])] * len(parts), (shapes, rows, weight.shape)
    factors = [factor for parts, weight in terms for factor in (*parts, weight)]
    needs_grad = [not jt.flags.no_grad and not factor.is_stop_grad() for factor in factors]
    problem = _Problem([len(parts) for parts, _ in terms], needs_grad, targets, row_weights, soft, soft_share)
    function = _LinearCrossEntropy(problem)
    total = function(*factors) if any(needs_grad) else function.execute(*factors)
    return total, function.losses, function.ranks


@dataclass
class _Problem:
    """The arguments of a sweep besides the factors, which are every term's parts and weight, in order.

    num_parts: of each term; needs_grad: whether a factor gets a gradient.
    """

    num_parts: list[int]
    needs_grad: list[bool]
    targets: Var
    row_weights: Var
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
        sweep = _sweep_by_kernel if on_cpu() else _sweep_by_products
        total, losses, self.ranks, self.grads = sweep(self.problem, factors)
        self.losses = losses.stop_grad()
        return total

    def grad(self, upstream):
        if on_cpu():
            # The scale is usually 1, and checking it saves a second copy of a weight's gradient.
            scale = float(upstream.item())
            return tuple(grad if grad is None or scale == 1 else grad * scale for grad in self.grads)
        # On CUDA a check would wait for the device; a kernel scales instead.
        grads, self.grads = self.grads, None
        assert grads is not None, "on CUDA the gradients are returned once: request all of them with one jt.grad"
        for grad in grads:
            if grad is not None:
                cuda_in_place([grad, upstream], "gorgon::scale(in0_p, in1_p, in0->num);", CUDA_FILES)
        return tuple(grads)


def _sweep_by_kernel(problem: _Problem, factors):
    """(total, losses, ranks, a gradient or None for each factor) in one call of the kernel."""
    targets, soft = problem.targets, problem.soft
    rows, vocab = targets.shape[0], factors[problem.num_parts[0]].shape[0]
    fixed = [targets, problem.row_weights, *(soft or ())]
    inputs = [f"in{len(fixed) + i}" for i in range(len(factors))]
    terms, with_grad = [], []  # with_grad: the factors that get a gradient, in the order of the outputs
    for parts, weight in problem.groups():
        grads = []
        for group in (parts, (weight,)):
            # The kernel computes gradients of all parts or of none.
            chosen = list(group) if any(problem.needs_grad[i] for i in group) else []
            grads.append(", ".join(f"out{3 + len(with_grad) + i}_p" for i in range(len(chosen))))
            with_grad += chosen
        hidden = ", ".join(f"{inputs[i]}_p" for i in parts)
        own = f"{inputs[weight]}_p, {inputs[weight]}_shape1"
        terms.append(f"{{{{{hidden}}}, {own}, {{{grads[0]}}}, {grads[1] or 'nullptr'}}}")
    distributions = "in2_shape1, in0_p, in2_p, in1_p, in3_p" if soft else "0, in0_p, nullptr, in1_p, nullptr"
    total, losses, ranks, *made = jt.code(
        [(1,), (rows,), (rows,), *(tuple(factors[i].shape) for i in with_grad)],
        ["float32", "float32", "int32", *("float32" for _ in with_grad)],
        [*fixed, *factors],
        cpu_header=cpu_header(HEADER),
        cpu_src=f"""
        gorgon::LinearLoss loss{{in0_shape0, {inputs[problem.num_parts[0]]}_shape0, {distributions},
                                 (float)data["soft_share"], out0_p, out1_p, out2_p}};
        gorgon::LinearTerm terms[{len(terms)}] = {{{", ".join(terms)}}};
        gorgon::linear_cross_entropy(loss, terms, (int64_t)data["chunk_rows"]);
        """,
        data={"soft_share": problem.soft_share, "chunk_rows": chunk_rows(vocab)},
    )
    grads = dict(zip(with_grad, made, strict=True))
    return total, losses, ranks, [grads.get(i) for i in range(len(factors))]


def chunk_rows(vocab: int) -> int:
    """The largest number of rows whose logits the kernel holds at once."""
    rows = max(CHUNK_BYTES // (4 * vocab), min(ENOUGH_ROWS, MOST_BYTES // (4 * vocab)))
    return max(1, rows // ROW_STEP) * ROW_STEP


def _add(target, more, offset: int = 0) -> None:
    """target[offset:] += more in place, both flattened."""
    call = 'gorgon::add(in0_p + (int64_t)data["offset"], in1_p, in1->num);'
    cuda_in_place([target, more], call, CUDA_FILES, {"offset": offset})


def _sweep_by_products(problem: _Problem, factors):
    """The same on CUDA, chunk by chunk: products by Jittor, so by cuBLAS, and the rest by a kernel. Every chunk is
    launched before the next one is built, so that Jittor, which is lazy, never holds the logits of two.
    """
    groups = problem.groups()
    rows, vocab = problem.targets.shape[0], factors[groups[0][1]].shape[0]
    size = _evened(rows, max(1, CUDA_CHUNK_BYTES // (4 * vocab)))
    with jt.no_grad():
        hidden = [_stacked([factors[i] for i in parts]) for parts, _ in groups]
        weights = [factors[i].detach() for _, i in groups]
        hidden_grads = [
            jt.zeros(tuple(x.shape)) if any(problem.needs_grad[i] for i in parts) else None
            for x, (parts, _) in zip(hidden, groups, strict=True)
        ]
        weight_grads = [None for _ in groups]
        losses, counted, ranks = jt.zeros((rows,)), jt.zeros((rows,)), jt.zeros((rows,), "int32")
        for first in range(0, rows, size):
            chunk = [x[first : first + size] for x in hidden]
            logits = jt.nn.matmul_transpose(chunk[0], weights[0])
            for x, weight in zip(chunk[1:], weights[1:], strict=True):
                _add(logits, jt.nn.matmul_transpose(x, weight))
            _finish_chunk(problem, logits, first, losses, counted, ranks)
            for i, (x, weight) in enumerate(zip(chunk, weights, strict=True)):
                if hidden_grads[i] is not None:
                    _add(hidden_grads[i], jt.matmul(logits, weight), first * weight.shape[1])
                if problem.needs_grad[groups[i][1]]:
                    more = outer_product(logits, x)
                    if weight_grads[i] is None:
                        weight_grads[i] = more
                        more.sync()
                    else:
                        _add(weight_grads[i], more)
        grads = []
        for (parts, _), hidden_grad, weight_grad in zip(groups, hidden_grads, weight_grads, strict=True):
            num = rows // len(parts)
            grads += [None if hidden_grad is None else hidden_grad[i * num : (i + 1) * num] for i in range(len(parts))]
            grads.append(weight_grad)
    call = "gorgon::total(in0_p, in0->num, out0_p);"
    total = launch((1,), "float32", [counted], cpu='#error "for CUDA alone"', cuda=call, cuda_files=CUDA_FILES)
    return total, losses, ranks, grads


def _evened(rows: int, most: int) -> int:
    """Rows of a chunk, at most ``most``, so that all chunks are about equal."""
    chunks = -(-rows // most)
    return -(-rows // chunks)


def _stacked(parts: list):
    return parts[0].detach() if len(parts) == 1 else jt.concat([part.detach() for part in parts], 0)


def _finish_chunk(problem: _Problem, logits, first: int, losses, counted, ranks) -> None:
    """Turn the logits of the rows from ``first`` into their gradient, if needed, and write the rows' losses, parts of
    the total, and ranks."""
    soft = problem.soft or ()
    distributions = "in3_shape1, in1_p, in3_p, in2_p, in4_p" if soft else "0, in1_p, nullptr, in2_p, nullptr"
    out = [f"in{3 + len(soft) + i}_p" for i in range(3)]
    cuda_in_place(
        [logits, problem.targets, problem.row_weights, *soft, losses, counted, ranks],
        f"""
        gorgon::LinearLoss loss{{(int)in0_shape1, (int){distributions}, (float)data["soft_share"],
                                 {out[1]}, {out[0]}, {out[2]}}};
        gorgon::linear_loss(loss.from((int64_t)data["first"]), in0_p, in0_shape0, data["wants_grad"] != 0);
        """,
        CUDA_FILES,
        {"soft_share": problem.soft_share, "first": first, "wants_grad": int(any(problem.needs_grad))},
    )


def soft_cross_entropy(logits, targets, soft=None, soft_share: float = 0.0):
    """The same losses of logits (rows, vocab) that exist already: the loss of each row, its cross-entropy, its rank."""
    hard, ranks = cross_entropy(logits, targets)
    if soft is None:
        return hard, hard, ranks
    ids, p = soft
    listed = jt.logical_and(ids >= 0, p > 0)
    log_q = jt.nn.log_softmax(logits, 1).gather(1, jt.maximum(ids, 0))
    log_p = jt.where(listed, p, jt.ones_like(p)).log()
    divergence = (p * listed.float32() * (log_p - log_q)).sum(1)
    return (1 - soft_share) * hard + soft_share * divergence * (targets >= 0).float32(), hard, ranks
