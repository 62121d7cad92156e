"""The options that decide what is in a corpus, besides the backbone. Loads no Jittor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from runtime.options import check_options, flag, option

# Without --prompts most replies are greedy, as heads are measured, the others sampled for variety.
TEMPERATURE, GREEDY_SHARE = 0.7, 0.8
MAX_TURNS = 4  # of a conversation without --prompts
MAX_LOOPS = 0.04  # largest share of conversations that end in a loop, without --prompts
# Sampling considers this many candidates: enough for top-p 0.95 at temperature 0.8 in nearly every row, and cheap.
NUM_CANDIDATES = 64
# These do not change a conversation: an unfinished corpus may be resumed with other values.
FREE = ("batch_size", "num_tokens", "num_conversations")


@dataclass(frozen=True)
class Options:
    """Raises ValueError for values outside their ranges.

    continuation: ``--continue``, the probability of a further turn; None: as probable as the backbone finds one.
    """

    num_tokens: int | None = option(None, "stop when the corpus has this many tokens", least=1)
    num_conversations: int | None = option(None, "stop when the corpus has this many conversations", least=1)
    batch_size: int = option(64, "conversations generated at a time; does not change the result", least=1)
    seed: int = option(0, "of every random choice", least=0)
    temperature_user: float = option(0.8, "sampling temperature of the user's turns", least=0)
    greedy_share: float | None = option(
        None,
        f"share of the conversations whose replies are greedy (default: {GREEDY_SHARE}, or 0 with --temperature)",
        least=0,
        most=1,
    )
    temperature: float | None = option(
        None,
        f"sampling temperature of the other replies, 0: greedy (default: {TEMPERATURE})",
        least=0,
    )
    top_p: float = option(
        0.95,
        f"sample from the most probable tokens, at most {NUM_CANDIDATES}, that hold this much probability",
        above=0,
        most=1,
    )
    max_turns: int | None = option(
        None,
        f"most question-answer turns of a conversation (default: {MAX_TURNS}, or all those of a prompt)",
        least=1,
    )
    max_length: int = option(512, "most tokens of a conversation, template included", least=1)
    max_user_tokens: int = option(160, "most tokens of a sampled user's turn; longer ones are discarded", least=1)
    max_reply_tokens: int = option(192, "most tokens of a reply", least=1)
    max_loops: float | None = option(
        None,
        "largest share of conversations that end in a reply that repeats itself "
        f"(default: {MAX_LOOPS}, or 1 with --prompts)",
        least=0,
        most=1,
    )
    top_k_probabilities: int = option(
        0,
        "also write this many most probable next tokens of every token, with probabilities, to FILE.top/; 0: none",
        least=0,
    )
    continuation: float | None = None

    def __post_init__(self) -> None:
        if self.greedy_share is None:
            object.__setattr__(self, "greedy_share", GREEDY_SHARE if self.temperature is None else 0.0)
        if self.temperature is None:
            object.__setattr__(self, "temperature", TEMPERATURE)
        check_options(self)
        if self.continuation is not None and not 0 <= self.continuation <= 1:
            raise ValueError(f"--continue must be between 0 and 1, got {self.continuation}")

    def by_flag(self) -> dict[str, Any]:
        """The values that change a conversation, by the option of the command line that sets each."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}
        return {"--continue" if name == "continuation" else flag(name): value for name, value in values.items()}
