"""What a training step spends its time on: products with their gradients, cross-entropy, the optimizer's update.

On the CPU, Jittor's own gradient of a product's weight and its cross-entropy take most of a step (docs/LOG.md has
the figures); these compute the same.
"""

from __future__ import annotations

import math

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


def squared_norm(grads: list) -> float:
    """Sum of squares over all gradients, in double precision."""
    if not on_cpu():
        return float(sum(float(g.sqr().sum().item()) for g in grads))
    partial = [
        jt.code(
            (1,),
            "float64",
            [g],
            cpu_header=cpu_header(HEADER),
            cpu_src="out0_p[0] = gorgon::sum_of_squares(in0_p, in0->num);",
        )
        for g in grads
    ]
    return math.fsum(float(p.numpy()[0]) for p in partial)


def reference_adamw(weight, grad, mean, square, *, rate, beta1, beta2, eps, weight_decay, scale, step):
    """One update by the equations of AdamW (arXiv 1711.05101); returns the new (weight, mean, square)."""
    grad = grad * scale
    mean = beta1 * mean + (1 - beta1) * grad
    square = beta2 * square + (1 - beta2) * grad * grad
    update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
    return weight - rate * update - rate * weight_decay * weight, mean, square


def adamw(weight, grad, mean, square, *, rate, beta1, beta2, eps, weight_decay, scale, step) -> None:
    """One AdamW update in place. All Vars have one shape and are float32; ``scale`` multiplies the gradient first;
    ``step`` counts updates from 1."""
    options = dict(rate=rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, scale=scale, step=step)
    if not on_cpu():
        for var, new in zip(
            (weight, mean, square), reference_adamw(weight, grad, mean, square, **options), strict=True
        ):
            var.update(new)
        return
    jt.code(
        (1,),
        "int32",
        [grad, weight, mean, square],
        cpu_header=cpu_header(HEADER),
        cpu_src="""
        gorgon::AdamW o{(float)data["rate"], (float)data["beta1"], (float)data["beta2"], (float)data["eps"],
                        (float)(data["rate"] * data["weight_decay"]), (float)data["scale"],
                        (float)data["correct1"], (float)data["correct2"]};
        gorgon::adamw(o, in0_p, in1_p, in2_p, in3_p, in0->num);
        out0_p[0] = 0;
        """,
        data={**options, "correct1": 1 - beta1**step, "correct2": 1 - beta2**step},
    ).sync()
