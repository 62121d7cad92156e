"""The frozen weights of a decoder layer, packed once for passes and for training that goes through them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ops.kernel import launch, on_cpu
from ops.packing.lanes import pack, pack_gated
from ops.packing.quantize import QUANTIZERS
from ops.packing.random import random_matrices
from ops.packing.tiles import pack_matrices
from runtime import jt

CPU_FILES = ("plan.h", "pass.h")
# C++ text shared by the kernels over layers.
LAYER = "gorgon::Layer<std::remove_const_t<std::remove_reference_t<decltype(*gorgon::raw(in{packed}_p))>>>"


@dataclass(frozen=True)
class LayerShape:
    """The sizes a layer needs. Widths in elements."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    eps: float

    def data(self) -> dict:
        """What the kernels need besides the shapes of their inputs."""
        return {"heads": self.num_heads, "head_dim": self.head_dim, "inner": self.intermediate_size, "eps": self.eps}


class LayerWeights:
    """The frozen weights of one layer. Matrices are (out, in), float16 or float32; norms are float32.

    storage: a name of ``ops.packing.quantize.QUANTIZERS``, else the matrices keep their dtype. The packed matrices are
    concatenated in one Var, ``packed``, their scales in ``scales`` (None without) and both norms in ``norms`` (2, dim).
    They are packed for the bodies that run at the time (``ops.linear``, ``ops.packing.tiles``).
    """

    def __init__(self, shape: LayerShape, norm1, q, k, v, o, norm2, gate, up, down, storage: str | None = None):
        self._hold_norms(shape, norm1, norm2)
        if not on_cpu():
            self.packed, self.scales = pack_matrices([[q, k, v], [o], [gate, up], [down]], storage)
            return
        parts, scales = {"qkv": np.concatenate([q, k, v]), "o": o, "gate": gate, "up": up, "down": down}, {}
        if storage in QUANTIZERS:
            for name, weight in parts.items():
                parts[name], scales[name] = QUANTIZERS[storage](weight)
        self.packed = _concatenated(parts)
        self.scales = _concatenated(scales) if scales else None

    def _hold_norms(self, shape: LayerShape, norm1, norm2) -> None:
        self.shape = shape
        self.norm1, self.norm2 = (jt.array(n.astype(np.float32)).stop_grad() for n in (norm1, norm2))
        self.norms = jt.array(np.stack([norm1, norm2]).astype(np.float32)).stop_grad()

    @classmethod
    def random(cls, shape: LayerShape, storage: str = "float16", seed: int = 0, std: float = 0.02) -> LayerWeights:
        """A layer to measure with: random matrices of a standard deviation, norms of ones. storage: float16, float32
        or a name of ``QUANTIZERS``. On a GPU the host never holds the matrices."""
        self, ones = cls.__new__(cls), np.ones(shape.hidden_size, np.float32)
        self._hold_norms(shape, ones, ones)
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        hidden, inner = shape.hidden_size, shape.intermediate_size
        gate_up = [(inner, hidden)] * 2 if on_cpu() else [(2 * inner, hidden)]
        sizes = [(q + 2 * kv, hidden), (hidden, q), *gate_up, (hidden, inner)]
        self.packed, self.scales = random_matrices(sizes, storage, seed, std)
        return self

    @property
    def inputs(self) -> list:
        """What a kernel is given of them."""
        return [self.norms, self.packed, *([] if self.scales is None else [self.scales])]

    def source(self, first: int) -> str:
        """C++ text of the ``gorgon::Layer`` whose ``inputs`` a kernel gets from number ``first`` on."""
        scales = "nullptr" if self.scales is None else f"gorgon::raw(in{first + 2}_p)"
        return f"{{in{first}_p, gorgon::raw(in{first + 1}_p), {scales}}}"

    def frozen(self) -> dict[str, FrozenMatrix]:
        """The seven matrices by the names of the constructor, none of them copied."""
        s = self.shape
        q, kv, inner = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim, s.intermediate_size
        return {
            "q": FrozenMatrix(self, (q, s.hidden_size), "qkv", 0),
            "k": FrozenMatrix(self, (kv, s.hidden_size), "qkv", q),
            "v": FrozenMatrix(self, (kv, s.hidden_size), "qkv", q + kv),
            "o": FrozenMatrix(self, (s.hidden_size, q), "o", 0),
            "gate": FrozenMatrix(self, (inner, s.hidden_size), "gate_up", 0),
            "up": FrozenMatrix(self, (inner, s.hidden_size), "gate_up", inner),
            "down": FrozenMatrix(self, (s.hidden_size, inner), "down", 0),
        }

    def matrices(self) -> dict[str, np.ndarray]:
        """The seven matrices, (out, in) float32."""
        return {name: matrix.float32().numpy() for name, matrix in self.frozen().items()}


def _concatenated(parts: dict[str, np.ndarray]):
    """One flat Var of the packed parts, in the order that ``gorgon::Layer`` expects."""
    gate_up = pack_gated(parts["gate"], parts["up"])
    packed = [pack(parts["qkv"]), pack(parts["o"]), gate_up, pack(parts["down"])]
    return jt.array(np.concatenate([each.reshape(-1) for each in packed])).stop_grad()


class _Product(jt.Function):
    """The saved state is the packed weights: each of the two products unpacks the matrix and drops it again."""

    def __init__(self, matrix: FrozenMatrix):
        super().__init__()
        self.matrix = matrix

    def execute(self, x):
        return jt.nn.matmul_transpose(x, self.matrix.float32(x))

    def grad(self, upstream):
        with jt.no_grad():  # else the matrix is kept for a second derivative
            return jt.matmul(upstream, self.matrix.float32(upstream))


@dataclass(frozen=True)
class FrozenMatrix:
    """One matrix of a layer's packed weights. shape: (out, in); its outputs are those of ``part`` from ``first``."""

    layer: LayerWeights
    shape: tuple[int, int]
    part: str
    first: int

    def __call__(self, x):
        """y = x W^T, with a gradient to x alone. x: (rows, in) float32 -> (rows, out)."""
        return _Product(self)(x)

    def float32(self, after=None):
        """(out, in) float32, bit for bit the weights that a pass computes with.

        after: a Var to compute first, so that a lazy graph does not unpack all its matrices at once.
        """
        s, alternating = self.layer.shape, self.part == "gate_up"  # on the CPU its blocks are gate, up, gate, up, ...
        return launch(
            self.shape,
            "float32",
            [self.layer.norms if after is None else after, *self.layer.inputs],
            cpu=f"""
            gorgon::Shape s{{0, in1_shape1, (int64_t)data["heads"], (int64_t)data["kv_heads"],
                            (int64_t)data["head_dim"], (int64_t)data["inner"], 0}};
            {LAYER.format(packed=2)} layer{self.layer.source(1)};
            decltype(layer.o(s)) parts[] = {{layer.qkv(s), layer.o(s), layer.gate_up(s), layer.down(s)}};
            gorgon::unpack(parts[(int)data["part"]], out0_shape1, (int64_t)data["first"], out0_shape0,
                           (int64_t)data["begin"], (int64_t)data["step"], out0_p);
            """,
            cuda=f"""
            gorgon::LayerSizes s{{in1_shape1, (int64_t)data["heads"], (int64_t)data["kv_heads"],
                                 (int64_t)data["head_dim"], (int64_t)data["inner"]}};
            {LAYER.format(packed=2)} layer{self.layer.source(1)};
            decltype(layer.o(s)) parts[] = {{layer.qkv(s), layer.o(s), layer.gate_up(s), layer.down(s)}};
            gorgon::unpack(parts[(int)data["part"]], (int64_t)data["output"], out0_shape0, out0_p);
            """,
            cpu_files=CPU_FILES,
            cuda_files=["linear.h"],
            data={
                **s.data(),
                "kv_heads": s.num_kv_heads,
                "part": ("qkv", "o", "gate_up", "down").index(self.part),
                "output": self.first,
                "first": 0 if alternating else self.first,
                "begin": self.first // s.intermediate_size if alternating else 0,
                "step": 2 if alternating else 1,
            },
        )
