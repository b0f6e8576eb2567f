"""The model's own chat templates: a conversation to the text that the model expects of one. Jinja in a sandbox, with the
functions that transformers gives to templates, so the same text comes out. Knows files and plain values; no gRPC."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scheduler.errors import InvalidFieldError, ModelFilesError, NoChatTemplateError
from scheduler.model_files import read_json

_DEFAULT, _TOOL_USE = "default", "tool_use"
_FOLDER = "additional_chat_templates"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, by which training finds the model's own words: here its content, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplates:
    """All templates of a model, by name. Thread-safe: nothing changes after loading."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Raises ModelFilesError when one is no Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self._special_tokens = dict(special_tokens)
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except TemplateSyntaxError as error:
            raise ModelFilesError(f"the chat template is no Jinja: line {error.lineno}: {error.message}") from None

    @classmethod
    def load(cls, directory: Path) -> ChatTemplates:
        """From chat_template.jinja, else tokenizer_config.json; further ones from a folder. Raises ModelFilesError."""
        config = read_json(directory / "tokenizer_config.json")
        stored = config.get("chat_template")
        sources: dict[str, str] = {}
        if isinstance(stored, str):
            sources[_DEFAULT] = stored
        elif isinstance(stored, list):
            sources |= {entry["name"]: entry["template"] for entry in stored if isinstance(entry, dict)}
        files = [(_DEFAULT, directory / "chat_template.jinja")]
        files += [(path.stem, path) for path in sorted((directory / _FOLDER).glob("*.jinja"))]
        for name, path in files:
            if path.is_file():
                sources[name] = path.read_text(encoding="utf-8")
        tokens = {name: config.get(name) for name in _NAMED}
        texts = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items() if token}
        try:
            return cls(sources, texts)
        except ModelFilesError as error:
            raise ModelFilesError(f"{directory}: {error}") from None

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        name: str | None,
    ) -> str:
        """The prompt. Raises NoChatTemplateError, InvalidFieldError."""
        values = self._special_tokens | dict(variables)
        values |= {"messages": messages, "tools": list(tools) or None, "documents": None}
        try:
            template = self._choose(name, bool(tools))
            text: str = template.render(**values, add_generation_prompt=add_generation_prompt)
            return text
        except TemplateError as error:
            raise InvalidFieldError("messages", f"are refused by the model's chat template: {_one_line(error)}") from None
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            what = f"do not fit the model's chat template: {type(error).__name__}: {_one_line(error)}"
            raise InvalidFieldError("messages", what) from None

    def _choose(self, name: str | None, with_tools: bool) -> Any:
        if not self._templates:
            raise NoChatTemplateError("this model has no chat template: make the prompt yourself, and use Generate")
        if name is None:
            name = _TOOL_USE if with_tools and _TOOL_USE in self._templates else _DEFAULT
        if name not in self._templates:
            raise InvalidFieldError("template_name", f"must be one of {', '.join(sorted(self._templates))}, not {name!r}")
        return self._templates[name]


def _to_json(value: Any, **options: Any) -> str:
    """Not Jinja's own, which would escape what HTML reserves."""
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
