"""Chat templates by name, for backbones whose directory has none or the wrong one.

Each is the published prompt format of its family as a Jinja template. It sees ``messages``, ``add_generation_prompt``,
``bos_token`` and ``eos_token``, and includes the beginning-of-text token, so that the rendered text is tokenized as it
is.
"""

from __future__ import annotations

import difflib
import functools
from datetime import date
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

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


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the reply in some templates; here its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=32)
def compile_template(text: str) -> jinja2.Template:
    """The template, compiled in a sandbox with the helpers that published chat templates use.

    Templates come with downloaded tokenizers: the sandbox keeps them from reaching anything but their arguments.
    Raises ValueError for a template that does not parse.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not parse, line {error.lineno}: {error.message}") from error
