"""Chat templates with the features of the families in use, the replies marked by hand.

Each is written for these tests. Without its ``{% generation %}`` tags it is what a family publishes; with them
transformers says which tokens are the assistant's.
"""

import re

TAG = re.compile(r"\{% (end)?generation %\}")


def untagged(template):
    return TAG.sub("", template)


def reply(*parts):
    """The parts of a template in a ``generation`` tag."""
    return "{% generation %}" + "".join("{{ " + part + " }}" for part in parts) + "{% endgeneration %}"


def loop(user, assistant, system="{{ m.content + '\n' }}"):
    """A template that writes each message by its role."""
    return (
        "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% elif m.role == 'assistant' %}" + assistant
        + "{% else %}" + system + "{% endif %}{% endfor %}"
    )  # fmt: skip


def turns(opening, headend, end):
    """A loop in which every role is written alike: ``opening`` role ``headend`` text ``end``."""
    return (
        "{% for m in messages %}{{ '" + opening + "' + m.role + '" + headend + "' }}{% if m.role == 'assistant' %}"
        + "{% generation %}{{ m.content + '" + end.rstrip() + "' }}{% endgeneration %}{% else %}{{ m.content + '"
        + end.rstrip() + "' }}{% endif %}{{ '" + end[len(end.rstrip()) :] + "' }}{% endfor %}"
    )  # fmt: skip


def prompt(text):
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
HEAD = ("<|head|>", "<|headend|>\n\n", "<|eot|>")
IM = ("<|im_start|>", "\n", "<|im_end|>\n")
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
)

FAMILIES = {
    # a system text inside the first question, a space on both sides of the reply
    "llama-2": "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}" + reply("' ' + m.content.strip() + ' ' + eos_token") + "{% endif %}{% endfor %}",
    "llama-3": "{{ bos_token }}" + turns(*HEAD).replace("m.content", "m.content | trim") + prompt(
        "<|head|>assistant<|headend|>\n\n"
    ),
    # a date, tools that are none, a system turn that is always there
    "llama-3.1": "{{ bos_token }}{% if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}{% endif %}{{ '<|head|>system<|headend|>\n\nToday: ' + date_string + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|eot|>' }}" + turns(*HEAD) + prompt("<|head|>assistant<|headend|>\n\n"),
    # the next head always
    "llama-3, first": "{{ bos_token }}" + turns(*HEAD) + "{{ '<|head|>assistant<|headend|>\n\n' }}",
    "llama-3, first, literal": "<|begin|>" + turns(*HEAD) + "{{ '<|head|>assistant<|headend|>\n\n' }}",
    "mistral, strict": "{{ bos_token }}" + ALTERNATE + loop(
        "{{ '[INST] ' + m.content + ' [/INST]' }}", reply("m.content + eos_token")
    ),
    # the system text before the last question, so that it moves
    "mistral, later": "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and s is defined %}{{ '[INST] ' + s + '\n\n' + m.content + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}" + reply("' ' + m.content | trim + eos_token")
    + "{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + loop(
        "{{ '<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n' }}",
        "{{ '<start_of_turn>model\n' }}" + reply("m.content | trim + '<end_of_turn>'") + "{{ '\n' }}",
    ) + prompt("<start_of_turn>model\n"),
    "chatml": turns(*IM) + prompt("<|im_start|>assistant\n"),
    "qwen-2": SYSTEM_FIRST + turns(*IM) + prompt("<|im_start|>assistant\n"),
    # the last reply stays open, to be continued
    "yi": SYSTEM_FIRST + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}{% endgeneration %}{% else %}"
    "{{ m.content }}{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' }}{% endif %}"
    "{% endif %}{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    + prompt("<|im_start|>assistant\n"),
    # an empty thought before the last reply, none before earlier ones
    "qwen-3": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}{{ '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '')"
    " + '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + prompt("<|im_start|>assistant\n"),
    # a further token at the end of a conversation
    "phi-3": loop(
        "{{ '<|user|>\n' + m.content + '<|end|>\n' }}",
        "{{ '<|assistant|>\n' }}" + reply("m.content + '<|end|>'") + "{{ '\n' }}",
        "{{ '<|system|>\n' + m.content + '<|end|>\n' }}",
    ) + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    + reply("m.content + eos_token") + "{{ '\n' }}{% else %}{{ m.content + eos_token + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    # thinking is left out of what was said; the prompt begins one
    "r1": "{{ bos_token }}" + loop(
        "{{ '<|user|>' + m.content }}",
        "{{ '<|assistant|>' }}{% generation %}{{ m.content.split('</think>')[-1] + eos_token }}{% endgeneration %}",
    ) + prompt("<|assistant|><think>\n"),
    "vicuna": "{{ bos_token }}" + loop(
        "{{ 'USER: ' + m.content }}", "{{ ' ASSISTANT:' }}" + reply("' ' + m.content + eos_token")
    ) + prompt(" ASSISTANT:"),
    # a prompt that ends in a space
    "vicuna, space": "{{ bos_token }}" + loop(
        "{{ 'USER: ' + m.content }}", "{{ ' ASSISTANT: ' }}" + reply("m.content + eos_token")
    ) + prompt(" ASSISTANT: "),
    # nothing ends a reply
    "alpaca": "{{ bos_token }}" + loop(
        "{{ '### Instruction:\n' + m.content + '\n\n' }}", "{{ '### Response:\n' }}" + reply("m.content") + "{{ '\n\n' }}"
    ) + prompt("### Response:\n"),
    # no prompt at all: the head of a reply is the template's
    "no prompt": loop(
        "{{ '<|user|>' + m.content + '<|end|>' }}", "{{ '<|assistant|>\n' }}" + reply("m.content + '<|end|>'")
    ),
    # one token begins a text and ends a reply; the last line break is left out
    "olmo": "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    + reply("m.content + '<|endoftext|>'") + "{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ m.content + '\n' }}"
    "{% endif %}{% endfor %}" + prompt("<|assistant|>\n"),
    # words end a reply
    "words": loop("{{ 'Q: ' + m.content + ' ' }}", "{{ 'A:' }}" + reply("' ' + m.content + ' ### End'") + "{{ '\n' }}")
    + prompt("A:"),
    # the end token of the whole conversation only
    "once": loop("{{ 'Q: ' + m.content + '\n' }}", "{{ 'A: ' }}" + reply("m.content") + "{{ '\n' }}")
    + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}" + prompt("A: "),
    # the next user's head always
    "user first": "{{ bos_token + 'USER: ' }}" + loop(
        "{{ m.content }}", "{{ ' ASSISTANT:' }}" + reply("' ' + m.content + eos_token") + "{{ 'USER: ' }}"
    ) + prompt(" ASSISTANT:"),
}  # fmt: skip
