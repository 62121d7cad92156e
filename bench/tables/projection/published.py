"""Published accept lengths, with the weights that a draft reads, to project their cost on another machine.

All at temperature 0, one text at a time, in tokens per pass of the backbone (the bonus token included). Nothing here
was measured by this project. Each number names its source: a paper, or data that the paper's project ships.
"""

from __future__ import annotations

from dataclasses import dataclass

# Llama-2 7B's sizes, which Vicuna 7B's are, and halves.
WIDTH, INNER, VOCAB, HALF = 4096, 11008, 32000, 2
LM_HEAD = VOCAB * WIDTH
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER


@dataclass(frozen=True)
class Published:
    """One result. rows: of a verification pass, root included. draft_weights: read by a draft before its first token
    can be verified, counted as often as they are read; drafting is assumed to be bound by reading them. backbone: whose
    accept length it is."""

    name: str
    accept_length: float
    speedup: float | None
    rows: int
    draft_weights: int
    source: str
    backbone: str = "Vicuna 7B"

    @property
    def draft_bytes(self) -> int:
        """Bytes of halves that a draft reads."""
        return HALF * self.draft_weights


def medusa(num_heads: int) -> int:
    """Weights of Medusa heads: a residual block and a language-model head each, all read once per pass."""
    return num_heads * (WIDTH * WIDTH + LM_HEAD)


def hydra(num_heads: int) -> int:
    """Weights of Hydra heads. Head i, from 0, reads the hidden state and the embeddings of i + 1 tokens in its first
    block, twice (the block itself and its residual path), and has a language-model head of its own."""
    return sum(2 * (i + 2) * WIDTH * WIDTH + LM_HEAD for i in range(num_heads))


def hydra_plus(num_heads: int, num_layers: int = 4) -> int:
    """Weights of Hydra++: Hydra heads of several layers, after one decoder layer over the hidden states."""
    return LAYER + hydra(num_heads) + num_heads * (num_layers - 1) * WIDTH * WIDTH


def eagle(depth: int) -> int:
    """Weights that EAGLE reads: a matrix that joins embedding and feature, a decoder layer and the backbone's
    language-model head, once per depth of the draft."""
    return depth * (2 * WIDTH * WIDTH + LAYER + LM_HEAD)


def eagle3(depth: int) -> int:
    """Weights that EAGLE-3 reads: a matrix that joins three layers' features once, and per depth a decoder layer whose
    attention sees twice the width, and a language-model head of its own."""
    return 3 * WIDTH * WIDTH + depth * (LAYER + 3 * WIDTH * WIDTH + LM_HEAD)


EAGLE_2 = "arXiv 2406.16858 (Vicuna 7B, temperature 0)"
HYDRA = "arXiv 2402.05109 and its repository"
PUBLISHED = (
    Published(
        name="Medusa-1",
        accept_length=2.57,
        speedup=2.18,
        rows=64,
        draft_weights=medusa(4),
        source="accept length computed from the accuracies by rank that github.com/FasterDecoding/Medusa ships, for "
        "its tree of 63 nodes; speedup: arXiv 2401.10774",
    ),
    Published("Hydra", 3.04, 2.36, 64, hydra(4), HYDRA),
    Published("Hydra++", 3.70, 2.70, 64, hydra_plus(4), HYDRA),
    Published("EAGLE", 3.94, 2.90, 26, eagle(5), EAGLE_2),
    Published("EAGLE-2", 4.98, 3.62, 61, eagle(6), EAGLE_2),
    Published(
        name="EAGLE-3",
        accept_length=6.65,
        speedup=5.58,
        rows=61,
        draft_weights=eagle3(8),
        source="arXiv 2503.01840 (Vicuna 13B, temperature 0); the accept length of a 7B need not be the same",
        backbone="Vicuna 13B",
    ),
)
