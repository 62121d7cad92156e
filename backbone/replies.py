"""Which part of a rendered conversation the assistant says: its replies and the tokens that end them.

A template whose author marked the replies with ``{% generation %}`` is taken at its word. Of any other, the replies are
found by comparing renderings. Take a template that writes "<|head|>", the role, "<|headend|>" before each message,
"<|eot|>" after it, and always the head of a further reply at the end (every message on one line here):

    <|head|>user<|headend|>Hi<|eot|><|head|>assistant<|headend|>Hello<|eot|><|head|>assistant<|headend|>
                                                                ~~~~~~~~~~~~

1. *Where a reply ends.* The conversation is rendered once more with a mark after each reply. Cut at the marks it must
   be the text itself; otherwise the template rewrites what was said, and the conversation is refused. So is one whose
   reply is not found whole before its mark: a template that leaves out the thinking of earlier replies.
2. *Where it begins.* The backbone is asked for a reply with the text that ``add_generation_prompt`` gives for the
   messages before it; what the conversation adds to that text before the reply (a space, an empty thought) is said by
   the assistant. A template that has no such prompt, or changes it later, leaves the reply and the white space that it
   writes before a reply in a conversation of two messages.
3. *What ends a turn*, found once, from two conversations: what both write after a first reply, be it the last message
   (here "<|eot|><|head|>assistant<|headend|>") or answered by the user ("<|eot|><|head|>user<|headend|>"). That is
   "<|eot|><|head|>", of which "<|head|>" is cut off, because the user's first message is opened by it too. White space
   at its end is not the assistant's. Where something else follows a reply, it counts if it is a token that ends
   decoding.

So an end of the whole conversation, the head of the next message, and a line break behind the end token carry no loss.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from backbone.templates import TEMPLATES, ChatTemplate, ConversationError, Messages

# No template changes these characters.
PRIVATE_USE = range(0xE000, 0xF900)
USER_MARK, REPLY_MARK = chr(PRIVATE_USE[0]), chr(PRIVATE_USE[1])
# Pieces that a header or an ending consists of: <|eot|>, [INST], white space, a word.
PIECE = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\s+|[^\s<\[]+|.")
MARKER = r"<[^<>\s]+>"


class Span(NamedTuple):
    """Characters of a rendered conversation: what the assistant says from ``first`` to ``last``, excluded. ``content``
    is where its text begins, after the white space that the template writes."""

    first: int
    content: int
    last: int


class ReplyFinder:
    """Finds the replies in conversations rendered with one template.

    ``ending`` is what ends a turn, white space before it included ("</s>", " </s>", "" where there is nothing).
    Raises ValueError when the template refuses a question and its answer.
    """

    def __init__(self, template: ChatTemplate, bos: str = "", end_texts: Iterable[str] = ()) -> None:
        """bos: the text of the token that begins a text. end_texts: those of the tokens that end decoding."""
        self._template = template
        user, reply = {"role": "user", "content": USER_MARK}, {"role": "assistant", "content": REPLY_MARK}
        prompt, text = template.render([user], True), template.render([user, reply], False)
        before, found, after = text.rpartition(REPLY_MARK)
        lead = before.removeprefix(prompt)
        self._lead = lead if before.startswith(prompt) and not lead.strip() else ""
        try:
            longer = template.render([user, reply, user, reply], False)
        except ConversationError:  # made for one question
            longer = text
        opening, _, turn = before.partition(USER_MARK)
        between = longer.partition(REPLY_MARK)[2].partition(USER_MARK)[0]
        endings = _endings(after, between, opening.removeprefix(bos), turn) if found else ()
        self.ending = endings[0] if endings else ""
        self._ends = (*endings, *end_texts)

    def find(self, messages: Messages) -> tuple[str, list[Span]]:
        """The rendered conversation and the assistant's parts of it. Raises ConversationError where the template
        refuses the conversation or rewrites a reply."""
        text = self._template.render(messages, False)
        return text, list((self._read if self._template.marks_replies else self._infer)(messages, text))

    def _read(self, messages: Messages, text: str) -> Iterator[Span]:
        """The replies that the template's author marked."""
        first, last = _unused(text, 2)
        marked = re.split(f"([{first}{last}])", self._template.render(messages, False, (first, last)))
        if "".join(piece for piece in marked if piece not in (first, last)) != text:
            raise ConversationError("the chat template uses the text of a reply that it marks, so its place is unknown")
        start = place = 0
        for piece in marked:
            if piece == first:
                start = place
            elif piece == last:
                yield Span(start, start, place)
            else:
                place += len(piece)

    def _infer(self, messages: Messages, text: str) -> Iterator[Span]:
        """The replies of any other template, see above."""
        (mark,) = _unused(text, 1)
        replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        marked = [dict(message) for message in messages]
        for index in replies:
            marked[index]["content"] = marked[index]["content"].rstrip() + mark
        pieces = self._template.render(marked, False).split(mark)
        if len(pieces) != len(replies) + 1 or not text.startswith(pieces[0]):
            raise _rewritten(replies[0] if replies else 0)
        place = last = 0
        for index, piece, following in zip(replies, pieces, pieces[1:], strict=False):
            content = messages[index]["content"]
            kept = content.rstrip()
            place += len(piece)
            if text.startswith(content[len(kept) :] + following, place):
                place, kept = place + len(content) - len(kept), content
            said = kept if text.endswith(kept, last, place) else kept.lstrip()
            if not (text.endswith(said, last, place) and text.startswith(following, place)):
                raise _rewritten(index)
            start = place - len(said)
            first = self._begin(messages[:index], text, last, start)
            last = place + len(next((end for end in self._ends if text.startswith(end, place)), ""))
            yield Span(first, start - len(text[first:start].lstrip()), last)
        if place + len(pieces[-1]) != len(text):
            raise _rewritten(len(messages) - 1)

    def _begin(self, before: Messages, text: str, last: int, start: int) -> int:
        """Where the assistant begins to speak whose reply has its text at ``start``; not before ``last``."""
        prompt = self._template.render(before, True)
        if text.startswith(prompt) and last <= len(prompt):
            lead = text[len(prompt) : start]
            if not lead.strip() or prompt != self._template.render(before, False):
                return min(len(prompt), start)
        lead = self._lead if text.endswith(self._lead, last, start) else ""
        return start - len(lead)


def _unused(text: str, count: int) -> list[str]:
    """Private-use characters that the text does not hold."""
    return list(itertools.islice((mark for mark in map(chr, PRIVATE_USE) if mark not in text), count))


def _rewritten(index: int) -> ConversationError:
    return ConversationError(
        f"the chat template leaves out or changes a part of the reply in message {index}, so the assistant's tokens "
        f"cannot be identified; leave the conversation out or choose a template by name: {', '.join(TEMPLATES)}"
    )


def _endings(final: str, between: str, opening: str, turn: str) -> tuple[str, ...]:
    r"""What ends a turn, white space before it included: nothing, one ending, or that of the last turn and another.

    final, between: what follows a reply that is the last message, and one that the user answers. opening: what
    precedes the user's first message; turn: what follows it.

    >>> _endings("<|eot|><|head|>assistant:", "<|eot|><|head|>user:", "<|head|>user:", "<|eot|><|head|>assistant:")
    ('<|eot|>',)
    >>> _endings("<|end|>\n<|endoftext|>", "<|end|>\n<|user|>\n", "<|user|>\n", "<|end|>\n<|assistant|>\n")
    ('<|end|>',)
    >>> _endings("", "<|end|>\n<|user|>\n", "<|user|>\n", "<|end|>\n<|assistant|>\n")  # open, to be continued
    ('<|end|>',)
    """
    shared, header = final.rstrip(), opening.strip()
    whole = between.startswith(shared)
    if not whole:
        pairs = zip(PIECE.findall(final), PIECE.findall(between), strict=False)
        shared = "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)).rstrip()
    if not shared:
        last, other = re.match(MARKER, final), re.match(r"\s*" + MARKER, between)
        if last and (last[0] in header or last[0] in turn):  # the head of a further reply
            last = None
        if other and (header.startswith(other[0].strip()) or (other[0] in header and not turn.startswith(other[0]))):
            other = None
        return tuple(found[0] for found in (last, other) if found)
    if shared.strip() == header or (not whole and header.startswith(shared.strip())):
        return ()  # it is nothing but the next turn's head
    if whole and between.strip() != shared.strip():
        return (shared,)  # the user's head is all in what is left of ``between``
    pieces, opener = PIECE.findall(shared), PIECE.findall(header)[:1]
    first = 1 + pieces[0].isspace()
    cuts = range(first, len(pieces) + 1)
    cut = next((cut for cut in cuts if pieces[cut : cut + 1] == opener), None)
    if cut is None:
        cut = next(cut for cut in cuts if "".join(pieces[cut:]) in opening)
    return ("".join(pieces[:cut]).rstrip(),)


def mask_of_spans(offsets: Sequence[tuple[int, int]], spans: Iterable[Span]) -> list[bool]:
    """True for each token that starts inside a span, or holds the character at its ``content``.

    offsets: (start, end) of each token in characters. Some tokenizers leave white space out of the offsets; the gap
    belongs to the token after it. The bytes of one character may be several tokens, all with that character's offsets;
    of a span's last character all count, where transformers counts the first.

    >>> mask_of_spans([(0, 2), (3, 5), (5, 6)], [Span(2, 3, 6)])
    [False, True, True]
    >>> mask_of_spans([(0, 4), (4, 6)], [Span(5, 5, 6)])  # a space of the prompt, in one token with the reply
    [False, True]
    """
    bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = bounds[:, 0].copy(), bounds[:, 1]
    starts[1:] = np.minimum(starts[1:], ends[:-1])
    mask = np.zeros(len(starts), dtype=bool)
    for first, content, last in spans:
        mask |= (first < last) & (starts < last) & ((starts >= first) | (ends > content))
    return mask.tolist()
