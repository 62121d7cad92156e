"""Chains drafted in one call: a head's folder may hold a ``chain.py`` that writes its guesses on a tape
(``ops.draft``).

``chain.py`` defines ``write_chain(head, tape, num_depths) -> bool``: how ``num_depths`` tokens follow the root, each
the best guess after the one before, as ``begin`` of the last row and ``step`` give them. It returns False where the
head's options make a draft depend on more than the last hidden state. A head without the file drafts step by step.
"""

from __future__ import annotations

from collections.abc import Callable

from heads.layers import DepthLMHeads, Linear, LowRank, ResidualBlock, RMSNorm
from heads.registry import chain_writer
from ops.draft import Chain, Copies, Tape, Value
from ops.kernel import on_cpu
from runtime import jt


def chain_of(head, num_depths: int, dtype: str) -> Chain | None:
    """What drafts a chain of ``num_depths`` tokens in one call, with the matrices in float16 or float32.

    None where the head drafts step by step, and everywhere but on the CPU. It is cached in ``head.derived``, so it
    lasts until parameters change; in training mode a new one is made every time.
    """
    if not on_cpu():
        return None
    if head.is_training():
        head.derived.clear()
    key = "chain", num_depths, dtype
    if key not in head.derived:
        head.derived[key] = _write(head, num_depths, dtype)
    return head.derived[key]


def _write(head, num_depths: int, dtype: str) -> Chain | None:
    write_chain, tape = chain_writer(type(head)), Tape(head.dim)
    if write_chain is None or not write_chain(head, tape, num_depths):
        return None
    # Chains of several lengths and dtypes share the copies of the matrices.
    copies = head.derived.setdefault("copies", Copies())
    return Chain(tape, head.borrowed.embedding, head.draft_vocab, dtype, copies)


def write(tape: Tape, module, x: Value) -> Value:
    """What a module of ``heads.layers``, or a sequence of them, computes. x: (in,) -> (out,)."""
    match module:
        case Linear():
            return tape.linear(x, module.packed(), module.bias if module.has_bias else None)
        case RMSNorm():
            return tape.norm(x, module.weight, module.eps)
        case ResidualBlock():
            return tape.add(x, tape.silu(write(tape, module.linear, x)))
        case LowRank():
            return write(tape, module.up, write(tape, module.down, x))
        case jt.nn.Sequential():
            for each in module:
                x = write(tape, each, x)
            return x
    raise TypeError(f"a chain cannot be written through {type(module).__name__}; its steps have to be spelled out")


def write_lm_logits(tape: Tape, head, y: Value) -> Value:
    """The logits of the backbone's language-model head. y: (dim,) -> (vocab,)."""
    return tape.linear(y, head.borrowed.lm_head)


def write_depth_logits(tape: Tape, lm_heads: DepthLMHeads, y: Value, depth: int) -> Value:
    """``DepthLMHeads.execute``. y: (dim,) -> (vocab,)."""
    if lm_heads.kind == "own":
        return write(tape, lm_heads[depth], y)
    shared = tape.linear(y, lm_heads.borrowed.lm_head)
    return tape.add(shared, write(tape, lm_heads[depth], y)) if lm_heads.kind == "low_rank" else shared


def write_medusa(head, tape: Tape, num_depths: int) -> bool:
    """The chain of a ``heads.medusa.MedusaHead``."""
    # Depth by depth at each layer, so that the threads of the kernel wait once a layer and not once a depth.
    ys = [tape.hidden] * num_depths
    for layer in range(head.config.num_layers):
        ys = [write(tape, head.blocks[depth][layer], y) for depth, y in enumerate(ys)]
    for logits in [write_depth_logits(tape, head.lm_heads, y, depth) for depth, y in enumerate(ys)]:
        tape.choose(logits)
    return True


def write_recurrence(
    tape: Tape,
    num_depths: int,
    state: tuple[Value, ...],
    advance: Callable[[tuple[Value, ...], Value], tuple[Value, ...]],
    score: Callable[[tuple[Value, ...]], Value],
) -> bool:
    """The chain of a ``heads.recurrent.RecurrentHead``. state: what ``start`` gives; advance(state, embedding of a
    token) and score(state) write what the head's methods of these names compute."""
    for depth in range(num_depths):
        state = advance(state, tape.token(depth))
        tape.choose(score(state))
    return True
