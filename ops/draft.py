"""A chain of draft tokens in one kernel on the CPU, because each operation handed to Jittor costs as much as a product.

A head writes on a ``Tape`` how a chain of guesses follows from the backbone's last hidden state and the root; the
kernel runs the steps with the matrices in float16 or float32. Off the CPU, heads draft step by step. A drafted token
needs no exactness: verification drops what the backbone does not choose itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ops.kernel import cpu_header, on_cpu
from ops.linear import PackedLinear
from ops.packing.lanes import LANES
from runtime import jt
from runtime.types import Var

HEADER = "draft.h"
DTYPES = ("float16", "float32")
# The numbers are those of DraftKind of ops/kernels/draft.h.
KINDS = ("WAIT", "TOKEN", "NORM", "PRODUCT", "COPY", "SUM", "TIMES", "SILU", "SIGMOID", "TANH", "MIX", "CHOOSE", "ZERO")


@dataclass(frozen=True)
class Value:
    """A vector of ``size`` floats on a tape, ``first`` floats into the result of a step. step: its number, -1 for the
    hidden state."""

    step: int
    size: int
    first: int = 0

    def part(self, first: int, size: int) -> Value:
        """``size`` of its floats from ``first`` on."""
        assert 0 <= first <= self.size - size, (first, size, self.size)
        return Value(self.step, size, self.first + first)


@dataclass(frozen=True)
class Step:
    """kind: of KINDS; size: floats of the result; inputs: in the order of the methods of Tape. matrix, vector: indices
    into the tape's, -1 for none; index: which token; eps: of a norm."""

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
    drafts one token. A depth that also reads the root's embedding begins with ``tape.join(tape.hidden,
    tape.token(0))``.
    """

    def __init__(self, dim: int):
        self.dim, self.hidden = dim, Value(-1, dim)
        self.steps: list[Step] = []
        self.matrices: list[PackedLinear] = []
        self.vectors: list[Var] = []
        self.num_chosen = 0

    def _add(self, kind: str, size: int, *inputs: Value, **settings) -> Value:
        self.steps.append(Step(kind, size, inputs, **settings))
        return Value(len(self.steps) - 1, size)

    def _number(self, items: list, item) -> int:
        """Its index in the list; appended where it is new."""
        place = next((i for i, each in enumerate(items) if each is item), len(items))
        if place == len(items):
            items.append(item)
        return place

    def token(self, index: int) -> Value:
        """The backbone's embedding of a token, (dim,): 0 is the root, i the i-th token that ``choose`` drafted."""
        assert 0 <= index <= self.num_chosen, (index, self.num_chosen)
        return self._add("TOKEN", self.dim, index=index)

    def norm(self, x: Value, weight: Var, eps: float) -> Value:
        """x / sqrt(mean(x^2) + eps) * weight. weight: (x.size,) float32 Var."""
        assert weight.shape[0] == x.size, (weight.shape, x.size)
        return self._add("NORM", x.size, x, vector=self._number(self.vectors, weight), eps=eps)

    def linear(self, x: Value, matrix: PackedLinear, bias: Var | None = None) -> Value:
        """W x + b. matrix: not quantized; bias: (out,) float32 Var."""
        assert matrix.num_in == x.size and matrix.scale is None, (matrix.num_in, x.size)
        vector = -1 if bias is None else self._number(self.vectors, bias)
        return self._add("PRODUCT", matrix.num_out, x, matrix=self._number(self.matrices, matrix), vector=vector)

    def zeros(self, size: int) -> Value:
        """A vector of zeros."""
        return self._add("ZERO", size)

    def join(self, *values: Value) -> Value:
        """The values concatenated."""
        return self._add("COPY", sum(value.size for value in values), *values)

    def add(self, x: Value, y: Value) -> Value:
        """x + y."""
        return self._pair("SUM", x, y)

    def multiply(self, x: Value, y: Value) -> Value:
        """x * y, elementwise."""
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
        """The next token of the chain is the one with the largest logit, the first of equals."""
        self._add("CHOOSE", logits.size, logits)
        self.num_chosen += 1


def _rounded(size: int) -> int:
    return -(-size // LANES) * LANES


class Copies:
    """Matrices in 16 bits, each copied once: chains of different lengths share them."""

    def __init__(self):
        self._made: dict[int, tuple[PackedLinear, Var]] = {}

    def of(self, matrix: PackedLinear, dtype: str) -> Var:
        """Its packed weights in ``dtype``; weights stored in 16 bits, such as the backbone's, stay as they are."""
        if dtype == "float32" or matrix.packed.dtype != "float32":
            return matrix.packed
        if id(matrix) not in self._made:  # stored with its copy, so that no other matrix gets its id
            self._made[id(matrix)] = matrix, jt.array(matrix.packed.numpy().astype(dtype)).stop_grad()
        return self._made[id(matrix)][1]


@dataclass
class Chain:
    """A finished tape and its weights.

    embedding: (vocab, dim); vocabulary: (columns,) int32, the token that each logit stands for, None for its index;
    dtype: of the matrices, taken from ``copies``.
    """

    tape: Tape
    embedding: Var
    vocabulary: np.ndarray | None = None
    dtype: str = "float16"
    copies: Copies = field(default_factory=Copies)
    _inputs: list = field(init=False)
    _sizes: tuple[int, int] = field(init=False)
    _table: str = field(init=False)

    def __post_init__(self):
        assert self.dtype in DTYPES and on_cpu(), (self.dtype, "the kernel has a body for the CPU alone")
        steps, *self._sizes = lay_out(self.tape)
        vocabulary = np.array([-1], np.int32) if self.vocabulary is None else self.vocabulary.astype(np.int32)
        arrays = [jt.array(each).stop_grad() for each in (steps, _vectors(self.tape)[0], vocabulary)]
        matrices = [self.copies.of(matrix, self.dtype) for matrix in self.tape.matrices]
        self._inputs = [self.embedding, *arrays, *matrices]
        first = 1 + len(self._inputs) - len(matrices)
        self._table = ", ".join(f"gorgon::draft_matrix(gorgon::raw(in{first + i}_p))" for i in range(len(matrices)))

    @property
    def num_tokens(self) -> int:
        """Tokens of the chain, the root included."""
        return 1 + self.tape.num_chosen

    def __call__(self, hidden: Var, row: int, root: int) -> Var:
        """hidden: (..., rows, dim) float32, one row a position; ``row`` is the one before the root.

        Returns (1, num_tokens) int32: the root and the tokens drafted after it.
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
    """Norms and biases concatenated, then the eps of the norms; where each vector begins; where each eps is."""
    arrays = [np.asarray(vector.numpy(), np.float32).reshape(-1) for vector in tape.vectors]
    firsts = np.cumsum([0, *(len(each) for each in arrays)]).tolist()
    eps = {
        value: firsts[-1] + i for i, value in enumerate(dict.fromkeys(s.eps for s in tape.steps if s.kind == "NORM"))
    }
    return np.concatenate([*arrays, np.array([*eps, 0.0], np.float32)]), firsts, eps


def lay_out(tape: Tape) -> tuple[np.ndarray, int, int]:
    """The steps as the kernel reads them, (steps, 8) int32: kind, out, a, b, c, n, k, weight; the number of floats that
    are private to each thread, and of those that all threads share.

    Products are shared. A WAIT comes before the first step that reads products which no WAIT precedes.
    Worked example: hidden (16), two products of it (16, 16), their sum: PRODUCT PRODUCT WAIT SUM; offsets 0 for hidden,
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
