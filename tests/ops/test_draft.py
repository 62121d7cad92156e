"""A chain of draft tokens from one kernel is that of its steps, written out in NumPy, whatever the sizes."""

import dataclasses

import numpy as np
import pytest

from ops.draft import DTYPES, KINDS, Chain, Copies, Tape, lay_out
from ops.linear import PackedLinear
from runtime import jt

VOCAB, EPS = 50, 1e-5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Network:
    """Random weights of a network that uses every step, on a tape and in NumPy. Sizes are no multiples of 16."""

    def __init__(self, dim, inner, columns, depths, seed=0):
        self.random = np.random.default_rng(seed)
        self.dim, self.inner, self.columns, self.depths = dim, inner, columns, depths
        self.embedding = self.draw(VOCAB, dim, scale=1.0)
        self.norm, self.bias = self.draw(dim, scale=1.0), self.draw(3 * inner, scale=0.5)
        self.wide, self.back, self.head = self.draw(3 * inner, 3 * dim), self.draw(dim, inner), self.draw(columns, dim)
        self.vocabulary = self.random.permutation(VOCAB)[:columns].astype(np.int32)
        # Numbers that float16 holds, so that both dtypes compute the same.
        self.packed = [PackedLinear(each) for each in (self.wide, self.back, self.head)]

    def draw(self, *shape, scale=None):
        scale = scale or 1.5 / shape[-1] ** 0.5
        return (self.random.standard_normal(shape) * scale).astype(np.float16).astype(np.float32)

    def tape(self):
        wide, back, head = self.packed
        norm, bias = jt.array(self.norm), jt.array(self.bias)
        tape, inner = Tape(self.dim), self.inner
        state, memory = tape.hidden, tape.zeros(self.dim)
        for depth in range(self.depths):
            u = tape.join(tape.norm(state, norm, EPS), memory, tape.token(depth))
            y = tape.linear(u, wide, bias)
            a, b, c = (y.part(i * inner, inner) for i in range(3))
            proposal = tape.linear(tape.multiply(tape.silu(a), tape.tanh(b)), back)
            gate = tape.sigmoid(tape.linear(c, back))
            state, memory = tape.mix(gate, state, proposal), tape.add(memory, proposal)
            tape.choose(tape.linear(state, head))
        return tape

    def chain(self, dtype="float32"):
        return Chain(self.tape(), jt.array(self.embedding), self.vocabulary, dtype)

    def tokens(self, hidden, root, flaw=None):
        """The same in float64. flaw: what is done wrong on purpose."""
        f = np.float64
        state, memory, chosen = hidden.astype(f), np.zeros(self.dim, f), [root]
        for _ in range(self.depths):
            normed = state / np.sqrt((state**2).mean() + EPS) * self.norm
            previous = root if flaw == "token" else chosen[-1]
            u = np.concatenate([normed, memory, self.embedding[previous].astype(f)])
            y = self.wide.astype(f) @ u + (0 if flaw == "bias" else self.bias)
            a, b, c = (y[i * self.inner : (i + 1) * self.inner] for i in range(3))
            proposal = self.back.astype(f) @ (a * sigmoid(a) * np.tanh(b))
            gate = sigmoid(self.back.astype(f) @ c)
            state = gate * state + (1 - gate) * proposal
            if flaw == "mix":
                state = gate * proposal + (1 - gate) * state
            memory = memory + proposal
            best = int(np.argmax(self.head.astype(f) @ state))
            chosen.append(best if flaw == "vocabulary" else int(self.vocabulary[best]))
        return chosen


@pytest.fixture(scope="module", params=[(32, 16, 48), (40, 21, 37), (8, 3, 5)], ids=str)
def network(request):
    return Network(*request.param, depths=3)


@pytest.fixture(scope="module")
def texts(network):
    """(hidden states of two passes, (2, 6, dim); a root for each row, (2, 6))."""
    random = np.random.default_rng(7)
    return random.standard_normal((2, 6, network.dim)).astype(np.float32), random.integers(0, VOCAB, (2, 6))


def differing(network, texts, chain, flaw=None):
    """Rows whose chain is not the one in NumPy."""
    wrong = 0
    for hidden, roots in zip(*texts, strict=True):
        rows = jt.array(hidden[None])
        for row, root in enumerate(roots.tolist()):
            tokens = chain(rows, row, root).numpy()
            assert tokens.shape == (1, chain.num_tokens) and tokens[0, 0] == root
            wrong += tokens[0].tolist() != network.tokens(hidden[row], root, flaw)
    return wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chain_is_that_of_its_steps(network, texts, dtype):
    assert differing(network, texts, network.chain(dtype)) == 0


def test_weights_and_embeddings_of_both_types_serve_one_chain(network, texts):
    *others, head = network.packed
    network.packed = [*others, PackedLinear(network.head.astype(np.float16))]
    chain = dataclasses.replace(network.chain(), embedding=jt.array(network.embedding.astype(np.float16)))
    network.packed = [*others, head]
    assert differing(network, texts, chain) == 0


@pytest.mark.parametrize("flaw", ["token", "bias", "mix", "vocabulary"])
def test_control_a_wrong_step_is_noticed(network, texts, flaw):
    assert differing(network, texts, network.chain(), flaw) > 0


def test_of_equal_logits_the_first_is_chosen():
    for columns in (5, 16, 40):
        head = np.zeros((columns, 16), np.float32)
        head[[columns - 1, columns // 2, columns // 3]] = 1
        tape = Tape(16)
        tape.choose(tape.linear(tape.hidden, PackedLinear(head)))
        chain = Chain(tape, jt.array(np.zeros((columns, 16), np.float32)))
        assert chain(jt.array(np.ones((1, 1, 16), np.float32)), 0, 3).numpy().tolist() == [[3, columns // 3]]


def test_the_worked_example_of_the_layout():
    tape = Tape(16)
    matrix = PackedLinear(np.eye(16, dtype=np.float32))
    one, two = tape.linear(tape.hidden, matrix), tape.linear(tape.hidden, matrix)
    tape.add(one, two)
    steps, own, common = lay_out(tape)
    assert [KINDS[kind] for kind in steps[:, 0]] == ["PRODUCT", "PRODUCT", "WAIT", "SUM"]
    assert (own, common) == (32, 32)
    assert steps[:2, 1:3].tolist() == [[32, 0], [48, 0]] and steps[3, 1:4].tolist() == [16, 32, 48]
    tape = Tape(16)  # threads wait once for products that are read together
    ys = [tape.linear(tape.hidden, matrix) for _ in range(3)]
    for logits in [tape.linear(tape.silu(y), matrix) for y in ys]:
        tape.choose(logits)
    kinds = [KINDS[kind] for kind in lay_out(tape)[0][:, 0]]
    assert kinds.count("WAIT") == 2 and kinds.index("WAIT") == 3


def test_chains_share_copies_in_16_bits_and_copy_nothing_that_is_stored_in_16_bits(network):
    copies, (wide, *_) = Copies(), network.packed
    copy = copies.of(wide, "float16")
    assert copy.dtype == "float16" and copies.of(wide, "float16") is copy
    np.testing.assert_array_equal(copy.numpy(), wide.packed.numpy())
    assert copies.of(wide, "float32") is wide.packed
    short = PackedLinear(network.wide.astype(np.float16))
    assert all(copies.of(short, dtype) is short.packed for dtype in DTYPES)
    assert copies.of(network.packed[1], "float16") is not copy


def test_a_tape_reads_only_tokens_that_were_drafted():
    with pytest.raises(AssertionError):
        Tape(32).token(1)
