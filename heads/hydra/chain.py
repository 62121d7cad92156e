"""Hydra on a tape."""

from __future__ import annotations

from heads.chains import write, write_depth_logits
from ops.draft import Tape, Value


def write_chain(head, tape: Tape, num_depths: int) -> bool:
    """A chain of best guesses, see ``heads.chains``. False with a prefix layer, which reads rows before the last."""
    if head.config.prefix_layer:
        return False
    x = tape.hidden
    for depth in range(num_depths):
        e = tape.token(depth)
        x = tape.join(x, e if head.token_norm is None else write(tape, head.token_norm, e))
        first, *others = head.blocks[depth]
        y = write_input_block(tape, first, x)
        for block in others:
            y = write(tape, block, y)
        tape.choose(write_depth_logits(tape, head.lm_heads, y, depth))
    return True


def write_input_block(tape: Tape, block, x: Value) -> Value:
    """``InputBlock.execute``. x: (num_inputs dim,) -> (dim,)."""
    y = write(tape, block.linear, x)
    return tape.add(y.part(0, block.dim), tape.silu(y.part(block.dim, block.dim)))
