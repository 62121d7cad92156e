"""Building blocks that heads share: linear maps, norms, language-model heads per depth, the feature loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.base import Projection, option
from ops.linear import PackedLinear
from ops.training import trainable_linear
from runtime import jt
from runtime.types import Var

LM_HEADS = ("own", "shared", "low_rank")


class Linear(jt.Module):
    """y = x W^T + b with float32 weights (out, in).

    While training it multiplies with gradients; in evaluation with the row-invariant kernel, whose packed copy of the
    weight is made on first use and dropped when training continues.
    """

    def __init__(self, num_in: int, num_out: int, bias: bool = True, weight: np.ndarray | Var | None = None):
        """weight: (out, in), the initial value, copied; None: random."""
        super().__init__()
        if weight is None:
            # Uniform within 1 / sqrt(in), so that outputs have about a third of the inputs' variance.
            weight = (np.random.rand(num_out, num_in) * 2 - 1) / np.sqrt(num_in)
        assert tuple(weight.shape) == (num_out, num_in), (weight.shape, num_out, num_in)
        if isinstance(weight, jt.Var):
            self.weight = weight.copy().detach()
            self.weight.sync()
        else:
            self.weight = jt.array(np.asarray(weight, np.float32))
        if bias:
            self.bias = jt.zeros((num_out,))
        self.has_bias = bias
        self._packed = None

    def execute(self, x: Var) -> Var:
        """x: (rows, in) float32 -> (rows, out) float32."""
        if self.is_training():
            self._packed = None
            y = trainable_linear(x, self.weight)
        else:
            y = self.packed()(x)
        return y + self.bias if self.has_bias else y

    def packed(self) -> PackedLinear:
        """The weight as the kernel of evaluation reads it."""
        if self._packed is None:
            self._packed = PackedLinear.of(self.weight)
        return self._packed

    def project(self, x: Var) -> Projection:
        """``execute`` of a map without bias, not yet computed. x: (rows, in)."""
        assert not self.has_bias
        if self.is_training():
            self._packed = None
        return Projection([(x, self.weight)])


class ResidualBlock(jt.Module):
    """x + SiLU(A x + b), with A and b initially zero, so that the block starts as the identity (Medusa, arXiv
    2401.10774)."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = Linear(dim, dim, weight=np.zeros((dim, dim)))

    def execute(self, x: Var) -> Var:
        """x: (rows, dim) -> (rows, dim)."""
        y = self.linear(x)
        return x + y * y.sigmoid()


class RMSNorm(jt.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = jt.ones((dim,))
        self.eps = eps

    def execute(self, x: Var) -> Var:
        """x: (rows, dim) -> (rows, dim)."""
        return x * jt.rsqrt(x.sqr().mean(-1, keepdims=True) + self.eps) * self.weight


class LowRank(jt.Module):
    """B A x, initially zero: A is random, B zero (as in LoRA, arXiv 2106.09685)."""

    def __init__(self, num_in: int, num_out: int, rank: int):
        super().__init__()
        self.down = Linear(num_in, rank, bias=False)
        self.up = Linear(rank, num_out, bias=False, weight=np.zeros((num_out, rank)))

    def execute(self, x: Var) -> Var:
        """x: (rows, in) -> (rows, out)."""
        return self.up(self.down(x))


@dataclass
class LMHeadOptions:
    """Options of ``DepthLMHeads``, for the Config of a head that has them."""

    lm_head: str = option(
        "own",
        "own: a language-model head per depth, initially a copy; shared: the backbone's; low_rank: the backbone's "
        "and a correction per depth",
    )
    rank: int = option(64, "of each depth's correction with lm_head=low_rank")


class DepthLMHeads(jt.nn.ModuleList):
    """A language-model head per depth, each initially the backbone's LM.

    own: W_k y, with W_k a copy of the backbone's; shared: LM(y), no parameters; low_rank: LM(y) + B_k A_k y.
    """

    def __init__(self, kind: str, rank: int, num_depths: int, backbone, lm_logits, draft_vocab_size: int = 0):
        """lm_logits: the head's ``Head.lm_logits``. draft_vocab_size: columns of the logits, with kind ``own`` only; 0:
        all tokens. They stand for the first tokens until ``take_rows`` is called.

        Raises ValueError for an unknown kind, a rank below 1, and a draft vocabulary that is too large or of a kind
        without one.
        """
        if kind not in LM_HEADS:
            raise ValueError(f"lm_head must be one of {', '.join(LM_HEADS)}, got {kind!r}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        num_out, dim = backbone.config.vocab_size, backbone.config.hidden_size
        if not 0 <= draft_vocab_size <= num_out:
            raise ValueError(f"draft_vocab_size must be from 0 to {num_out}, got {draft_vocab_size}")
        if draft_vocab_size and kind != "own":
            raise ValueError(f"draft_vocab_size {draft_vocab_size} needs lm_head own, got {kind}; set it to 0")
        if kind == "own":
            num_out = draft_vocab_size or num_out
            weight = backbone.lm_head_weight[:num_out]
            own = [Linear(dim, num_out, bias=False, weight=weight) for _ in range(num_depths)]
        else:
            own = [LowRank(dim, num_out, rank) for _ in range(num_depths if kind == "low_rank" else 0)]
        super().__init__(own)
        self.kind, self.lm_logits, self.borrowed = kind, lm_logits, backbone

    def take_rows(self, token_ids: Var) -> None:
        """Reset the weights to the backbone's rows for these tokens, (draft vocabulary,) int32."""
        for each in self:  # each gets memory of its own: weights are updated in place
            each.weight.update(self.borrowed.lm_head_weight[token_ids].detach())
            each.weight.sync()

    def execute(self, y: Var, depth: int) -> Var:
        """y: (rows, dim) -> (rows, vocab) for one depth."""
        if self.kind == "own":
            return self[depth](y)
        return self.lm_logits(y) + self[depth](y) if self.kind == "low_rank" else self.lm_logits(y)

    def project(self, y: Var, depth: int) -> Projection:
        """``execute``, not yet computed: low_rank is two products, LM(y) and B_k (A_k y)."""
        if self.kind == "own":
            return self[depth].project(y)
        terms = [(y, self.borrowed.lm_head_weight)]
        if self.kind == "low_rank":
            terms.append((self[depth].down(y), self[depth].up.weight))
        return Projection(terms)

    def all_depths(self, ys: list[Var]) -> Var:
        """One y (rows, dim) per depth -> (depths * rows, vocab), depth by depth, with one frozen product for all."""
        if self.kind == "shared":
            return self.lm_logits(jt.concat(ys, 0))
        own = jt.concat([self[depth](y) for depth, y in enumerate(ys)], 0)
        return self.lm_logits(jt.concat(ys, 0)) + own if self.kind == "low_rank" else own


def later_positions(positions: np.ndarray, lengths: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions ``steps`` rows later, and which of them are still in the same sequence.

    positions: (num,) int, flat indices into concatenated sequences; lengths: (sequences,) int, see
    ``Head.sequence_lengths``. Returns (later (num,) int32, valid (num,) bool); where the sequence has ended, ``later``
    is the position itself, which is a valid index. Two sequences of 3 and 2 rows, one step:

        positions   0  1  2  3  4
        later       1  2  2  4  4
        valid       T  T  F  T  F
    """
    positions, ends = np.asarray(positions), np.cumsum(lengths)
    assert steps >= 0 and positions.max(initial=0) < ends[-1], (steps, positions.max(initial=0), ends[-1])
    valid = positions + steps < ends[np.searchsorted(ends, positions, side="right")]
    return np.where(valid, positions + steps, positions).astype(np.int32), valid


def smooth_l1(predicted: Var, target: Var, valid: np.ndarray) -> Var:
    """Mean over the valid rows and all dims of d^2 / 2 where d = |predicted - target| is below 1, d - 1/2 elsewhere.

    predicted, target: (rows, dim) float32, without a gradient to the target; valid: (rows,) bool. Returns a scalar, 0
    when no row is valid. This is the feature loss of EAGLE (arXiv 2401.15077).
    """
    d = (predicted - target.detach()).abs()
    share = np.asarray(valid, np.float32) / max(1, int(np.sum(valid)) * predicted.shape[1])
    return (jt.where(d < 1, 0.5 * d * d, d - 0.5) * jt.array(share).unsqueeze(1)).sum()
