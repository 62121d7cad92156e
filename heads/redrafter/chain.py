"""ReDrafter on a tape."""

from __future__ import annotations

from heads.chains import write, write_lm_logits, write_recurrence
from ops.draft import Tape


def write_chain(head, tape: Tape, num_depths: int) -> bool:
    """A chain of best guesses, see ``heads.chains``."""

    def advance(state, token):
        context, s = state
        return context, tape.silu(write(tape, head.recurrence, tape.join(write(tape, head.token_norm, token), s)))

    def score(state):
        y = write(tape, head.output, write(tape, head.blocks, tape.join(*state)))
        return y if head.config.lm_head == "own" else write_lm_logits(tape, head, y)

    return write_recurrence(tape, num_depths, (tape.hidden, tape.zeros(head.dim)), advance, score)
