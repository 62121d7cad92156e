"""Chat templates: rendering, and those by name, for backbones whose directory has none or the wrong one.

Each named one is the published prompt format of its family as a Jinja template. It sees ``messages``,
``add_generation_prompt``, ``bos_token`` and ``eos_token``, and includes the beginning-of-text token, so that the
rendered text is tokenized as it is.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from runtime.files.documents import identity

Messages = Sequence[Mapping[str, str]]

# "USER: a ASSISTANT: b</s>USER: c ASSISTANT:" after a system sentence (FastChat, conversation "vicuna_v1.1").
VICUNA = r"""
{%- set default = "A chat between a curious user and an artificial intelligence assistant. "
                  "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- set has_system = messages[0]['role'] == 'system' -%}
{{- bos_token + (messages[0]['content'] if has_system else default) + ' ' -}}
{%- for message in (messages[1:] if has_system else messages) -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' + message['content'] -}}
  {%- else -%}
    {{- ' ASSISTANT: ' + message['content'] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ' ASSISTANT:' -}}
{%- endif -%}
"""

# "<s>[INST] <<SYS>>\nsystem\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]" (Llama 2, chat_completion).
LLAMA_2 = r"""
{%- set has_system = messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' if has_system else '' -%}
{%- for message in (messages[1:] if has_system else messages) -%}
  {%- if message['role'] == 'user' -%}
    {{- bos_token + '[INST] ' + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message['content'] | trim + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

# Each message is "<|start_header_id|>role<|end_header_id|>\n\ntext<|eot_id|>" (Llama 3, model card).
LLAMA_3 = r"""
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""

# Each message is "<|im_start|>role\ntext<|im_end|>\n" (OpenAI, ChatML).
CHATML = r"""
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

TEMPLATES = {"vicuna": VICUNA, "llama-2": LLAMA_2, "llama-3": LLAMA_3, "chatml": CHATML}

# Some templates write today's date into the prompt. It is always this day here, the default of Llama 3.1's template: a
# prompt that changes at midnight would change features, caches and results.
TODAY = date(2024, 7, 26)


def named_template(name: str) -> str:
    """The template called ``name``. Raises ValueError with a suggestion for an unknown name."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    close = difflib.get_close_matches(name.lower(), TEMPLATES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"Unknown chat template {name!r}.{hint} Available: {', '.join(TEMPLATES)}")


# What a template may raise about messages it is not made for: its own complaints and those of the expressions in it.
REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


class ConversationError(ValueError):
    """One conversation cannot be rendered or masked; the next one may be. A reader leaves it out and counts it."""


class ChatTemplate:
    """A Jinja template and the special tokens it may write, rendered as transformers' ``apply_chat_template`` does.

    What a template sees is what it sees there: ``tools`` and ``documents`` are None, a special token that the tokenizer
    does not have is undefined, a message has no keys that are None. Only ``strftime_now`` is another: see ``TODAY``.
    """

    def __init__(self, text: str, special: Mapping[str, str]) -> None:
        """special: ``bos_token`` and others, as text. Raises ValueError for a template that does not parse."""
        self._template = _compile(text)
        self._tag: _GenerationTag = self._template.environment.extensions[_GenerationTag.identifier]
        # The templates of this file serve vocabularies without these tokens too.
        self._special = {"bos_token": "", "eos_token": ""} | dict(special) if text in TEMPLATES.values() else special

    @property
    def marks_replies(self) -> bool:
        """Whether its author marked the replies, with ``{% generation %}``."""
        return self._tag.found

    def render(self, messages: Messages, add_generation_prompt: bool, marks: tuple[str, str] = ("", "")) -> str:
        """marks: what to write before and after each ``{% generation %}``. Raises ConversationError where the template
        refuses the messages."""
        self._tag.marks = marks
        try:
            return self._template.render(
                messages=[_as_seen(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except REFUSALS as error:
            raise ConversationError(f"the chat template refuses this conversation: {error}") from error


def _as_seen(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without keys that are None; reasoning, if any, under the names that templates use."""
    seen = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in seen:
            return {"thinking": seen[name], **seen, "reasoning_content": seen[name]}
    return seen


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` is a reply: writes it between ``marks``."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.found, self.marks = False, ("", "")

    def parse(self, parser: Any) -> Any:
        self.found = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

    def _between_marks(self, caller: Callable[[], str]) -> str:
        return self.marks[0] + caller() + self.marks[1]


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` without names that begin with an underscore: those reach Python's own attributes."""

    def __init__(*args: Any, **values: Any) -> None:  # no named argument: ``namespace(self=...)`` is a name like others
        this, *positional = args
        jinja2.utils.Namespace.__init__(this)
        for name, value in dict(*positional, **values).items():
            this[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with _, got {name}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML and sorts the keys."""
    return identity(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compile(text: str) -> jinja2.Template:
    """The template, compiled in a sandbox with the helpers that published chat templates use.

    Templates come with downloaded tokenizers: the sandbox keeps them from reaching anything but their arguments.
    Raises ValueError for a template that does not parse.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not parse, line {error.lineno}: {error.message}") from error
    except (SyntaxError, RecursionError) as error:  # of the Python that Jinja makes of it
        raise ValueError(f"the chat template does not compile, it is nested too deeply: {error}") from error
