"""Has nvcc compile the CUDA source that Jittor generates for the operations this project uses. They are not run.

Started by test_nvcc.py with stand-ins of CUDA's libraries preloaded (fake_cuda.c): one device of compute capability 9.0
on which a launched kernel does nothing. Prints one JSON object: for each operation the number of kernels launched and
products asked of cuBLAS and numbers of cuRAND, or the error. Their results are meaningless and not looked at.
"""

import ctypes
import json
import os
import sys

import numpy as np

from runtime.compile_check import begin

jt = begin()
jt.flags.use_cuda = 1
nn = jt.nn
COUNTERS = [ctypes.c_int.in_dll(ctypes.CDLL(name), "fake_calls") for name in os.environ["LD_PRELOAD"].split()]


def ones(*shape):
    return jt.array(np.ones(shape, np.float32))


def rows(*numbers):
    return jt.array(np.array(numbers, np.int32))


def written():
    target = ones(8, 4)
    target[rows(1, 2)] = ones(2, 4)
    return target


def code(body):
    return jt.code(
        (4,),
        "float32",
        [ones(4)],
        cuda_src=f"__global__ static void copy(in0_type* x, out0_type* y) {{ {body} }} copy<<<1, 4>>>(in0_p, out0_p);",
    )


def gradients():
    left, right = ones(4, 8), ones(8, 16)
    return jt.grad(nn.silu(left @ right).sum(), [left, right])


# `where` comes first: the host reads how many it found, which is 0 only in memory that nobody has used.
OPERATIONS = {
    "where": lambda: jt.where(ones(8, 4) > 0),
    "elementwise": lambda: (ones(8, 4) * 2 + 1).exp().sigmoid(),
    "choose": lambda: jt.where(ones(8, 4) > 0, ones(8, 4), ones(8, 4)),
    "reduce": lambda: [ones(8, 4).sum(0), ones(8, 4).max(-1)],
    "matmul": lambda: ones(8, 4) @ ones(4, 8),
    "matmul float16": lambda: ones(8, 4).float16() @ ones(4, 8).float16(),
    "batched matmul": lambda: nn.bmm(ones(2, 8, 4), ones(2, 4, 8)),
    "argmax": lambda: jt.argmax(ones(8, 4), -1),
    "argsort": lambda: jt.argsort(ones(8, 4), -1),
    "cumsum": lambda: jt.cumsum(ones(8, 4), -1),
    "getitem": lambda: ones(8, 4)[rows(1, 2), rows(1, 2)],
    "setitem": written,
    "concat": lambda: jt.concat([ones(8, 4), ones(8, 4)], 0),
    "softmax": lambda: nn.softmax(ones(8, 128), -1),
    "random normal": lambda: jt.randn(8, 4),
    "gather": lambda: jt.gather(ones(8, 4), 1, jt.array(np.zeros((8, 1), np.int32))),
    "index": lambda: jt.index((8, 4), 0),
    "cast": lambda: ones(8, 4).int32().float16(),
    "limits": lambda: nn.Pool(2)(ones(1, 1, 4, 4)),
    "code": lambda: code("y[threadIdx.x] = x[threadIdx.x];"),
    "gradients": gradients,
    "control": lambda: code("y[threadIdx.x] = no_such_name;"),
}


def count():
    return [counter.value for counter in COUNTERS]


answers = {}
for name, operation in OPERATIONS.items():
    before = count()
    try:
        made = operation()
        jt.sync(list(made) if isinstance(made, (list, tuple)) else [made], True)
    except RuntimeError as error:
        answers[name] = {"error": str(error)[-2000:]}
        continue
    answers[name] = {
        part: after - earlier
        for part, after, earlier in zip(("cudart", "cublas", "curand"), count(), before, strict=True)
    }
print(json.dumps(answers), flush=True)
sys.stdout.flush()
os._exit(0)  # Jittor's tidy end hands memory back to libraries that are none
