"""The gradients of one optimizer step: its sequences are dealt out to passes and ranks, and reduced once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

import runtime
from runtime import jt
from runtime.interrupt import interrupt_requested
from runtime.ranks import all_reduce_sum
from runtime.types import Var
from trainer.data.tokens import TokenizedData
from trainer.loss import Batch, head_loss, make_batch

AUX_SLOTS = 8  # extra losses of a head that are reported; the heads here have at most one


def split(indices: Sequence[int], lengths: np.ndarray, num_parts: int) -> list[list[int]]:
    """The sequences of a step in ``num_parts`` parts of about equally many tokens.

    The longest is dealt first, always to the part with the fewest tokens (the earlier of two). Within a part they keep
    their order. With fewer sequences than parts the last parts are empty. lengths: tokens of all sequences.

    Worked example: sequences 5, 7, 8 of 4, 9 and 6 tokens in two parts: [7], [5, 8].
    """
    if num_parts == 1:
        return [list(indices)]
    loads, parts = [0] * num_parts, [[] for _ in range(num_parts)]
    for place in sorted(range(len(indices)), key=lambda p: (-int(lengths[indices[p]]), p)):
        least = loads.index(min(loads))
        loads[least] += int(lengths[indices[place]])
        parts[least].append(place)
    return [[indices[place] for place in sorted(part)] for part in parts]


@dataclass
class Metrics:
    """The figures of a step, summed over its passes and the ranks.

    losses, top1, top5: per depth that has a loss, nats and shares of the labelled positions, NaN without one; aux:
    extra losses; interrupted: Ctrl-C was pressed on one of the ranks.
    """

    losses: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    top5: list[float] = field(default_factory=list)
    aux: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


class _Sums:
    """The figures of this rank's passes as one array, so that they are reduced with the gradients."""

    def __init__(self, num_depths: int):
        self.depths = np.zeros((3, num_depths))  # loss, first, among the first five: shares of the step's labels
        self.aux, self.names = np.zeros(AUX_SLOTS), []
        self.used = 0
        self._waiting: list[tuple[Batch, list]] = []  # of passes: figures that are not read yet

    def add(self, batch: Batch, parts) -> None:
        """Add a pass. Its figures are computed now and read at the end, so that no pass waits for them."""
        self.used, self.names = len(parts.ranks), list(parts.aux)
        assert len(self.names) <= AUX_SLOTS, self.names
        # Detached: else they would hold the pass's graph, and with it all its activations.
        figures = [each.detach() for each in (*parts.depth_losses, *parts.ranks, *parts.aux.values())]
        jt.sync(figures)
        self._waiting.append((batch, figures))

    def _read(self) -> None:
        if not self._waiting:
            return
        read = iter(jt.fetch_sync([figure for _, figures in self._waiting for figure in figures]))
        for batch, _ in self._waiting:
            losses, ranks, terms = ([next(read) for _ in range(n)] for n in (self.used, self.used, len(self.names)))
            for depth, (loss, found) in enumerate(zip(losses, ranks, strict=True)):
                total = int(batch.label_counts[depth])
                hits = [((found >= 0) & (found < top)).sum() for top in (1, 5)]
                self.depths[:, depth] += [loss.item(), *(hit / total for hit in hits)] if total else np.nan
            self.aux[: len(self.names)] += [batch.share * term.item() for term in terms]
        self._waiting = []

    def flat(self) -> np.ndarray:
        self._read()
        return np.concatenate([self.depths.reshape(-1), self.aux, [interrupt_requested()]]).astype(np.float32)

    def metrics(self, flat: np.ndarray) -> Metrics:
        num_depths = self.depths.shape[1]
        losses, top1, top5 = flat[: 3 * num_depths].reshape(3, num_depths)[:, : self.used].tolist()
        aux = flat[3 * num_depths : 3 * num_depths + len(self.names)]
        return Metrics(losses, top1, top5, dict(zip(self.names, aux.tolist(), strict=True)), bool(flat[-1]))


def gradients(
    head, parameters: list[Var], data: TokenizedData, indices: Sequence[int], source, config, objective
) -> tuple[list[Var] | None, Metrics, list[Batch]]:
    """The gradients of one step's loss, the same on every rank, whatever the number of passes and ranks.

    parameters: the Vars that this step trains; indices: all sequences of the step; source(indices) -> Features.
    Returns (gradients in the order of the parameters, figures, this rank's batches); the gradients are None when no
    position of the step carries loss.
    """
    world = runtime.world_size()
    parts = split(indices, data.lengths, config.accumulate * world)
    sums, total, batches = _Sums(head.num_depths), None, []
    for part in parts[runtime.rank() :: world]:
        if not part:
            continue
        batch = make_batch(data, part, source, head.num_depths, indices)
        if not len(batch.positions):
            continue
        loss = head_loss(head, batch, config.depth_weight, objective)
        grads = jt.grad(loss.total, parameters)
        total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
        jt.sync(total)
        sums.add(batch, loss)
        batches.append(batch)
    if world == 1:
        return total, sums.metrics(sums.flat()), batches
    return *_reduce(total, parameters, sums), batches


def _reduce(grads: list[Var] | None, parameters: list[Var], sums: _Sums) -> tuple[list[Var] | None, Metrics]:
    """Gradients and figures summed over the ranks, in one reduction."""
    if grads is None:
        pieces = [jt.zeros((int(p.numel()),)) for p in parameters]
    else:
        pieces = [g.reshape(-1) for g in grads]
    active = jt.array(np.array([grads is not None], np.float32))
    figures = sums.flat()
    reduced = all_reduce_sum(jt.concat([*pieces, jt.array(figures), active]))
    reduced.sync()
    tail = reduced[int(reduced.numel()) - len(figures) - 1 :].numpy()
    if not tail[-1]:
        return None, sums.metrics(tail[:-1])
    found, first = [], 0
    for parameter in parameters:
        last = first + int(parameter.numel())
        found.append(reduced[first:last].reshape(tuple(parameter.shape)))
        first = last
    jt.sync(found)
    return found, sums.metrics(tail[:-1])
