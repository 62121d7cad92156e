"""A chain of draft tokens in one kernel on the CPU: a small network, token after token, each told the ones before.

A head's products take microseconds, and so does each operation handed to Jittor. So a head writes on a ``Tape`` how a
chain of guesses follows from the backbone's last hidden state and the root; the kernel goes through the steps with the
matrices in float16 or float32. ``reference_draft_chain`` goes through the same steps in plain Jittor. Elsewhere than on
the CPU heads draft step by step.

A drafted token needs no exactness: what the backbone does not choose itself is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ops.kernel import cpu_header, on_cpu
from ops.linear import LANES, PackedLinear
from ops.select import argmax
from runtime import jt

HEADER = "draft.h"
DTYPES = ("float16", "float32")
# The numbers are those of DraftKind of ops/kernels/draft.h.
KINDS = ("WAIT", "TOKEN", "NORM", "PRODUCT", "COPY", "SUM", "TIMES", "SILU", "SIGMOID", "TANH", "MIX", "CHOOSE", "ZERO")


@dataclass(frozen=True)
class Value:
    """A vector of ``size`` floats on a tape, ``first`` floats into ``step``'s result: the number of the step that makes
    it, -1 for the hidden state."""

    step: int
    size: int
    first: int = 0

    def part(self, first: int, size: int) -> Value:
        """``size`` of its floats from ``first`` on."""
        assert 0 <= first <= self.size - size, (first, size, self.size)
        return Value(self.step, size, self.first + first)


@dataclass(frozen=True)
class Step:
    """kind: of KINDS; size: floats of the result; inputs: in the order of the methods of Tape. matrix, vector: numbers
    of the tape's, -1 for none; index: which token; eps: of a norm."""

    kind: str
    size: int
    inputs: tuple[Value, ...] = ()
    matrix: int = -1
    vector: int = -1
    index: int = -1
    eps: float = 0.0


class Tape:
    """The steps that draft a chain. ``hidden`` (dim,) is the backbone's last hidden state at the row before the root.

    Worked example, Medusa's first depth without a nonlinearity: ``tape.choose(tape.linear(tape.hidden, lm_head))``
    drafts one token. One told the root would read ``tape.join(tape.hidden, tape.token(0))``.
    """

    def __init__(self, dim: int):
        self.dim, self.hidden = dim, Value(-1, dim)
        self.steps: list[Step] = []
        self.matrices: list[PackedLinear] = []
        self.vectors: list = []
        self.num_chosen = 0

    def _add(self, kind: str, size: int, *inputs: Value, **settings) -> Value:
        self.steps.append(Step(kind, size, inputs, **settings))
        return Value(len(self.steps) - 1, size)

    def _number(self, items: list, item) -> int:
        """Its place in the list, where it is put unless it is there already."""
        place = next((i for i, each in enumerate(items) if each is item), len(items))
        if place == len(items):
            items.append(item)
        return place

    def token(self, index: int) -> Value:
        """The backbone's embedding of a token: 0 is the root, i the i-th that ``choose`` has drafted."""
        assert 0 <= index <= self.num_chosen, (index, self.num_chosen)
        return self._add("TOKEN", self.dim, index=index)

    def norm(self, x: Value, weight, eps: float) -> Value:
        """x / sqrt(mean(x^2) + eps) * weight. weight: (x.size,) float32 Var."""
        assert weight.shape[0] == x.size, (weight.shape, x.size)
        return self._add("NORM", x.size, x, vector=self._number(self.vectors, weight), eps=eps)

    def linear(self, x: Value, matrix: PackedLinear, bias=None) -> Value:
        """W x + b. matrix: not quantized; bias: (out,) float32 Var."""
        assert matrix.num_in == x.size and matrix.scale is None, (matrix.num_in, x.size)
        vector = -1 if bias is None else self._number(self.vectors, bias)
        return self._add("PRODUCT", matrix.num_out, x, matrix=self._number(self.matrices, matrix), vector=vector)

    def zeros(self, size: int) -> Value:
        """As many zeros."""
        return self._add("ZERO", size)

    def join(self, *values: Value) -> Value:
        """The values behind each other."""
        return self._add("COPY", sum(value.size for value in values), *values)

    def add(self, x: Value, y: Value) -> Value:
        """x + y."""
        return self._pair("SUM", x, y)

    def multiply(self, x: Value, y: Value) -> Value:
        """x * y, number by number."""
        return self._pair("TIMES", x, y)

    def _pair(self, kind: str, x: Value, y: Value) -> Value:
        assert x.size == y.size, (x.size, y.size)
        return self._add(kind, x.size, x, y)

    def silu(self, x: Value) -> Value:
        """x / (1 + exp(-x))."""
        return self._add("SILU", x.size, x)

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + exp(-x))."""
        return self._add("SIGMOID", x.size, x)

    def tanh(self, x: Value) -> Value:
        """2 sigmoid(2 x) - 1."""
        return self._add("TANH", x.size, x)

    def mix(self, share: Value, x: Value, y: Value) -> Value:
        """share * x + (1 - share) * y."""
        assert share.size == x.size == y.size, (share.size, x.size, y.size)
        return self._add("MIX", x.size, share, x, y)

    def choose(self, logits: Value) -> None:
        """The next token of the chain is that of the largest logit, the first of equals."""
        self._add("CHOOSE", logits.size, logits)
        self.num_chosen += 1


def _rounded(size: int) -> int:
    return -(-size // LANES) * LANES


class Copies:
    """Matrices in 16 bits, each copied once: chains of different lengths share what they have in common."""

    def __init__(self):
        self._made: dict[int, tuple] = {}

    def of(self, matrix: PackedLinear, dtype: str):
        """Its packed weights in ``dtype``; those that are kept in 16 bits, the backbone's say, stay as they are."""
        if dtype == "float32" or matrix.packed.dtype != "float32":
            return matrix.packed
        if id(matrix) not in self._made:  # kept with its copy: else another could get its id
            self._made[id(matrix)] = matrix, jt.array(matrix.packed.numpy().astype(dtype)).stop_grad()
        return self._made[id(matrix)][1]


@dataclass
class Chain:
    """A finished tape with what it computes with.

    embedding: (vocab, dim) Var; meant: (columns,) int32 NumPy, the token of each logit, None for its number; dtype: of
    the matrices, taken from ``copies``.
    """

    tape: Tape
    embedding: object
    meant: np.ndarray | None = None
    dtype: str = "float16"
    copies: Copies = field(default_factory=Copies)
    _inputs: list = field(init=False)
    _sizes: tuple[int, int] = field(init=False)
    _table: str = field(init=False)

    def __post_init__(self):
        assert self.dtype in DTYPES and on_cpu(), (self.dtype, "the kernel has a body for the CPU alone")
        steps, *self._sizes = lay_out(self.tape)
        meant = np.array([-1], np.int32) if self.meant is None else self.meant.astype(np.int32)
        arrays = [jt.array(each).stop_grad() for each in (steps, _vectors(self.tape)[0], meant)]
        matrices = [self.copies.of(matrix, self.dtype) for matrix in self.tape.matrices]
        self._inputs = [self.embedding, *arrays, *matrices]
        first = 1 + len(self._inputs) - len(matrices)
        self._table = ", ".join(f"gorgon::draft_matrix(gorgon::raw(in{first + i}_p))" for i in range(len(matrices)))

    @property
    def num_tokens(self) -> int:
        """Tokens of the chain, the root included."""
        return 1 + self.tape.num_chosen

    def __call__(self, hidden, row: int, root: int):
        """hidden: (..., rows, dim) float32 with one row a position, of which ``row`` is the one before the root.

        Returns (1, num_tokens) int32: the root and the tokens drafted behind it.
        """
        dim, (own, common) = self.tape.dim, self._sizes
        assert hidden.shape[-1] == dim and 0 <= row < hidden.numel() // dim, (hidden.shape, row, dim)
        return jt.code(
            (1, self.num_tokens),
            "int32",
            [hidden, *self._inputs],
            cpu_header=cpu_header(HEADER),
            cpu_src=f"""
            auto* embedding = gorgon::raw(in1_p);
            gorgon::DraftMatrix matrices[] = {{{self._table}}};
            int64_t dim = in1_shape1;
            gorgon::DraftChain<std::remove_const_t<std::remove_reference_t<decltype(*embedding)>>> chain{{
                (const gorgon::DraftStep*)in2_p, in2_shape0, dim, (int64_t)data["own"], (int64_t)data["common"],
                in0_p + (int64_t)data["row"] * dim, embedding, matrices, in3_p, in4_p[0] < 0 ? nullptr : in4_p}};
            gorgon::draft_chain(chain, (int32_t)data["root"], out0_p, out0_shape1);
            """,
            data={"row": row, "root": root, "own": own, "common": common},
        )


def _vectors(tape: Tape) -> tuple[np.ndarray, list[int], dict[float, int]]:
    """Norms and biases behind each other with the eps of the norms, where each vector begins, and where each eps is."""
    arrays = [np.asarray(vector.numpy(), np.float32).reshape(-1) for vector in tape.vectors]
    firsts = np.cumsum([0, *(len(each) for each in arrays)]).tolist()
    eps = {
        value: firsts[-1] + i for i, value in enumerate(dict.fromkeys(s.eps for s in tape.steps if s.kind == "NORM"))
    }
    return np.concatenate([*arrays, np.array([*eps, 0.0], np.float32)]), firsts, eps


def lay_out(tape: Tape) -> tuple[np.ndarray, int, int]:
    """The steps as the kernel reads them, (steps, 8) int32: kind, out, a, b, c, n, k, weight; the floats that each
    thread needs for itself, and those that all share.

    Products lie in the shared ones. A WAIT comes before the first step that reads products which nobody has waited for.
    Worked example: hidden (16), two products of it (16, 16), their sum: PRODUCT PRODUCT WAIT SUM; places 0 for hidden,
    16 for the sum, 32 and 48 for the products.
    """
    _, vector_firsts, eps = _vectors(tape)
    places, own, common = {-1: 0}, _rounded(tape.dim), 0
    for number, step in enumerate(tape.steps):
        if step.kind == "PRODUCT":
            places[number], common = ~common, common + _rounded(step.size)
        elif step.kind != "CHOOSE":
            places[number], own = own, own + _rounded(step.size)

    def place(value: Value) -> int:
        first = places[value.step]
        return (first if first >= 0 else own + ~first) + value.first

    rows, unseen = [], set()

    def write(kind, out=0, a=0, b=0, c=0, n=0, k=0, weight=0) -> None:
        rows.append((KINDS.index(kind), out, a, b, c, n, k, weight))

    for number, step in enumerate(tape.steps):
        if unseen & {value.step for value in step.inputs}:
            write("WAIT")
            unseen.clear()
        inputs, out = [place(value) for value in step.inputs], place(Value(number, 0)) if number in places else 0
        if step.kind == "COPY":
            for value, first in zip(step.inputs, inputs, strict=True):
                write("COPY", out, first, n=value.size)
                out += value.size
        elif step.kind == "TOKEN":
            write("TOKEN", out, n=step.size, k=step.index)
        elif step.kind == "NORM":
            write("NORM", out, *inputs, n=step.size, k=eps[step.eps], weight=vector_firsts[step.vector])
        elif step.kind == "PRODUCT":
            bias = -1 if step.vector < 0 else vector_firsts[step.vector]
            write("PRODUCT", out, *inputs, bias, 0, step.size, step.inputs[0].size, step.matrix)
            unseen.add(number)
        else:
            write(step.kind, out, *inputs, n=step.size)
    return np.array(rows, np.int32), own, common


def reference_draft_chain(tape: Tape, embedding, meant: np.ndarray | None, hidden, root: int):
    """Plain Jittor, step by step, with the matrices as they are. embedding, meant: as of ``Chain``; hidden: (dim,).
    Returns (1, tokens) int32."""
    results, tokens = {-1: hidden.reshape(1, -1)}, [jt.array(np.array([root], np.int32))]
    columns = None if meant is None else jt.array(meant)
    for number, step in enumerate(tape.steps):
        x = [results[value.step][:, value.first : value.first + value.size] for value in step.inputs]
        vector = tape.vectors[step.vector] if step.vector >= 0 else None
        match step.kind:
            case "CHOOSE":
                column = argmax(x[0])
                tokens.append(column if columns is None else columns[column])
                continue
            case "TOKEN":
                y = embedding[tokens[step.index]].float32()
            case "ZERO":
                y = jt.zeros((1, step.size))
            case "NORM":
                y = x[0] * jt.rsqrt(x[0].sqr().mean(-1, keepdims=True) + step.eps) * vector
            case "PRODUCT":
                y = tape.matrices[step.matrix](x[0])
                y = y if vector is None else y + vector
            case "COPY":
                y = jt.concat(x, 1)
            case "SUM":
                y = x[0] + x[1]
            case "TIMES":
                y = x[0] * x[1]
            case "SILU":
                y = x[0] * x[0].sigmoid()
            case "SIGMOID":
                y = x[0].sigmoid()
            case "TANH":
                y = x[0].tanh()
            case "MIX":
                y = x[0] * x[1] + (1 - x[0]) * x[2]
        results[number] = y
    return jt.concat(tokens).reshape(1, -1)
