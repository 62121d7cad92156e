"""The expensive operations of a training step: products with their gradients, cross-entropy, KL divergence.

On the CPU, Jittor's own gradient of a product's weight and its cross-entropy take most of a step (docs/LOG.md has
the figures); these kernels compute the same. On CUDA the products are cuBLAS's, through Jittor.
"""

from __future__ import annotations

from ops.kernel import cpu_header, launch, on_cpu
from runtime import jt

HEADER = "cpu_train.h"
CUDA_FILES = ["loss.h"]


def _library_outer_product(a, b):
    """The same as a sum over rows that Jittor turns into one call of cuBLAS (of oneDNN where CUDA is emulated), without
    a transposed copy of ``a``."""
    if a.shape[0] == 0:
        return jt.zeros((a.shape[1], b.shape[1]))
    shape = [a.shape[0], a.shape[1], b.shape[1]]
    return (a.broadcast(shape, [2]) * b.broadcast(shape, [1])).sum(0)


def outer_product(a, b):
    """a^T b, the gradient of a linear map's weight. a: (rows, m), b: (rows, n) float32 -> (m, n) float32."""
    if not on_cpu():
        return _library_outer_product(a, b)
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


def _launch(shapes, dtypes, inputs, call: str):
    """A kernel call with the same text for both bodies."""
    return launch(shapes, dtypes, inputs, cpu=call, cuda=call, cpu_files=[HEADER], cuda_files=CUDA_FILES)


class _CrossEntropy(jt.Function):
    def execute(self, logits, targets):
        rows = logits.shape[0]
        loss, log_sum, self.rank = _launch(
            [(rows,), (rows,), (rows,)],
            ["float32", "float32", "int32"],
            [logits, targets],
            """
            gorgon::cross_entropy_forward(in0_p, in1_p, in0_shape0, in0_shape1, out0_p, out1_p, out2_p);
            """,
        )
        self.saved = logits, targets, log_sum
        return loss

    def grad(self, upstream):
        logits, targets, log_sum = self.saved
        return _launch(
            tuple(logits.shape),
            "float32",
            [logits, targets, log_sum, upstream],
            """
            gorgon::cross_entropy_backward(in0_p, in1_p, in2_p, in3_p, in0_shape0, in0_shape1, out0_p);
            """,
        ), None


def cross_entropy(logits, targets):
    """Cross-entropy of each row, in nats, and the rank of its target.

    logits: (rows, vocab) float32; targets: (rows,) int32, negative where the row is ignored. Returns losses (rows,)
    float32, 0 where ignored, and ranks (rows,) int32: the place that ``top_k`` gives the target (ties by index), -1
    where ignored.
    """
    function = _CrossEntropy()
    losses = function(logits, targets)
    return losses, function.rank


class _KLDivergence(jt.Function):
    def execute(self, logits, teacher):
        rows = logits.shape[0]
        loss, log_sum, teacher_log_sum = _launch(
            [(rows,), (rows,), (rows,)],
            ["float32", "float32", "float32"],
            [logits, teacher],
            "gorgon::kl_forward(in0_p, in1_p, in0_shape0, in0_shape1, out0_p, out1_p, out2_p);",
        )
        self.saved = logits, teacher, log_sum, teacher_log_sum
        return loss

    def grad(self, upstream):
        return _launch(
            tuple(self.saved[0].shape),
            "float32",
            [*self.saved, upstream],
            "gorgon::kl_backward(in0_p, in1_p, in2_p, in3_p, in4_p, in0_shape0, in0_shape1, out0_p);",
        ), None


def kl_divergence(logits, teacher):
    """KL(softmax(teacher) || softmax(logits)) of each row, in nats; the gradient reaches ``logits`` alone.

    logits, teacher: (rows, vocab) float32. Returns (rows,) float32.
    """
    assert tuple(logits.shape) == tuple(teacher.shape), (logits.shape, teacher.shape)
    return _KLDivergence()(logits, teacher.detach())
