"""The updates of the optimizers, in place.

A kernel writes into existing Vars, so no update builds a graph. Jittor does not know of such a write: pending readers
of the old values must be synced before (``jt.sync_all``). On CUDA only ``squared_norm`` waits for the device, once for
all gradients.
"""

from __future__ import annotations

import math

from ops.kernel import cpu_header, cuda_in_place, launch, on_cpu
from runtime import jt

HEADER = "optimizer.h"  # of both bodies, whose functions have the same names
# Of the polynomial a x + b x^3 + c x^5 that each Newton-Schulz iteration applies to the singular values (K. Jordan et
# al., "Muon: an optimizer for hidden layers in neural networks", 2024; arXiv 2502.16982, section 2.1).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SQUARE_BLOCKS = 1024  # as in ops/kernels/cuda/optimizer.h


def _in_place(inputs: list, call: str, data: dict) -> None:
    """Run a kernel body that writes into its inputs. Its one output exists because a call needs one."""
    _launch((1,), "int32", inputs, call, data, also_on_cpu="\nout0_p[0] = 0;").sync()


def _launch(shapes, dtypes, inputs: list, call: str, data: dict, also_on_cpu: str = ""):
    """A kernel call that reads the same for both bodies."""
    options = dict(cpu=call + also_on_cpu, cuda=call, cpu_files=[HEADER], cuda_files=[HEADER], data=data)
    return launch(shapes, dtypes, inputs, **options)


def squared_norm(grads: list) -> float:
    """Sum of squares over all gradients, in double precision; not finite where one of their numbers is not."""
    if on_cpu():
        source = "out0_p[0] = gorgon::sum_of_squares(in0_p, in0->num);"
        partial = [jt.code((1,), "float64", [g], cpu_header=cpu_header(HEADER), cpu_src=source) for g in grads]
        return math.fsum(float(p.reshape(-1)[0]) for p in jt.fetch_sync(partial))
    if not grads:
        return 0.0
    # One array for all of them: a single copy to the host.
    sums, partial = (jt.zeros((size,), "float64") for size in (len(grads), SQUARE_BLOCKS))
    for place, grad in enumerate(grads):
        call = 'gorgon::sum_of_squares(in0_p, in0->num, in1_p, in2_p + (int64_t)data["place"]);'
        cuda_in_place([grad, partial, sums], call, [HEADER], {"place": place})
    return math.fsum(sums.numpy().tolist())


def adamw(weight, grad, mean, square, *, rate, beta1, beta2, eps, weight_decay, scale, step) -> None:
    """One AdamW update in place. All Vars have one shape and are float32; ``scale`` multiplies the gradient first;
    ``step`` counts updates from 1."""
    options = dict(rate=rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, scale=scale, step=step)
    _in_place(
        [grad, weight, mean, square],
        """
        gorgon::AdamW o{(float)data["rate"], (float)data["beta1"], (float)data["beta2"], (float)data["eps"],
                        (float)(data["rate"] * data["weight_decay"]), (float)data["scale"],
                        (float)data["correct1"], (float)data["correct2"]};
        gorgon::adamw(o, in0_p, in1_p, in2_p, in3_p, in0->num);
        """,
        {**options, "correct1": 1 - beta1**step, "correct2": 1 - beta2**step},
    )


def lion(weight, grad, momentum, *, rate, beta1, beta2, weight_decay, scale) -> None:
    """One Lion update in place. All Vars have one shape and are float32; ``scale`` multiplies the gradient first."""
    options = dict(rate=rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay, scale=scale)
    _in_place(
        [grad, weight, momentum],
        """
        gorgon::Lion o{(float)data["rate"], (float)data["beta1"], (float)data["beta2"],
                       (float)(data["rate"] * data["weight_decay"]), (float)data["scale"]};
        gorgon::lion(o, in0_p, in1_p, in2_p, in0->num);
        """,
        options,
    )


def _weighted_sum(a: float, x, b: float, y):
    """a x + b y, a Var of its own."""
    call = 'gorgon::weighted_sum((float)data["a"], in0_p, (float)data["b"], in1_p, out0_p, in0->num);'
    return _launch(tuple(x.shape), "float32", [x, y], call, {"a": a, "b": b})


def _unit_on_device(matrix):
    """The matrix divided by its Frobenius norm, without waiting for the device; CUDA only."""
    return launch(
        [tuple(matrix.shape), (SQUARE_BLOCKS,), (1,)],
        ["float32", "float64", "float32"],
        [matrix],
        cpu='#error "for CUDA alone"',
        cuda="gorgon::unit(in0_p, in0->num, out1_p, out2_p, out0_p);",
        cuda_files=[HEADER],
    )[0]


def orthogonalize(matrix):
    """The orthogonal factor U V^T of a matrix U S V^T, approximately: five Newton-Schulz iterations move singular
    values between 0.7 and 1.2, but for those below some 1e-3 of the Frobenius norm, which stay smaller.

    matrix: (out, in) float32 -> the same shape; zero stays zero. The side that is multiplied with itself is the
    shorter one.
    """
    assert len(matrix.shape) == 2, matrix.shape
    a, b, c = NEWTON_SCHULZ
    with jt.no_grad():
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.transpose(1, 0) if tall else matrix
        x = x * (1 / (math.sqrt(squared_norm([matrix])) + 1e-7)) if on_cpu() else _unit_on_device(x)
        for _ in range(ITERATIONS):
            gram = jt.nn.matmul_transpose(x, x)
            polynomial = _weighted_sum(b, gram, c, jt.nn.matmul_transpose(gram, gram))  # gram is symmetric
            x = _weighted_sum(a, x, 1.0, jt.matmul(polynomial, x))
        return x.transpose(1, 0) if tall else x


def muon(weight, grad, momentum, *, rate, beta, weight_decay, scale) -> None:
    """One Muon update in place. All Vars are (out, in) and float32; ``scale`` multiplies the gradient first.

    The update is scaled by 0.2 sqrt(max(out, in)): the root mean square of its numbers is then near 0.2 whatever the
    shape, where AdamW's is 0.2 to 0.4, so that both go by one learning rate (arXiv 2502.16982, section 2.2).
    """
    factor = 0.2 * math.sqrt(max(weight.shape))
    call = 'gorgon::nesterov((float)data["beta"], (float)data["scale"], in0_p, in1_p, out0_p, in0->num);'
    direction = _launch(tuple(weight.shape), "float32", [grad, momentum], call, {"beta": beta, "scale": scale})
    _in_place(
        [orthogonalize(direction), weight],
        'gorgon::descend((float)data["rate"], (float)data["decay"], in0_p, in1_p, in0->num);',
        {"rate": rate * factor, "decay": rate * weight_decay},
    )


def move_average(average, value, decay: float) -> None:
    """average = decay average + (1 - decay) value, in place. Both Vars have one shape and are float32."""
    _in_place(
        [value, average],
        'gorgon::move_average((float)data["share"], in0_p, in1_p, in0->num);',
        {"share": 1 - decay},
    )


def exchange(a, b) -> None:
    """Two float32 Vars of one shape change their values, bit for bit, in place."""
    _in_place([a, b], "gorgon::exchange(in0_p, in1_p, in0->num);", {})
