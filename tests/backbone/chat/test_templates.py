"""Chats render as published, and as transformers renders them."""

import json
import shutil
from pathlib import Path

import pytest

from backbone.templates import TEMPLATES
from backbone.tokenizer import EMBEDDED, load_tokenizer
from tests.backbone.chat.families import FAMILIES, SPECIAL, untagged
from tests.backbone.chat.made import CHAT, SYSTEM, embedded_with, load_with, talk

CASES = Path(__file__).resolve().parents[4] / "shared" / "cases" / "templates"
# What a template may see and do, one snippet each.
SNIPPETS = [
    "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ custom is defined }}",
    "{{ sep_token is defined }} {{ pad_token }} {{ unk_token }} [{{ cls_token }}]",
    "{{ messages | tojson }} {{ {'b': '<&>\\'é', 'a': [1, none, true]} | tojson }}",
    "{{ {'b': 'é', 'a': 1} | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}",
    "{{ {'b': [1, 2]} | tojson(separators=(',', ':')) }} {{ ('<' | tojson) + '>' }}",
    "{{ strftime_now('%d %b %Y') }} {{ strftime_now is defined }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 2 %}{% break %}"
    "{% endif %}{{ m.content }}{% endfor %}",
    "  {% if true %}\n  a\n  {%- endif %}\n  {# note #}\nb\n\n",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% set ns = namespace(n=0, self=3) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}",
    "{% set ns = namespace(_n=0) %}{{ ns._n }}",
    "{{ dict(a=1) }} {{ messages[0].missing }} {{ messages[0].get('missing') is none }} {{ messages[1]['name'] }}",
    "{{ messages[0].content.startswith('Hi') }} {{ messages[-1].content | upper | replace('ME', 'x') }} {{ '<' | e }}",
    "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(messages[0].role) }} {{ messages | map(attribute='role') | list }}",
    "{{ raise_exception('no') }}",
    "{{ missing + 'a' }}",
    "{{ messages[0].content.no.such }}",
    "{{ messages.append(1) }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ range(1000000) | length }}",
]


@pytest.fixture(autouse=True)
def frozen(today):
    """Every test here."""


def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def assert_same(ours, oracle, messages):
    """Text and token ids are those of transformers, with and without a prompt; a refusal is one here too."""
    import jinja2

    for asks in (True, False):
        try:
            text = oracle.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
            ids = oracle.apply_chat_template(messages, add_generation_prompt=asks, return_dict=False)
        except (jinja2.TemplateError, TypeError, ArithmeticError):
            with pytest.raises(ValueError, match="refuses this conversation"):
                ours.render(messages, asks)
            continue
        assert ours.render(messages, asks) == text
        assert ours.encode_chat(messages, asks) == ids


@pytest.mark.parametrize("name", FAMILIES)
def test_families_render_as_transformers_renders_them(folder, name):
    ours = load_with(folder, untagged(FAMILIES[name][0]))
    oracle = theirs(folder)
    for chat in (CHAT, SYSTEM + CHAT, CHAT[:3], SYSTEM + CHAT[:1], talk("<&> é\n", " 'x' <b>", "{{ y }}")):
        assert_same(ours, oracle, chat)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_templates_see_what_they_see_in_transformers(folder, snippet):
    # The snippet is what a third message adds, so that the template loads whatever the snippet does.
    template = "{% if messages | length > 2 %}" + snippet + "{% else %}{{ messages[0].content }}{% endif %}"
    ours = load_with(folder, template)
    chat = [{**message, "name": None} for message in CHAT]
    assert_same(ours, theirs(folder), chat)
    # The control: without the snippet the text is another.
    assert theirs(folder).apply_chat_template(CHAT[:2], tokenize=False) == CHAT[0]["content"]


def test_reasoning_has_the_names_that_templates_use(folder):
    ours = load_with(
        folder, "{% for m in messages %}{{ m.content }}[{{ m.thinking }}|{{ m.reasoning_content }}]{% endfor %}"
    )
    for name in ("reasoning_content", "thinking", "reasoning"):
        chat = [*CHAT[:3], {**CHAT[3], name: "hm"}]
        assert_same(ours, theirs(folder), chat)
        assert "[hm|hm]" in ours.render(chat)


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": None, "eos_token": None},
        {"bos_token": "", "sep_token": "|"},
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True}},
        {"eos_token": {"__type": "AddedToken", "content": "</s>"}, "image_token": "<image>"},
        {"extra_special_tokens": {"video_token": "<video>"}, "cls_token": "<cls>"},
        {"additional_special_tokens": ["<tool>", "<call>"]},
        {"extra_special_tokens": ["<tool>"]},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_special_tokens_are_those_of_transformers(tmp_path, settings):
    folder = embedded_with(tmp_path / "t")
    file = folder / "tokenizer_config.json"
    given = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in given.items() if value is not None}))
    names = ("bos", "eos", "sep", "cls", "pad", "unk", "mask", "image", "video")
    shown = "".join(
        "{{ '%s ' if NAME is not defined else NAME }}".replace("NAME", f"{name}_token") % name for name in names
    )
    ours = load_with(folder, shown + "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert_same(ours, theirs(folder), talk("<tool>a<call>", "<image>b</s>"))
    assert_same(
        load_with(folder, "{% if messages | length > 2 %}{{ bos_token + 'a' }}{% endif %}"), theirs(folder), CHAT
    )
    for name in TEMPLATES:  # the named ones serve any vocabulary
        assert "me too" in load_tokenizer(folder, name).render(CHAT)


TEXT = "{% for m in messages %}{{ 'NAME ' + m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("files", "setting"),
    [
        ({"chat_template.jinja": "file"}, "config"),
        ({}, "config"),
        ({}, [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]),
        ({"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag"}, "config"),
        ({"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "named"}, None),
        ({"additional_chat_templates/default.jinja": "named"}, "config"),
        ({"additional_chat_templates/rag.jinja": "rag"}, "config"),
        ({}, [{"name": "rag", "template": "rag"}]),
        ({}, None),
    ],
    ids=str,
)
def test_the_template_of_a_directory_is_the_one_that_transformers_chooses(tmp_path, files, setting):
    folder = embedded_with(tmp_path / "t")
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (folder / name).write_text(TEXT.replace("NAME", text) + "\n")
    if isinstance(setting, list):
        setting = [{**item, "template": TEXT.replace("NAME", item["template"])} for item in setting]
    elif setting is not None:
        setting = TEXT.replace("NAME", setting)
    if setting is not None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": setting}))
    try:
        expected = theirs(folder).apply_chat_template(CHAT, tokenize=False)
    except ValueError:
        with pytest.raises(ValueError, match=r"(has no chat template|expected one named default); choose one by name"):
            load_tokenizer(folder)
        return
    assert load_tokenizer(folder).render(CHAT, False) == expected


def test_the_template_of_a_processor_is_found(tmp_path):
    folder = embedded_with(tmp_path / "t")
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert load_tokenizer(folder).render(CHAT) == load_tokenizer().render(CHAT)
    (folder / "chat_template.jinja").write_text(" \n")  # blank files decide nothing
    assert load_tokenizer(folder).render(CHAT) == load_tokenizer().render(CHAT)
    (folder / "chat_template.json").write_text("{}")
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(folder)


@pytest.mark.skipif(not CASES.exists(), reason="needs the templates of real directories")
@pytest.mark.parametrize("case", sorted(CASES.glob("*")), ids=lambda case: case.name)
def test_templates_of_directories_render_as_transformers_renders_them(tmp_path, case):
    folder = embedded_with(tmp_path / "t", **{text: text for text in SPECIAL})
    shutil.copytree(case, folder, dirs_exist_ok=True)
    ours, oracle = load_tokenizer(folder), theirs(folder)
    for chat in (CHAT, SYSTEM + CHAT, CHAT[:3], SYSTEM + CHAT[:1]):
        assert_same(ours, oracle, chat)


def test_named_templates_render_as_published():
    a, b, c = "a", "b", "c"
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": a},
        {"role": "assistant", "content": b},
        {"role": "user", "content": c},
    ]
    expected = {
        "vicuna": "<s>S USER: a ASSISTANT: b</s>USER: c ASSISTANT:",
        "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]",
        "llama-3": (
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        "chatml": (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        ),
    }
    assert expected.keys() == TEMPLATES.keys()
    for name, text in expected.items():
        assert load_tokenizer(template=name).render(chat) == text
    assert load_tokenizer(template="llama-2").render(chat[1:2]) == "<s>[INST] a [/INST]"


def test_rendering_equals_transformers_apply_chat_template():
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(EMBEDDED, local_files_only=True)
    for template in (None, *TEMPLATES):
        ours = load_tokenizer(template=template)
        for messages in (CHAT, SYSTEM + CHAT[:3]):
            ids = theirs.apply_chat_template(
                messages, chat_template=ours.template, add_generation_prompt=True, return_dict=False
            )
            assert ours.encode_chat(messages) == ids


def test_unknown_and_missing_templates_are_explained(tmp_path):
    with pytest.raises(
        ValueError, match=r"Unknown chat template 'vicunna'\. Did you mean 'vicuna'\? Available: vicuna,"
    ):
        load_tokenizer(template="vicunna")
    bare = embedded_with(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"bare has no chat template; choose one by name: vicuna, llama-2"):
        load_tokenizer(bare)
    assert load_tokenizer(bare, "vicuna").render(CHAT) == load_tokenizer().render(CHAT)


def test_templates_run_in_a_sandbox_and_their_mistakes_are_errors(tmp_path):
    folder = embedded_with(tmp_path / "t")
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}A"
        "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert load_tokenizer(folder).render(CHAT[2:], False) == "26 Jul 2024UASSISTANT: me tooAme too</s>"
    for text, complaint in [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for %}", "does not parse, line 1"),
        ("{{ raise_exception('no such role') }}", "no such role"),
    ]:
        (folder / "chat_template.jinja").write_text(text)
        with pytest.raises(ValueError, match=complaint):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "does not open with a user message"),
        (CHAT[1:], "does not open with a user message"),
        (CHAT + SYSTEM, "message 4 is a system message"),
        ([{"role": "human", "content": "hi"}], "role 'human', expected one of system, user, assistant"),
        ([{"role": "user", "content": None}], "message 0"),
        (["hi"], "message 0 is 'hi'"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(messages, complaint):
    tokenizer = load_tokenizer()
    for use in (tokenizer.render, tokenizer.encode_chat, tokenizer.encode_with_mask):
        with pytest.raises(ValueError, match=complaint):
            use(messages)
