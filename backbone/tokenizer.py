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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# A fork after the tokenizer's threads have run prints a warning unless this is set beforehand.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from backbone.config import BackboneConfig, stop_ids
from backbone.pieces import read_vocabulary
from backbone.replies import ReplyFinder, Span, mask_of_spans
from backbone.templates import TEMPLATES, ChatTemplate, ConversationError, Messages, named_template
from runtime.files.documents import HALF_CHARACTER, identity, read_object
from runtime.files.regular import read_bytes, read_text

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny-vicuna"
ROLES = ("system", "user", "assistant")
# Conversations tokenized in one call: enough for every thread, few enough to keep the offsets small.
BATCH = 256
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
MOST_TEMPLATE, MOST_TOKENIZER = 1 << 22, 1 << 28  # bytes; published ones have 20 kB and 40 MB


class ChatTokenizer:
    """A vocabulary and a chat template.

    ``vocab_size`` is the highest token id plus one. ``eos_ids`` end a reply: the vocabulary's end token, those of
    ``backbone.config.stop_ids``, and the token with which the template ends a turn. ``end_of_turn`` is that ending as
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
        self._template = ChatTemplate(template, self._special)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        ends = [token_id for token_id in (tokenizer.eos_token_id, *eos_ids) if token_id is not None]
        self._replies = ReplyFinder(
            self._template, self._special.get("bos_token", ""), filter(None, map(self._backend.id_to_token, ends))
        )
        self.end_of_turn = self._replies.ending.strip()
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
        return self._template.render(messages, add_generation_prompt)

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of the rendered conversation; with the prompt, the assistant's reply comes next."""
        return self.encode(self.render(messages, add_generation_prompt))

    def encode_with_mask(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Token ids of a finished conversation, and True for each token of the assistant, its end token included.

        The ids are those of ``encode_chat(messages, add_generation_prompt=False)``. With the embedded template:

            <s> ... USER: Hi ASSISTANT: Hello </s>
            F       F   F F  F       F  T     T         the reply's leading space is part of " Hello"

        The mask is what ``{% generation %}`` gives in transformers (``return_assistant_tokens_mask``), also for
        templates without it. Raises ConversationError for a conversation that the template refuses, or whose replies
        it rewrites: then no part of the text is certain to be the assistant's.
        """
        return next(self.encode_many_with_mask([messages]))

    def encode_many_with_mask(
        self,
        conversations: Iterable[Messages],
        refused: Callable[[int, ConversationError], None] | None = None,
    ) -> Iterator[tuple[list[int], list[bool]]]:
        """``encode_with_mask`` of each conversation, in order and lazily; much faster than one call each.

        refused: called with the index of a conversation that cannot be encoded and the reason; that one is left out.
        Without it the reason is raised.
        """
        batch: list[tuple[str, list[Span]]] = []
        for index, messages in enumerate(conversations):
            try:
                _check_messages(messages)
                batch.append(self._replies.find(messages))
            except ConversationError as error:
                if refused is None:
                    raise
                refused(index, error)
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

    def _encode_batch(self, batch: Sequence[tuple[str, list[Span]]]) -> Iterator[tuple[list[int], list[bool]]]:
        encodings = self._backend.encode_batch([text for text, _ in batch], add_special_tokens=False)
        for (_, spans), encoding in zip(batch, encodings, strict=True):
            yield encoding.ids, mask_of_spans(encoding.offsets, spans)


def _check_messages(messages: Messages) -> None:
    """Raises ConversationError unless messages are system (at most one, first), then user, then anything."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ConversationError(f"message {index} is {message!r:.80}, expected a role and a content string")
        if HALF_CHARACTER.search(message["content"]):
            raise ConversationError(
                f"message {index} holds half a character (a lone surrogate), which no token can spell"
            )
        if message.get("role") not in ROLES:
            raise ConversationError(
                f"message {index} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}"
            )
        if message["role"] == "system" and index:
            raise ConversationError(f"message {index} is a system message; expected it first or not at all")
    turns = [message for message in messages if message["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        raise ConversationError(
            "the conversation does not open with a user message; expected system (optional), user, ..."
        )


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
    fast, model = directory / "tokenizer.json", directory / "tokenizer.model"
    if not fast.exists() and not model.exists():
        raise ValueError(f"{directory} holds no tokenizer; expected tokenizer.json or tokenizer.model")
    if text is None:
        text = _own_template(directory, settings)
    if fast.exists():
        source = read_bytes(fast, MOST_TOKENIZER)
        tokenizer = _load_fast(directory, settings)
    else:
        tokenizer = _load_sentencepiece(directory, settings)
        source = tokenizer.backend_tokenizer.to_str().encode()
    try:
        return ChatTokenizer(tokenizer, text, source, stop_ids(directory))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _own_template(directory: Path, settings: dict[str, Any]) -> str:
    """The template of the directory, as transformers chooses it.

    ``chat_template.jinja`` and ``additional_chat_templates/<name>.jinja`` hide the one in tokenizer_config.json; of
    several by name it is "default". ``chat_template.json``, a processor's, counts where there is no other. A blank one
    counts nowhere.
    """
    files = [directory / "chat_template.jinja", *sorted((directory / "additional_chat_templates").glob("*.jinja"))]
    # transformers keeps a byte order mark.
    texts = {file.stem: read_text(file, MOST_TEMPLATE, "utf-8") for file in files if file.exists()}
    named = {name: text for name, text in texts.items() if text.strip()}
    if "chat_template" in named:
        named = {"default": named.pop("chat_template"), **named}
    own: Any = named or settings.get("chat_template")
    processor = directory / "chat_template.json"
    if not own and processor.exists():
        own = read_object(processor).get("chat_template")
    if isinstance(own, list):
        own = {item.get("name"): item.get("template") for item in own if isinstance(item, dict)}
    if isinstance(own, dict):
        if "default" not in own:
            raise ValueError(
                f"{directory} has chat templates named {', '.join(map(str, own))}, expected one named default; "
                f"choose one by name: {', '.join(TEMPLATES)}"
            )
        own = own["default"]
    if not isinstance(own, str) or not own.strip():
        raise ValueError(f"{directory} has no chat template; choose one by name: {', '.join(TEMPLATES)}")
    return own


def _transformers() -> Any:
    """The library, imported late because that takes a second, and without its advice to install PyTorch, which
    tokenizers and templates do not need."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def _filled(settings: dict[str, Any]) -> dict[str, Any]:
    """What transformers must be told where a setting is null and it expects none or a value."""
    return {"added_tokens_decoder": {}} if settings.get("added_tokens_decoder", {}) is None else {}


def _load_fast(directory: Path, settings: dict[str, Any]) -> Any:
    transformers = _transformers()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns about class names that make no difference here
    try:
        return transformers.PreTrainedTokenizerFast.from_pretrained(
            str(directory), local_files_only=True, **_filled(settings)
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ValueError(f"{directory / 'tokenizer.json'} cannot be read: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _load_sentencepiece(directory: Path, settings: dict[str, Any]) -> Any:
    """A Llama-style SentencePiece BPE model as transformers' own LlamaTokenizer, with everything that the directory
    says of it: ``legacy``, ``add_prefix_space``, and the added tokens with their ``lstrip``, ``rstrip``,
    ``single_word`` and ``normalized``.

    Only the vocabulary is read here: transformers needs protobuf for that. Raises ValueError naming a token that is
    not where the directory puts it.
    """
    from tokenizers import AddedToken

    llama, vocabulary = _transformers().LlamaTokenizer, read_vocabulary(directory / "tokenizer.model")

    class SentencePieceLlama(llama):
        @classmethod
        def convert_to_native_format(cls, **given: Any) -> dict[str, Any]:
            filled = {name: value for name, value in given.items() if value is not None}
            for name, value in filled.items():
                if name.endswith("_token") and isinstance(value, dict):  # one that lacks transformers' mark of its type
                    filled[name] = AddedToken(value["content"], normalized=False, special=True)
            return {**vocabulary, **filled}

    try:
        tokenizer = SentencePieceLlama.from_pretrained(str(directory), local_files_only=True, **_filled(settings))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:  # what it makes of damaged settings
        raise ValueError(f"{directory}: the tokenizer's settings cannot be used: {error}") from error
    for index, content in _added_tokens(directory, settings):
        found = tokenizer.backend_tokenizer.token_to_id(content)
        if found != index:
            raise ValueError(
                f"{directory}: added token {content!r} has id {index}, and the vocabulary puts it at {found}; expected "
                "ids that follow the model's without a gap"
            )
    return tokenizer


def _added_tokens(directory: Path, settings: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(id, text) of the tokens that the directory adds to its SentencePiece model, by id."""
    added: dict[int, str] = {}
    path = directory / "added_tokens.json"
    for content, index in (read_object(path) if path.exists() else {}).items():
        added[int(index)] = content
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        added[int(index)] = token["content"]
    yield from sorted(added.items())
