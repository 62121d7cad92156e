"""How a run accepts drafts: from the options to the rule of each text and to what the records say of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decoding.sampling import Sampler
from decoding.verify import check_thresholds

if TYPE_CHECKING:
    from decoding.rules import Rule

GREEDY, LOSSLESS, TYPICAL = "greedy", "lossless", "typical"
TOP, SAMPLED = "top", "sampled"
EPSILON, ALPHA = 0.09, 0.3  # what Medusa's code has


@dataclass(frozen=True)
class Acceptance:
    """accept: the rule by name. sampler: None for greedy. draft: whether drafts are the head's best guesses or drawn.
    epsilon, alpha: of typical acceptance, else None. seed: of the whole run."""

    accept: str = GREEDY
    sampler: Sampler | None = None
    draft: str = TOP
    epsilon: float | None = None
    alpha: float | None = None
    seed: int = 0

    @property
    def exact(self) -> bool:
        """Whether the head's tokens have to be its twin's: nothing is left to chance."""
        return self.sampler is None or self.sampler.temperature == 0

    def rule(self, prompt: int = 0, turn: int = 0) -> Rule:
        """The rule of one text, by the index of its prompt and of its turn: its seed follows from the run's and both,
        so that every side and every repeat draws from the same stream."""
        from decoding.rules import Greedy, Lossless, Typical

        seed = (self.seed, prompt, turn)
        if self.accept == GREEDY:
            return Greedy()
        if self.accept == TYPICAL:
            return Typical(self.sampler, self.epsilon, self.alpha, seed)
        return Lossless(self.sampler, seed, self.draft == SAMPLED)

    def fields(self) -> dict:
        """What ``config.decoding`` of a record says of it."""
        drawn = self.sampler
        return {
            "greedy": self.accept == GREEDY,
            "accept": self.accept,
            "temperature": drawn and drawn.temperature,
            "top_p": drawn and drawn.top_p,
            "top_k": drawn and drawn.top_k,
            "draft": self.draft,
            "epsilon": self.epsilon,
            "alpha": self.alpha,
        }


def describe(fields: Mapping[str, Any]) -> str:
    """One phrase for the ``fields`` of an Acceptance: ``lossless, temperature 0.7, top-p 0.9, top-k 0, top drafts``."""
    if fields["accept"] == GREEDY:
        return GREEDY
    text = f"{fields['accept']}, temperature {fields['temperature']:g}, top-p {fields['top_p']:g}"
    text += f", top-k {fields['top_k']}, {fields['draft']} drafts"
    return text + (f", epsilon {fields['epsilon']:g}, alpha {fields['alpha']:g}" if fields["accept"] == TYPICAL else "")


def add_options(add: Callable[..., None]) -> None:
    """The options that say how drafts are accepted. add: (flag, help, **settings of argparse)."""
    choices = (GREEDY, LOSSLESS, TYPICAL)
    add("--greedy", f"the same as --accept {GREEDY}, which is the default", action="store_true")
    add("--accept", f"rule: greedy, drawn without changing the distribution, or Medusa's (default: {GREEDY})",
        choices=choices)  # fmt: skip
    add("--temperature", "logits are divided by it before a token is drawn (default: 1)", metavar="T", type=float)
    add("--top-p", "draw from the most probable tokens that together reach this (default: 1)", metavar="P", type=float)
    add("--top-k", "draw from so many of the most probable tokens; 0: all (default: 0)", metavar="K", type=int)
    drafts = f"drafts are the head's best guesses, or drawn with --accept {LOSSLESS} (default: {TOP})"
    add("--draft", drafts, choices=(TOP, SAMPLED))
    add("--epsilon", f"most that --accept {TYPICAL} asks of a token (default: {EPSILON})", metavar="E", type=float)
    add("--alpha", f"what it asks is alpha * exp(-entropy) at most (default: {ALPHA})", metavar="A", type=float)


def read_acceptance(options: argparse.Namespace) -> Acceptance:
    """What the options ask for. Raises ValueError for options that do not go together and values out of range."""
    accept = options.accept or GREEDY
    if options.greedy and accept != GREEDY:
        raise ValueError(f"--greedy is --accept {GREEDY}; drop it or --accept {accept}")

    def given(*names: str) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]

    sampling, thresholds = given("temperature", "top_p", "top_k"), given("epsilon", "alpha")
    if sampling and accept == GREEDY:
        raise ValueError(f"{sampling[0]} needs --accept {LOSSLESS} or {TYPICAL}; greedy decoding draws nothing")
    if thresholds and accept != TYPICAL:
        raise ValueError(f"{thresholds[0]} needs --accept {TYPICAL}, got --accept {accept}")
    if options.draft == SAMPLED and accept != LOSSLESS:
        raise ValueError(f"--draft {SAMPLED} needs --accept {LOSSLESS}, got --accept {accept}")
    if accept == GREEDY:
        return Acceptance(seed=options.seed)

    def value(name: str, default: float) -> float:
        return default if getattr(options, name) is None else getattr(options, name)

    sampler = Sampler(value("temperature", 1.0), value("top_p", 1.0), value("top_k", 0))
    if accept == LOSSLESS:
        return Acceptance(accept, sampler, options.draft or TOP, seed=options.seed)
    epsilon, alpha = value("epsilon", EPSILON), value("alpha", ALPHA)
    check_thresholds(epsilon, alpha)
    return Acceptance(accept, sampler, TOP, epsilon, alpha, options.seed)
