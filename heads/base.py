"""The contract of draft heads. A head guesses the tokens that follow the one the backbone has just chosen.

Alignment: ``hidden[:, t]`` is the backbone's last hidden state at the row that consumed ``token_ids[:, t]``. Depth k
(0-based) scores ``token_ids[:, t + 2 + k]``, given ``hidden[:, :t + 1]`` and tokens up to ``token_ids[:, t + 1 + k]``.
Four tokens a b c d with hidden states A B C D: at t = 0, depth 0 sees A and b and scores c, depth 1 sees A, b, c and
scores d.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ops.select import top_k_log_probabilities
from ops.training import trainable_linear
from runtime import einops, jt
from runtime.types import Var


@dataclass
class Features:
    """What a head reads of the backbone. hidden: (batch, seq, dim) float32, after the final norm; layers: further
    hidden states by layer index, same shape; lengths: of each sequence, where several are packed into one row of the
    batch, else None."""

    hidden: Var
    layers: dict[int, Var] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None


@dataclass
class Projection:
    """Logits not yet computed: the sum over the terms of hidden weight^T. A loss computes them in chunks of rows
    (``ops.linear_loss``).

    terms: (hidden (rows, in), weight (vocab, in)) float32 each; a weight that is not trained has its gradient stopped.
    """

    terms: list[tuple[Var, Var]]

    def value(self) -> Var:
        """All logits, (rows, vocab) float32, with gradients to every term."""
        total, *others = (trainable_linear(hidden, weight) for hidden, weight in self.terms)
        for other in others:
            total = total + other
        return total


@dataclass
class HeadOutput:
    """The output of ``Head.execute`` for some positions.

    logits: one entry per depth: a ``Projection`` or, where the head does not end in a language-model head, a Var
    (positions, vocab) float32; while training, None for a depth without a loss of its own. aux: named extra losses,
    scalars, already weighted. stats: named figures to report, (positions, ...); their means over the held-out text go
    into checkpoints and results, see ``Head.describe``.
    """

    logits: list[Projection | Var | None]
    aux: dict[str, Var] = field(default_factory=dict)
    stats: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stretch of training. share: of the run's optimizer steps. rates: multiples of the learning rate by prefix of a
    parameter's name; the longest match counts, and a parameter without a match is not trained."""

    name: str
    share: float = 1.0
    rates: dict[str, float] = field(default_factory=lambda: {"": 1.0})

    def rate(self, parameter: str) -> float | None:
        """The multiple for a parameter by name; None: not trained in this stage."""
        matches = [prefix for prefix in self.rates if parameter.startswith(prefix)]
        return self.rates[max(matches, key=len)] if matches else None


def option(default, help: str):
    """A field of a head's Config: its default and the sentence that --help prints."""
    return field(default=default, metadata={"help": help})


def at_least(config, **minima: float) -> None:
    """Raises ValueError for an option below its minimum, infinite or nan."""
    for name, minimum in minima.items():
        value = getattr(config, name)
        if not minimum <= value < float("inf"):
            raise ValueError(f"{name} must be at least {minimum} and finite, got {value}")


class Head(jt.Module):
    """Base of all draft heads.

    A subclass has a ``Config`` dataclass with at least ``num_depths``, and sets ``parallel`` and, where it reads more
    than the last hidden state, ``layers``, in the class or in its constructor. It borrows the backbone's embedding and
    language-model head through ``embed`` and ``lm_logits``; they are neither trained nor saved with it.

    parallel: the logits of a depth do not depend on the drafted tokens. trained: False for a head without parameters,
    which drafts without a checkpoint. buffers: names of Vars that are saved with the parameters and not trained; the
    constructor stops their gradient. draft_vocab: (draft vocabulary,) int32, the token that each column of the logits
    stands for; None: every token, in order. derived: what others computed from the parameters and cache here, by key;
    emptied whenever parameters may change.
    """

    Config: ClassVar[type]
    parallel: ClassVar[bool] = False
    trained: ClassVar[bool] = True
    buffers: ClassVar[tuple[str, ...]] = ()
    layers: tuple[int, ...] = ()
    draft_vocab: np.ndarray | None = None

    def __init__(self, config, backbone):
        super().__init__()
        if config.num_depths < 1:
            raise ValueError(f"a head drafts at least one token, got num_depths={config.num_depths}")
        self.config = config
        self.borrowed = backbone
        self.dim, self.vocab_size = backbone.config.hidden_size, backbone.config.vocab_size
        self.derived: dict = {}

    @property
    def num_depths(self) -> int:
        """Tokens this head can draft after the root."""
        return self.config.num_depths

    @property
    def num_draftable(self) -> int:
        """Number of different tokens that it can draft: the columns of its logits."""
        return self.vocab_size if self.draft_vocab is None else len(self.draft_vocab)

    def trainable(self) -> dict[str, Var]:
        """The parameters by name, without the buffers."""
        return {name: p for name, p in self.named_parameters() if name not in self.buffers}

    @property
    def num_parameters(self) -> int:
        """Number of trainable values."""
        return sum(int(p.numel()) for p in self.trainable().values())

    def forget_packed(self) -> None:
        """Drop what was derived from the parameters; called when they were replaced."""
        self.derived.clear()
        for module in self.modules():
            if hasattr(module, "_packed"):
                module._packed = None

    def train(self):
        """Set it in training mode, in which its parameters change."""
        self.derived.clear()
        return super().train()

    # What a head may override about its training and its backbone; most override nothing.

    def prepare(self, token_counts: np.ndarray) -> None:
        """Called before training. token_counts: (vocab,), how often each token occurs in the training replies."""

    def stages(self) -> tuple[Stage, ...]:
        """The stages of training, in order; their shares add up to 1."""
        return (Stage("heads"),)

    def enter(self, stage: str, progress: float) -> None:
        """Called before every training step. stage: its name; progress: within it, from 0 to below 1."""

    def describe(self, means: dict[str, np.ndarray]) -> dict:
        """The figures to report, from the means of ``HeadOutput.stats``; JSON-ready."""
        return {name: np.asarray(mean).tolist() for name, mean in means.items()}

    @property
    def decoding_backbone(self):
        """The backbone to decode with: the borrowed one, unless the head changes it (merged adapters)."""
        return self.borrowed

    def embed(self, token_ids: Var | np.ndarray) -> Var:
        """The backbone's embedding. token_ids: (rows,) int32 -> (rows, dim) float32."""
        ids = token_ids if isinstance(token_ids, jt.Var) else jt.array(np.asarray(token_ids, np.int32))
        return self.borrowed.embed(ids).stop_grad()

    def lm_logits(self, hidden: Var) -> Var:
        """The backbone's frozen language-model head. hidden: (rows, dim), gets gradients -> (rows, vocab)."""
        if self.is_training():
            return jt.nn.matmul_transpose(hidden, self.borrowed.lm_head_weight)
        return self.borrowed.lm_logits(hidden)

    def lm_projection(self, hidden: Var) -> Projection:
        """``lm_logits`` for ``execute``, not yet computed. hidden: (rows, dim)."""
        return Projection([(hidden, self.borrowed.lm_head_weight)])

    @staticmethod
    def sequence_lengths(features: Features) -> np.ndarray:
        """Length of each sequence of a batch, in order, (sequences,) int64."""
        batch, seq = features.hidden.shape[:2]
        return np.asarray(features.lengths if features.lengths is not None else [seq] * batch, np.int64)

    @staticmethod
    def select(hidden: Var, positions: np.ndarray) -> Var:
        """Rows by flat position. hidden: (batch, seq, dim), positions: (num,) int32 -> (num, dim)."""
        rows = einops.rearrange(hidden, "batch seq dim -> (batch seq) dim")
        return rows[jt.array(np.asarray(positions, np.int32))]

    def following(self, token_ids: np.ndarray, positions: np.ndarray, depth: int) -> np.ndarray:
        """The token that depth ``depth`` reads before it guesses: ``token_ids[b, t + 1 + depth]``.

        token_ids: (batch, seq + num_depths) int32; positions: flat indices b * seq + t -> (num,) int32.
        """
        width = token_ids.shape[1]
        seq = width - self.num_depths
        return np.asarray(token_ids).reshape(-1)[positions // seq * width + positions % seq + 1 + depth]

    def execute(self, features: Features, token_ids: np.ndarray, positions: np.ndarray) -> HeadOutput:
        """Training: the logits of all depths at the given positions, under the true tokens.

        features.hidden: (batch, seq, dim); token_ids: (batch, seq + num_depths) int32, the rows' tokens and those that
        follow; positions: (num,) int32, flat indices b * seq + t. Returns (num, vocab) logits per depth.
        """
        raise TypeError(f"{type(self).__name__} does not define execute")

    def begin(self, features: Features, token_ids, state=None):
        """Start a draft. features.hidden: (1, rows, dim), the rows accepted since the last call, oldest first;
        token_ids: (1, rows) int32, the token after each of them (the last one is the tree's root); state: what the last
        ``begin`` of this text returned, None at its start. Returns a state whose first axis is that of nodes."""
        raise TypeError(f"{type(self).__name__} does not define begin")

    def step(self, state, token_ids, parents):
        """One depth of a draft. token_ids: (nodes,) int32, the depth's tokens; parents: (nodes,) int32, the row of
        ``state`` that each node continues. Returns (logits (nodes, vocab) of each node's children, the nodes'
        state)."""
        raise TypeError(f"{type(self).__name__} does not define step")

    def best(self, state, token_ids: np.ndarray, parents: np.ndarray, num: int):
        """The best guesses of one depth, on the host; a head that knows them without scoring the vocabulary overrides
        it.

        token_ids, parents: (nodes,) int32. Returns (log probabilities (nodes, num) float32, largest first; tokens
        (nodes, num) int32; the nodes' state).
        """
        logits, state = self.step(state, jt.array(token_ids), jt.array(parents))
        values, columns = jt.fetch_sync(list(top_k_log_probabilities(logits, num)))
        return values, columns if self.draft_vocab is None else self.draft_vocab[columns], state

    def score_depths(self, state, num_depths: int):
        """The logits of the first ``num_depths`` depths, for heads with ``parallel = True``: (num_depths, vocab)
        float32."""
        raise TypeError(f"{type(self).__name__} does not define score_depths")
