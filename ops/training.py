"""What a training step spends its time on: products with their gradients, cross-entropy, KL divergence.

On the CPU, Jittor's own gradient of a product's weight and its cross-entropy take most of a step (docs/LOG.md has
the figures); these compute the same.
"""

from __future__ import annotations

from ops.kernel import cpu_header, on_cpu
from runtime import jt

HEADER = "cpu_train.h"


def reference_outer_product(a, b):
    """a^T b. a: (rows, m), b: (rows, n) -> (m, n)."""
    return jt.matmul(a.transpose(1, 0), b)


def outer_product(a, b):
    """a^T b, the gradient of a linear map's weight. a: (rows, m), b: (rows, n) float32 -> (m, n) float32."""
    if not on_cpu():
        return reference_outer_product(a, b)
    return jt.code(
        (a.shape[1], b.shape[1]),
        "float32",
        [a, b],
        cpu_header=cpu_header(HEADER),
        cpu_src="gorgon::outer_product(in0_p, in1_p, in0_shape0, in0_shape1, in1_shape1, out0_p);",
    )


class _Linear(jt.Function):
    def execute(self, x, weight):
        self.saved = x, weight
        return jt.nn.matmul_transpose(x, weight)

    def grad(self, upstream):
        x, weight = self.saved
        return jt.matmul(upstream, weight), outer_product(upstream, x)


def trainable_linear(x, weight):
    """y = x W^T with gradients to both. x: (rows, in), weight: (out, in), float32 -> (rows, out)."""
    return _Linear()(x, weight)


def reference_cross_entropy(logits, targets):
    """Plain Jittor: the losses and ranks of ``cross_entropy``."""
    kept = targets >= 0
    index = jt.maximum(targets, 0).unsqueeze(1)
    wanted = logits.gather(1, index)
    highest = logits.max(1, keepdims=True)
    log_sum = (logits - highest).exp().sum(1, keepdims=True).log() + highest
    loss = (log_sum - wanted).squeeze(1) * kept.float32()
    earlier = jt.arange(logits.shape[1]).unsqueeze(0) < index
    above = jt.logical_or(logits > wanted, jt.logical_and(logits == wanted, earlier))
    rank = jt.where(kept, above.int32().sum(1), jt.full_like(targets, -1))
    return loss, rank


class _CrossEntropy(jt.Function):
    def execute(self, logits, targets):
        rows = logits.shape[0]
        loss, log_sum, self.rank = jt.code(
            [(rows,), (rows,), (rows,)],
            ["float32", "float32", "int32"],
            [logits, targets],
            cpu_header=cpu_header(HEADER),
            cpu_src="""
            gorgon::cross_entropy_forward(in0_p, in1_p, in0_shape0, in0_shape1, out0_p, out1_p, out2_p);
            """,
        )
        self.saved = logits, targets, log_sum
        return loss

    def grad(self, upstream):
        logits, targets, log_sum = self.saved
        return jt.code(
            tuple(logits.shape),
            "float32",
            [logits, targets, log_sum, upstream],
            cpu_header=cpu_header(HEADER),
            cpu_src="""
            gorgon::cross_entropy_backward(in0_p, in1_p, in2_p, in3_p, in0_shape0, in0_shape1, out0_p);
            """,
        ), None


def cross_entropy(logits, targets):
    """Cross-entropy of each row, in nats, and the rank of its target.

    logits: (rows, vocab) float32; targets: (rows,) int32, negative where the row is ignored. Returns losses (rows,)
    float32, 0 where ignored, and ranks (rows,) int32: the place that ``top_k`` gives the target (ties by index), -1
    where ignored.
    """
    if not on_cpu():
        return reference_cross_entropy(logits, targets)
    function = _CrossEntropy()
    losses = function(logits, targets)
    return losses, function.rank


def reference_kl_divergence(logits, teacher):
    """Plain Jittor: the losses of ``kl_divergence``."""
    log_p, log_q = (jt.nn.log_softmax(x, 1) for x in (teacher.detach(), logits))
    return (log_p.exp() * (log_p - log_q)).sum(1)


class _KLDivergence(jt.Function):
    def execute(self, logits, teacher):
        rows = logits.shape[0]
        loss, log_sum, teacher_log_sum = jt.code(
            [(rows,), (rows,), (rows,)],
            ["float32", "float32", "float32"],
            [logits, teacher],
            cpu_header=cpu_header(HEADER),
            cpu_src="gorgon::kl_forward(in0_p, in1_p, in0_shape0, in0_shape1, out0_p, out1_p, out2_p);",
        )
        self.saved = logits, teacher, log_sum, teacher_log_sum
        return loss

    def grad(self, upstream):
        return jt.code(
            tuple(self.saved[0].shape),
            "float32",
            [*self.saved, upstream],
            cpu_header=cpu_header(HEADER),
            cpu_src="gorgon::kl_backward(in0_p, in1_p, in2_p, in3_p, in4_p, in0_shape0, in0_shape1, out0_p);",
        ), None


def kl_divergence(logits, teacher):
    """KL(softmax(teacher) || softmax(logits)) of each row, in nats; the gradient reaches ``logits`` alone.

    logits, teacher: (rows, vocab) float32. Returns (rows,) float32.
    """
    assert tuple(logits.shape) == tuple(teacher.shape), (logits.shape, teacher.shape)
    return _KLDivergence()(logits, teacher.detach()) if on_cpu() else reference_kl_divergence(logits, teacher)
