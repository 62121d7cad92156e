"""The options of decoding, declared once for every command: how drafts are accepted, the tree, and the sizes.

Loads no Jittor, so that a mistyped option is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoding.sampling import Sampler
from decoding.tree import Tree
from decoding.verify import ALPHA, EPSILON, check_thresholds
from runtime.files.documents import read_json
from runtime.files.shown import shown
from runtime.options import flag, option

if TYPE_CHECKING:
    from decoding.rules import Rule

GREEDY, LOSSLESS, TYPICAL = "greedy", "lossless", "typical"
TOP, SAMPLED = "top", "sampled"
AUTO, DYNAMIC, CHAIN = "auto", "dynamic", "chain:"
DEFAULT_NODES = 16
# Rows of the KV cache if the backbone has as many positions; a 7B's cache then takes 1 GiB in float16.
DEFAULT_CACHE = 2048
DRAFT_DTYPES = ("float16", "float32")


# Acceptance ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acceptance:
    """How drafts are accepted. accept: name of the rule. sampler: None for greedy. draft: the head's best guesses or
    sampled ones. epsilon, alpha: of typical acceptance, else None. seed: of all texts together."""

    accept: str = GREEDY
    sampler: Sampler | None = None
    draft: str = TOP
    epsilon: float | None = None
    alpha: float | None = None
    seed: int = 0

    @property
    def exact(self) -> bool:
        """Whether the text is determined: decoding with a head must then give the tokens of the baseline."""
        return self.sampler is None or self.sampler.temperature == 0

    def rule(self, prompt: int = 0, turn: int = 0) -> Rule:
        """The rule of one text. prompt, turn: indices that its seed depends on, so that decoding with and without a
        head, and every repeat, draw from the same stream."""
        from decoding.rules import Greedy, Lossless, Typical

        seed = (self.seed, prompt, turn)
        if self.accept == GREEDY:
            return Greedy()
        if self.accept == TYPICAL:
            return Typical(self.sampler, self.epsilon, self.alpha, seed)
        return Lossless(self.sampler, seed, self.draft == SAMPLED)

    def fields(self) -> dict[str, Any]:
        """Its part of ``config.decoding`` in a result file."""
        sampler = self.sampler
        return {
            "greedy": self.accept == GREEDY,
            "accept": self.accept,
            "temperature": sampler and sampler.temperature,
            "top_p": sampler and sampler.top_p,
            "top_k": sampler and sampler.top_k,
            "draft": self.draft,
            "epsilon": self.epsilon,
            "alpha": self.alpha,
        }


def describe_acceptance(fields: Mapping[str, Any]) -> str:
    """One phrase for ``Acceptance.fields``: ``lossless, temperature 0.7, top-p 0.9, top-k 0, top drafts``."""
    if fields["accept"] == GREEDY:
        return GREEDY
    text = f"{fields['accept']}, temperature {fields['temperature']:g}, top-p {fields['top_p']:g}"
    text += f", top-k {fields['top_k']}, {fields['draft']} drafts"
    return text + (f", epsilon {fields['epsilon']:g}, alpha {fields['alpha']:g}" if fields["accept"] == TYPICAL else "")


@dataclass
class AcceptanceOptions:
    """How tokens are chosen. None is the default that the help states."""

    greedy: bool = option(False, f"the same as --accept {GREEDY}, which is the default")
    accept: str | None = option(
        None,
        f"greedy; lossless: sample without changing the distribution; typical: Medusa's rule (default: {GREEDY})",
        choices=(GREEDY, LOSSLESS, TYPICAL),
    )
    temperature: float | None = option(None, "divides the logits before sampling (default: 1)", metavar="T")
    top_p: float | None = option(
        None, "sample from the most probable tokens that together reach this (default: 1)", metavar="P"
    )
    top_k: int | None = option(None, "sample from this many most probable tokens; 0: all (default: 0)", metavar="K")
    draft: str | None = option(
        None,
        f"drafts are the head's best guesses, or sampled, with --accept {LOSSLESS} (default: {TOP})",
        choices=(TOP, SAMPLED),
    )
    epsilon: float | None = option(
        None, f"threshold of --accept {TYPICAL}: min(epsilon, alpha * exp(-entropy)) (default: {EPSILON})", metavar="E"
    )
    alpha: float | None = option(None, f"alpha of that threshold (default: {ALPHA})", metavar="A")

    def acceptance(self, seed: int = 0) -> Acceptance:
        """The rule. Raises ValueError for options that exclude each other and values out of range."""
        accept = self.accept or GREEDY
        if self.greedy and accept != GREEDY:
            raise ValueError(f"--greedy is --accept {GREEDY}; drop it or --accept {accept}")
        sampling = [flag(name) for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        thresholds = [flag(name) for name in ("epsilon", "alpha") if getattr(self, name) is not None]
        if sampling and accept == GREEDY:
            raise ValueError(f"{sampling[0]} needs --accept {LOSSLESS} or {TYPICAL}; greedy decoding samples nothing")
        if thresholds and accept != TYPICAL:
            raise ValueError(f"{thresholds[0]} needs --accept {TYPICAL}, got --accept {accept}")
        if self.draft == SAMPLED and accept != LOSSLESS:
            raise ValueError(f"--draft {SAMPLED} needs --accept {LOSSLESS}, got --accept {accept}")
        if accept == GREEDY:
            return Acceptance(seed=seed)
        sampler = Sampler(
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.top_k or 0,
        )
        if accept == LOSSLESS:
            return Acceptance(accept, sampler, self.draft or TOP, seed=seed)
        epsilon = EPSILON if self.epsilon is None else self.epsilon
        alpha = ALPHA if self.alpha is None else self.alpha
        check_thresholds(epsilon, alpha)
        return Acceptance(accept, sampler, TOP, epsilon, alpha, seed)


# Trees and sizes -----------------------------------------------------------------------------------------------------


@dataclass
class DecodingOptions(AcceptanceOptions):
    """The options of every command that decodes with a head."""

    max_new_tokens: int = option(128, "longest reply of a turn", metavar="N", least=1)
    nodes: int | None = option(
        None, f"tree budget, root included; 1: no draft (default: {DEFAULT_NODES})", metavar="N", least=1
    )
    tree: str | None = option(
        None, "auto: as bench/calibrate.py chose; dynamic; chain:K; or a JSON file of rank paths", metavar="TREE"
    )
    min_confidence: float | None = option(
        None, "leave nodes out of a dynamic tree that the head is less sure of, 0 to 1 (default: 0)", metavar="P"
    )
    draft_dtype: str = option(
        DRAFT_DTYPES[0],
        "of the copy of the head's matrices that drafts a chain in one call (--tree chain:K, or auto)",
        choices=DRAFT_DTYPES,
    )
    batch_size: int = option(1, "prompts that are decoded together", metavar="N", least=1)
    cache_length: int | None = option(
        None,
        f"rows of the KV cache (default: the backbone's positions, at most {DEFAULT_CACHE})",
        metavar="N",
        least=2,
    )

    def check_tree(self) -> None:
        """Raises ValueError for options of the tree that exclude each other."""
        if self.tree not in (None, DYNAMIC) and self.nodes is not None:
            raise ValueError("--tree already says how many nodes there are; drop --nodes")
        if self.min_confidence is not None and self.tree != DYNAMIC:
            raise ValueError(f"--min-confidence needs --tree {DYNAMIC}, got {self.tree or 'no --tree'}")
        if self.tree == DYNAMIC and self.draft == SAMPLED:
            raise ValueError(f"--draft {SAMPLED} needs a tree that is fixed before drafting, got --tree {DYNAMIC}")

    def cache_rows(self, max_positions: int, num_nodes: int) -> int:
        """Rows of the KV cache of a backbone of this many positions. Raises ValueError if it has fewer than asked for,
        and if a tree of ``num_nodes`` leaves no room."""
        rows = self.cache_length or min(max_positions, DEFAULT_CACHE)
        if rows > max_positions:
            raise ValueError(f"--cache-length {rows} exceeds the {max_positions} positions of the backbone")
        check_room(num_nodes, rows)
        return rows


def check_room(num_nodes: int, cache_length: int) -> None:
    """Raises ValueError if a tree of ``num_nodes`` nodes fills the cache."""
    if num_nodes >= cache_length:
        raise ValueError(f"a tree of {num_nodes} nodes leaves no room for text in a cache of {cache_length} rows")


def read_tree(path: str) -> Tree:
    """The tree of a JSON file, a list of rank paths. Raises ValueError naming the file, OSError if unreadable."""
    content = read_json(path)
    try:
        if not isinstance(content, list) or not all(isinstance(each, list) for each in content):
            raise ValueError("expected a list of rank paths, such as [[0], [1], [0, 0]]")
        return Tree.from_paths(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_tree(text: str, read: Callable[[str], Tree] = read_tree) -> Tree | str:
    """The value of --tree: a tree, AUTO or DYNAMIC. read: reads a file.

    Raises ValueError saying what is wrong, OSError for a file that cannot be read.
    """
    if text in (AUTO, DYNAMIC):
        return text
    if text.startswith(CHAIN):
        count = text.removeprefix(CHAIN)
        if not (count.isascii() and count.isdigit() and len(count) < 10):
            raise ValueError(f"--tree chain:K takes a number of draft tokens from 0, got {shown(text)}")
        return Tree.chain(int(count))
    if not Path(text).exists():
        raise ValueError(
            f"--tree takes {AUTO}, {DYNAMIC}, {CHAIN}K or a JSON file of rank paths; there is no file {shown(text)}"
        )
    return read(text)
