"""A text as it grows, and the rules that end it, in one place so that every way to decode stops alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# Characters of a window beyond the longest stop string: a character that is cut at either end of the window decodes to
# up to four U+FFFD, and some decoders drop a leading space.
SLACK = 10
# A window is halved when it has more tokens; decoding this many takes some 20 microseconds.
WINDOW = 32


class Text:
    """Token ids up to the one that ends the text: a stop token, the token that completes a stop string, or the
    ``max_new_tokens``-th. ``finish_reason``: None until the text ends, then "stop", "length", or what the loop sets.
    """

    def __init__(
        self,
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
        stop_strings: Iterable[str] = (),
        tokenizer=None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ):
        """Raises ValueError for max_new_tokens < 1, an empty stop string, and stop strings without a tokenizer."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if isinstance(stop_strings, str):
            raise ValueError(f"stop_strings must be a list of strings, got the string {stop_strings!r}")
        self.max_new_tokens, self.stop_ids = max_new_tokens, frozenset(int(token) for token in stop_ids)
        self.stop_strings = tuple(stop_strings)
        if not all(self.stop_strings):
            raise ValueError("a stop string is empty; it would end every text at once")
        if self.stop_strings and tokenizer is None:
            raise ValueError("stop strings need a tokenizer, to know the text of the tokens")
        self.tokenizer, self.on_tokens = tokenizer, on_tokens
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._window = 0  # the first token at which a stop string may still begin

    def add(self, new_ids: list[int]) -> int:
        """Append tokens up to the end of the text and call ``on_tokens`` with them; returns how many were taken.

        Worked example with stop token 2 and the text [5]: add([7, 2, 9, 4]) takes [7, 2] and returns 2; the text
        [5, 7, 2] is finished, reason "stop".
        """
        assert self.finish_reason is None, "the text has ended"
        before = len(self.token_ids)
        for token in new_ids:
            self.token_ids.append(token)
            if token in self.stop_ids or self._completes_stop_string():
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        if self.on_tokens:
            self.on_tokens(self.token_ids[before:])
        return len(self.token_ids) - before

    def decode(self) -> str | None:
        """The text without special tokens, cut before the first stop string; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        text = self.tokenizer.decode(self.token_ids)
        found = [text.find(stop) for stop in self.stop_strings]
        return text[: min((at for at in found if at >= 0), default=len(text))]

    def _completes_stop_string(self) -> bool:
        """Whether the last token completes a stop string. Decodes a window of the last tokens, so that the cost of a
        token does not grow with the text."""
        if not self.stop_strings:
            return False
        tail = self.tokenizer.decode(self.token_ids[self._window :])
        if any(stop in tail for stop in self.stop_strings):
            return True
        if len(self.token_ids) - self._window > WINDOW:
            middle = (self._window + len(self.token_ids)) // 2
            shorter = self.tokenizer.decode(self.token_ids[middle:])
            # A cut within a character decodes differently: then wait for a better place.
            if len(shorter) >= max(map(len, self.stop_strings)) + SLACK and tail.endswith(shorter):
                self._window = middle
        return False
