"""Chat templates give the text that transformers gives; what a template or a caller does wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from scheduler.errors import InvalidFieldError, ModelFilesError, NoChatTemplateError
from scheduler.frontend.chat_template import ChatTemplates

DEMO = Path(__file__).parents[3] / "demo" / "model"
TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
CHAT = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "What's 1 + 1?\n"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 1.5}}}]},
    {"role": "user", "content": "é😀"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a 'sum' <é>", "parameters": {"type": "object"}}}]

TEMPLATES = {
    "loops and tools": """{{ bos_token }}
{% if tools %}
    {{ tools | tojson }} {{- tools[0] | tojson(indent=2) }}
{% endif %}
{% for message in messages if message.role != 'system' %}
    {%- if loop.first %}[first]{% endif %}
    <{{ message['role'] }}>{{ message.content | trim }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}""",
    "namespace, break, continue": """{% set ns = namespace(count=0) %}
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% set ns.count = ns.count + 1 %}{% if ns.count > 2 %}{% break %}{% endif %}
{{ ns.count }}:{{ message.content }}{{ eos_token }}
{%- endfor %}{{ thinking is defined and thinking }}""",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}",
}


def transformers_text(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "tokenizer.json"), chat_template=template, **TOKENS)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def apply(templates: ChatTemplates, messages: list[dict[str, Any]], name: str | None = None, **options: Any) -> str:
    tools, prompt = options.pop("tools", ()), options.pop("add_generation_prompt", True)
    return templates.apply(messages, add_generation_prompt=prompt, tools=tools or (), variables=options, name=name)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("options", [{}, {"tools": TOOLS}, {"add_generation_prompt": False, "thinking": True}])
def test_texts_are_those_of_transformers(template: str, options: dict[str, Any]) -> None:
    expected = transformers_text(template, CHAT, **({"add_generation_prompt": True} | options))
    assert apply(ChatTemplates({"default": template}, TOKENS), CHAT, **options) == expected


def test_the_bundled_models_template() -> None:
    template = (DEMO / "chat_template.jinja").read_text()
    expected = transformers_text(template, CHAT[1:2], add_generation_prompt=True)
    assert apply(ChatTemplates.load(DEMO), CHAT[1:2]) == expected and "What's" in expected


def test_of_several_templates_the_asked_for_is_taken(tmp_path: Path) -> None:
    stored = [{"name": name, "template": f"{name} of the list"} for name in ("default", "tool_use", "rag")]
    config = {"chat_template": stored, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ bos_token }} of a file")
    templates = ChatTemplates.load(tmp_path)
    assert apply(templates, CHAT) == "default of the list"
    assert apply(templates, CHAT, tools=TOOLS) == "tool_use of the list"
    assert apply(templates, CHAT, "rag", tools=TOOLS) == "<s> of a file"
    with pytest.raises(InvalidFieldError, match=r"template_name must be one of default, rag, tool_use, not 'other'"):
        apply(templates, CHAT, "other")


def test_a_file_of_its_own_goes_first(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    (tmp_path / "chat_template.jinja").write_text("new")
    assert apply(ChatTemplates.load(tmp_path), CHAT) == "new"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoChatTemplateError, match="no chat template"):
        apply(ChatTemplates.load(tmp_path), CHAT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('roles must\n alternate') }}",
            "messages are refused by the model's chat template: roles must alternate",
        ),
        ("{{ messages[0].content.no.such }}", "messages are refused"),
        ("{{ messages[0].content + 1 }}", "messages do not fit the model's chat template: TypeError"),
        ("{{ messages.append(1) }}", "messages are refused"),
        ("{{ ''.__class__.__mro__ }}", "messages are refused"),
        ("{{ 1 // 0 }}", "messages do not fit the model's chat template: ZeroDivisionError"),
        ("{% for i in range(1000000000) %}{% endfor %}", "messages do not fit|messages are refused"),
    ],
)
def test_what_a_template_refuses_is_an_invalid_argument(template: str, message: str) -> None:
    with pytest.raises(InvalidFieldError, match=message) as caught:
        apply(ChatTemplates({"default": template}, TOKENS), CHAT)
    assert caught.value.field == "messages" and "\n" not in str(caught.value)


def test_a_template_that_is_no_jinja_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("a\n{% for %}")
    with pytest.raises(ModelFilesError, match=r"the chat template is no Jinja: line 2"):
        ChatTemplates.load(tmp_path)
