"""Chat templates with the features of the families in use, the replies marked by hand.

All are written for these tests. Without its tags one is what a family publishes; with them transformers says which
tokens are the assistant's. ``SPECIAL`` are the tokens that they write.
"""

import re

SPECIAL = (
    *("<|begin|>", "<|head|>", "<|headend|>", "<|eot|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]"),
)
TAG = re.compile(r"\{% (end)?generation %\}")


def untagged(template):
    return TAG.sub("", template)


def reply(expression):
    return "{% generation %}{{ " + expression + " }}{% endgeneration %}"


def write(expression):
    return "{{ " + expression + " }}"


def loop(user, assistant, system=r"{{ m.content + '\n' }}", over="messages"):
    """A template that writes each message by its role."""
    kinds = "{% if m.role == 'user' %}", user, "{% elif m.role == 'assistant' %}", assistant, "{% else %}", system
    return "{% for m in " + over + " %}" + "".join(kinds) + "{% endif %}{% endfor %}"


def alike(head, neck, end, text="m.content"):
    r"""A template that writes all roles alike: ``head`` role ``neck`` text ``end``; ``\n`` after it is not said."""
    said, line = f"{text} + '{end.removesuffix(BREAK)}'", BREAK if end.endswith(BREAK) else ""
    start = write(f"'{head}' + m.role + '{neck}'")
    after = write(f"'{line}'")
    return loop(*(start + each + after for each in (write(said), reply(said), write(said))))


def prompt(text):
    return "{% if add_generation_prompt %}" + write(f"'{text}'") + "{% endif %}"


BREAK = r"\n"
BOS = write("bos_token")
HEADER = r"<|head|>assistant<|headend|>\n\n"
HEADERS = ("<|head|>", r"<|headend|>\n\n", "<|eot|>")
CHATML = ("<|im_start|>", r"\n", r"<|im_end|>\n")
ASSISTANT = r"<|im_start|>assistant\n"
# A system turn where the conversation has none.
DEFAULT = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
SYSTEM_OF_REST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
)

# name: (template, what ends a turn)
FAMILIES = {
    # The system text is part of the first question; a space on both sides of the reply.
    "llama-2": (
        SYSTEM_OF_REST
        + loop(
            r"{{ bos_token + '[INST] ' }}{% if loop.first and system is defined %}"
            r"{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}{{ m.content.strip() + ' [/INST]' }}",
            reply("' ' + m.content.strip() + ' ' + eos_token"),
            over="rest",
        ),
        "</s>",
    ),
    "llama-3": (BOS + alike(*HEADERS, "m.content | trim") + prompt(HEADER), "<|eot|>"),
    # A date, no tools, and a system turn that is always there.
    "llama-3.1": (
        BOS + "{% if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}"
        r"{{ '<|head|>system<|headend|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}"
        "{% endif %}{{ '<|eot|>' }}" + alike(*HEADERS) + prompt(HEADER),
        "<|eot|>",
    ),
    # The head of a reply at the end, always.
    "next head": (BOS + alike(*HEADERS) + write(f"'{HEADER}'"), "<|eot|>"),
    "next head, chatml": (DEFAULT + alike(*CHATML) + write(f"'{ASSISTANT}'"), "<|im_end|>"),
    "next head, literal": ("<|begin|>" + alike(*HEADERS) + write(f"'{HEADER}'"), "<|eot|>"),
    "next head, the user's": (
        write("bos_token + 'USER: '")
        + loop(write("m.content"), write("' ASSISTANT:'") + reply("' ' + m.content + eos_token") + write("'USER: '"))
        + prompt(" ASSISTANT:"),
        "</s>",
    ),
    # No end token, but the head of a reply always.
    "next head, no end": (
        BOS + loop(write("'<|user|>' + m.content"), write("'<|assistant|>'") + reply("m.content"))
        + "{% if messages[-1].role == 'assistant' %}{{ '<|user|>' }}{% endif %}" + prompt("<|assistant|>"),
        "",
    ),
    "next head, no end, the assistant's": (
        BOS + loop(write("'<|user|>' + m.content"), write("'<|assistant|>'") + reply("m.content"))
        + write("'<|assistant|>'"),
        "",
    ),
    # Two tokens end a reply, one of them every turn.
    "two tokens": (
        BOS + loop(
            write("'<|user|>' + m.content + '<|end|>'"),
            write("'<|assistant|>'") + reply("m.content + '<|eot|><|end|>'"),
            write("'<|system|>' + m.content + '<|end|>'"),
        )
        + prompt("<|assistant|>"),
        "<|eot|><|end|>",
    ),
    # The last reply ends with another token than those before.
    "two ends": (
        BOS + loop(
            write("'<|user|>' + m.content + '<|end|>'"),
            write("'<|assistant|>'") + reply("m.content + ('<|eot|>' if loop.last else '<|end|>')"),
        )
        + prompt("<|assistant|>"),
        "<|eot|>",
    ),
    "mistral, strict": (
        BOS + ALTERNATE + loop(write("'[INST] ' + m.content + ' [/INST]'"), reply("m.content + eos_token")),
        "</s>",
    ),
    # The system text is part of the last question: it moves, and is gone from a finished conversation.
    "mistral, later": (
        SYSTEM_OF_REST + BOS
        + loop(
            "{{ '[INST] ' }}{% if loop.last and system is defined %}{{ system + '  ' }}{% endif %}"
            "{{ m.content + '[/INST]' }}",
            reply("' ' + m.content | trim + eos_token"),
            over="rest",
        ),
        "</s>",
    ),
    "gemma": (
        BOS + "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + loop(
            write(r"'<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n'"),
            write(r"'<start_of_turn>model\n'") + reply("m.content | trim + '<end_of_turn>'") + write(r"'\n'"),
        )
        + prompt(r"<start_of_turn>model\n"),
        "<end_of_turn>",
    ),
    "chatml": (alike(*CHATML) + prompt(ASSISTANT), "<|im_end|>"),
    "qwen-2": (DEFAULT + alike(*CHATML) + prompt(ASSISTANT), "<|im_end|>"),
    # An empty thought before the last reply, none before earlier ones.
    "qwen-3": (
        loop(
            write(r"'<|im_start|>user\n' + m.content + '<|im_end|>\n'"),
            r"{{ '<|im_start|>assistant\n' }}{% generation %}{% set parts = m.content.split('</think>') %}"
            r"{% if loop.last %}{{ '<think>\n' }}{% if parts | length > 1 %}"
            r"{{ parts[0].split('<think>')[-1].strip('\n') }}{% endif %}{{ '\n</think>\n\n' }}{% endif %}"
            r"{{ parts[-1].lstrip('\n') + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
        )
        + prompt(ASSISTANT),
        "<|im_end|>",
    ),
    # The last reply is left open, to be continued.
    "yi": (
        DEFAULT
        + loop(
            write(r"'<|im_start|>user\n' + m.content + '<|im_end|>\n'"),
            r"{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}{% if not loop.last %}{{ '<|im_end|>' }}"
            r"{% endif %}{% endgeneration %}{% if not loop.last %}{{ '\n' }}{% endif %}",
        )
        + prompt(ASSISTANT),
        "<|im_end|>",
    ),
    # A finished conversation ends with a token more.
    "phi-3": (
        loop(
            write(r"'<|user|>\n' + m.content + '<|end|>\n'"),
            write(r"'<|assistant|>\n'") + reply("m.content + '<|end|>'") + write(r"'\n'"),
            write(r"'<|system|>\n' + m.content + '<|end|>\n'"),
        )
        + r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        "<|end|>",
    ),
    "zephyr": (
        loop(
            write(r"'<|user|>\n' + m.content + eos_token + '\n'"),
            write(r"'<|assistant|>\n'") + reply("m.content + eos_token") + write(r"'\n'"),
            write(r"'<|system|>\n' + m.content + eos_token + '\n'"),
        )
        + prompt(r"<|assistant|>\n"),
        "</s>",
    ),
    # Thinking is left out of what was said; the prompt begins one.
    "r1": (
        BOS + loop(
            write("'<|user|>' + m.content"),
            write("'<|assistant|>'") + reply("m.content.split('</think>')[-1] + eos_token"),
        )
        + prompt(r"<|assistant|><think>\n"),
        "</s>",
    ),
    "vicuna": (
        BOS + loop(write("'USER: ' + m.content"), write("' ASSISTANT:'") + reply("' ' + m.content + eos_token"))
        + prompt(" ASSISTANT:"),
        "</s>",
    ),
    # A prompt that ends in a space, which is one token with the reply's first word.
    "vicuna, space": (
        BOS + loop(write("'USER: ' + m.content"), write("' ASSISTANT: '") + reply("m.content + eos_token"))
        + prompt(" ASSISTANT: "),
        "</s>",
    ),
    # Nothing ends a reply.
    "alpaca": (
        BOS + loop(
            write(r"'### Instruction:\n' + m.content + '\n\n'"),
            write(r"'### Response:\n'") + reply("m.content") + write(r"'\n\n'"),
        )
        + prompt(r"### Response:\n"),
        "",
    ),
    # The end token is the whole conversation's.
    "once": (
        loop(write(r"'Q: ' + m.content + '\n'"), write("'A: '") + reply("m.content") + write(r"'\n'"))
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}" + prompt("A: "),
        "",
    ),
    # There is no prompt: the template writes the head of a reply, and the assistant does not.
    "no prompt": (
        loop(write("'<|user|>' + m.content + '<|end|>'"), write(r"'<|assistant|>\n'") + reply("m.content + '<|end|>'")),
        "<|end|>",
    ),
    # One token begins a text and ends a reply; a line break between turns only.
    "olmo": (
        "<|endoftext|>"
        + loop(
            write(r"'<|user|>\n' + m.content + '\n'"),
            write(r"'<|assistant|>\n'") + reply("m.content + '<|endoftext|>'")
            + r"{% if not loop.last %}{{ '\n' }}{% endif %}",
        )
        + prompt(r"<|assistant|>\n"),
        "<|endoftext|>",
    ),
    # Words end a reply.
    "words": (
        loop(write("'Q: ' + m.content + ' '"), write("'A:'") + reply("' ' + m.content + ' ### End'") + write(r"'\n'"))
        + prompt("A:"),
        "### End",
    ),
}  # fmt: skip
