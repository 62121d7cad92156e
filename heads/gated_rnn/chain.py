"""The gated RNN on a tape."""

from __future__ import annotations

from heads.chains import write, write_lm_logits, write_recurrence
from ops.draft import Tape, Value


def write_chain(head, tape: Tape, num_depths: int) -> bool:
    """A chain of best guesses, see ``heads.chains``."""
    cell = gru if head.config.cell == "gru" else gated

    def advance(state, token):
        s, e = write(tape, head.state_norm, state[0]), write(tape, head.token_norm, token)
        gate, proposal = cell(head, tape, s, e)
        return (tape.mix(gate, state[0], proposal),)

    return write_recurrence(
        tape, num_depths, (tape.hidden,), advance, lambda state: write_lm_logits(tape, head, state[0])
    )


def gated(head, tape: Tape, s: Value, e: Value) -> tuple[Value, Value]:
    """``GatedRNNHead.gated``."""
    joint, dim, inner = write(tape, head.joint, tape.join(s, e)), head.dim, head.config.inner_size
    gate, a, b = joint.part(0, dim), joint.part(dim, inner), joint.part(dim + inner, inner)
    return tape.sigmoid(gate), write(tape, head.proposal_down, tape.multiply(tape.silu(a), b))


def gru(head, tape: Tape, s: Value, e: Value) -> tuple[Value, Value]:
    """``GatedRNNHead.gru``."""
    gates = tape.sigmoid(write(tape, head.gates, tape.join(s, e)))
    reset = tape.multiply(gates.part(head.dim, head.dim), s)
    return gates.part(0, head.dim), tape.tanh(write(tape, head.proposal, tape.join(reset, e)))
