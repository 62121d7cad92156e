"""Text to token ids and back, and the mask of the assistant's tokens in a conversation.

A draft head is trained on the assistant's tokens and measured on its replies, so the chat template and the mask are
here, next to the vocabulary: training, measurement and chat share one rendering.

It needs no network and no torch: ``tokenizer.json`` is read as it is, and a directory that has only a SentencePiece
``tokenizer.model`` (Llama 1 and 2, Vicuna) is converted in memory.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.files.documents import identity, read_object

# A fork after the tokenizer's threads have run prints a warning unless this is set beforehand.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import jinja2
import numpy as np

from backbone.config import BackboneConfig
from backbone.templates import TEMPLATES, compile_template, named_template

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny-vicuna"
ROLES = ("system", "user", "assistant")
# Conversations tokenized in one call: enough for every thread, few enough to keep the offsets small.
BATCH = 256
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"

Messages = Sequence[Mapping[str, str]]


class ChatTokenizer:
    """A vocabulary and a chat template.

    ``vocab_size`` is the highest token id plus one. ``eos_ids`` end a reply: the vocabulary's end token, those of
    generation_config.json, and the token with which the template ends a turn. ``end_of_turn`` is that ending as
    text; where it is not a token of this vocabulary (a template of another family) a caller has to stop on the text.
    """

    def __init__(self, tokenizer: Any, template: str, source: bytes, eos_ids: Iterable[int] = ()) -> None:
        """tokenizer: a transformers PreTrainedTokenizerFast. source: the bytes that define the vocabulary."""
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self.template = template
        self._compiled = compile_template(template)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        ends = [token_id for token_id in (tokenizer.eos_token_id, *eos_ids) if token_id is not None]
        self.end_of_turn = self._probe_end_of_turn()
        end_id = self._backend.token_to_id(self.end_of_turn)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(ends + ([] if end_id is None else [end_id])))
        named = identity([template, self._special], sort_keys=True)
        self.fingerprint = hashlib.sha256(hashlib.sha256(source).digest() + named.encode()).hexdigest()[:16]

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-text token, None without one."""
        name = self._special.get("bos_token")
        return None if name is None else self._backend.token_to_id(name)

    def encode_many(self, texts: Sequence[str]) -> list[Any]:
        """Encodings (``ids``, ``token_to_chars``) of texts, over all threads; no special token is added."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Special tokens spelled out in it count as such; none is added by default."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the token ids, spaces unchanged. Bytes that form no character become U+FFFD."""
        return self._backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as the backbone reads it. Raises ValueError for messages that are not a conversation."""
        _check_messages(messages)
        return self._render(messages, add_generation_prompt)

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of the rendered conversation; with the prompt, the assistant's reply comes next."""
        return self.encode(self.render(messages, add_generation_prompt))

    def encode_with_mask(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Token ids of a finished conversation, and True for each token of the assistant, its end token included.

        The ids are those of ``encode_chat(messages, add_generation_prompt=False)``. With the embedded template:

            <s> ... USER: Hi ASSISTANT: Hello </s>
            F       F   F F  F       F  T     T         the reply's leading space is part of " Hello"

        Raises ValueError when the template renders the start of a conversation differently in a longer one: then no
        part of the text is certain to be the assistant's.
        """
        return next(self._encode_batch([messages]))

    def encode_many_with_mask(self, conversations: Iterable[Messages]) -> Iterator[tuple[list[int], list[bool]]]:
        """``encode_with_mask`` of each conversation, in order and lazily; much faster than one call each."""
        batch: list[Messages] = []
        for messages in conversations:
            batch.append(messages)
            if len(batch) == BATCH:
                yield from self._encode_batch(batch)
                batch = []
        yield from self._encode_batch(batch)

    def check_fits(self, config: BackboneConfig) -> None:
        """Raises ValueError unless every token id of this tokenizer is a row of the backbone's embedding."""
        highest = max([self.vocab_size - 1, *self._special_ids, *self.eos_ids])
        if highest >= config.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens (highest id in use {highest}) and the backbone "
                f"{config.vocab_size}; expected no more than the backbone's: pass its own directory"
            )

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        special = {"bos_token": "", "eos_token": ""} | self._special
        try:
            return self._compiled.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **special
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def _probe_end_of_turn(self) -> str:
        """What the template writes after a reply, without white space: ``</s>``, ``<|eot_id|>``, ..."""
        reply = "answer"
        text = self._render([{"role": "user", "content": "question"}, {"role": "assistant", "content": reply}], False)
        return text[text.rindex(reply) + len(reply) :].strip() if reply in text else ""

    def _reply_spans(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and the character range of each reply in it."""
        _check_messages(messages)
        text = self._render(messages, False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], True)
            through = text if index + 1 == len(messages) else self._render(messages[: index + 1], False)
            if not (text.startswith(through) and through.startswith(before)):
                raise ValueError(
                    f"the chat template renders turn {index} differently in a longer conversation, so the assistant's "
                    f"tokens cannot be identified; choose a template by name: {', '.join(TEMPLATES)}"
                )
            spans.append((len(before), _end_of_reply(through, len(before), message["content"])))
        return text, spans

    def _encode_batch(self, batch: Sequence[Messages]) -> Iterator[tuple[list[int], list[bool]]]:
        rendered = [self._reply_spans(messages) for messages in batch]
        encodings = self._backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        for (_, spans), encoding in zip(rendered, encodings, strict=True):
            yield encoding.ids, _mask_of_spans(encoding.offsets, spans)


def _check_messages(messages: Messages) -> None:
    """Raises ValueError unless messages are system (at most one, first), then user, then anything."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {index} is {message!r:.80}, expected a role and a content string")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {index} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}")
        if message["role"] == "system" and index:
            raise ValueError(f"message {index} is a system message; expected it first or not at all")
    turns = [message for message in messages if message["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        raise ValueError("the conversation does not open with a user message; expected system (optional), user, ...")


def _end_of_reply(text: str, start: int, content: str) -> int:
    """End of the reply that starts at ``start`` in a text that ends with it.

    Some templates write a line break after the end-of-turn token. It is never generated: the reply stops before it.
    """
    reply = content.strip()
    found = text.find(reply, start)
    ending = text[found + len(reply) :] if found >= 0 else ""
    return len(text.rstrip()) if ending.strip() else len(text)


def _mask_of_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """True for each token that starts inside a span. offsets: (start, end) of each token in characters.

    Some tokenizers leave white space out of the offsets; the gap belongs to the token after it. The bytes of one
    character may be several tokens, all with that character's offsets.

    >>> _mask_of_spans([(0, 2), (3, 5), (5, 6)], [(2, 6)])
    [False, True, True]
    """
    bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts = bounds[:, 0].copy()
    starts[1:] = np.minimum(starts[1:], bounds[:-1, 1])
    mask = np.zeros(len(starts), dtype=bool)
    for first, last in spans:
        mask |= (starts >= first) & (starts < last)
    return mask.tolist()


class StreamDecoder:
    """Decodes tokens as they arrive and never emits half a character.

    The pieces of ``push`` and ``finish`` together equal ``decode`` of all tokens. Text is held back while a later token
    could change it: the bytes of an unfinished character, and in vocabularies with byte tokens a run of such tokens,
    because one wrong byte turns the run into U+FFFD.
    """

    def __init__(self, tokenizer: ChatTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._final = 0  # number of leading tokens whose text cannot change any more
        self._emitted = 0  # characters

    def push(self, ids: Iterable[int]) -> str:
        """The text that became final with these tokens; may be empty."""
        for token_id in ids:
            self._ids.append(int(token_id))
            if not self._is_open(self._ids[-1]):
                self._final = len(self._ids)
        return self._emit(self._tokenizer.decode(self._ids[: self._final], self._skip).rstrip(UNFINISHED))

    def finish(self) -> str:
        """The text still held back, after the last token."""
        return self._emit(self._tokenizer.decode(self._ids, self._skip))

    def _is_open(self, token_id: int) -> bool:
        if self._skip and token_id in self._tokenizer._special_ids:
            return True  # has no text: bytes on both sides of it form one run
        token = self._tokenizer._backend.id_to_token(token_id)
        return token is not None and BYTE_TOKEN.fullmatch(token) is not None

    def _emit(self, text: str) -> str:
        piece = text[self._emitted :]
        self._emitted += len(piece)
        return piece


# Loading -------------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path | None = None, template: str | None = None) -> ChatTokenizer:
    """The tokenizer of a directory (None: the embedded one) with its own chat template or a named one.

    Raises ValueError when the directory holds no tokenizer, for an unknown ``template``, and when neither the
    directory nor ``template`` provides a chat template.
    """
    directory = EMBEDDED if path is None else Path(path)
    text = None if template is None else named_template(template)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; expected one with tokenizer.json or tokenizer.model")
    settings_path = directory / "tokenizer_config.json"
    settings = read_object(settings_path) if settings_path.exists() else {}
    if (directory / "tokenizer.json").exists():
        tokenizer, source = _load_fast(directory), (directory / "tokenizer.json").read_bytes()
    elif (directory / "tokenizer.model").exists():
        tokenizer = _load_sentencepiece(directory, settings)
        source = tokenizer.backend_tokenizer.to_str().encode()
    else:
        raise ValueError(f"{directory} holds no tokenizer; expected tokenizer.json or tokenizer.model")
    if text is None:
        text = _own_template(directory, settings)
    generation_path = directory / "generation_config.json"
    ends = read_object(generation_path).get("eos_token_id") if generation_path.exists() else None
    eos_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    try:
        return ChatTokenizer(tokenizer, text, source, eos_ids)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _own_template(directory: Path, settings: dict[str, Any]) -> str:
    """The template of the directory: ``chat_template.jinja``, else the one in tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    own = settings.get("chat_template")
    if isinstance(own, list):  # several, by name
        own = {item.get("name"): item.get("template") for item in own if isinstance(item, dict)}.get("default")
    if not isinstance(own, str) or not own.strip():
        raise ValueError(f"{directory} has no chat template; choose one by name: {', '.join(TEMPLATES)}")
    return own


def _transformers() -> Any:
    """The library, imported late because that takes a second, and without its advice to install PyTorch, which
    tokenizers and templates do not need."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def _load_fast(directory: Path) -> Any:
    transformers = _transformers()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns about class names that make no difference here
    try:
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ValueError(f"{directory / 'tokenizer.json'} cannot be read: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _text_of(token: Any) -> str | None:
    """Token text in tokenizer_config.json: a string, or an object with ``content``."""
    return token.get("content") if isinstance(token, dict) else token


def _load_sentencepiece(directory: Path, settings: dict[str, Any]) -> Any:
    """A Llama-style SentencePiece BPE model as a fast tokenizer.

    Spaces become U+2581; unknown characters fall back to byte tokens. ``legacy`` (default true) puts a U+2581 before
    every piece of text between special tokens, otherwise only at the very start, as transformers does.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    path = directory / "tokenizer.model"
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a SentencePiece model; expected one, or a tokenizer.json ({error})") from error
    names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    vocab = {name: index for index, name in enumerate(names)}
    special = [name for i, name in enumerate(names) if pieces.is_control(i) or pieces.is_unknown(i)]
    merges = _merges(vocab, [i for i, name in enumerate(names) if name not in special and not pieces.is_byte(i)])
    unknown = names[pieces.unk_id()]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    if settings.get("legacy", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    for index, token in _added_tokens(directory, settings):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise ValueError(f"{directory}: added token {token.content!r} has id {index}, which would leave a gap")
    roles = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    own = {role: names[index] for role, index in roles.items() if index >= 0}
    own |= {role: _text_of(settings[role]) for role in (*roles, "pad_token") if settings.get(role)}
    return _transformers().PreTrainedTokenizerFast(tokenizer_object=backend, **own)


def _merges(vocab: dict[str, int], ids: list[int]) -> list[tuple[str, str]]:
    """Every pair of pieces that merges into a piece, the earliest piece first: SentencePiece numbers them in that
    order."""
    names = {index: name for name, index in vocab.items()}
    mergeable = {names[index] for index in ids}
    return [
        (name[:cut], name[cut:])
        for name in (names[index] for index in ids)
        for cut in range(1, len(name))
        if name[:cut] in mergeable and name[cut:] in mergeable
    ]


def _added_tokens(directory: Path, settings: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """(id, token) that the directory adds to its SentencePiece model, by id."""
    from tokenizers import AddedToken

    added: dict[int, tuple[str, bool]] = {}
    path = directory / "added_tokens.json"
    for content, index in (read_object(path) if path.exists() else {}).items():
        added[int(index)] = (content, True)
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        added[int(index)] = (token["content"], bool(token.get("special", False)))
    for index, (content, is_special) in sorted(added.items()):
        yield index, AddedToken(content, normalized=False, special=is_special)
