"""carousel.v1.Tokenization: the tokenizer and the chat template as they are, without a model. Long texts go to threads."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Executor
from typing import Any, TypeVar

from carousel.v1 import tokenization_pb2 as pb
from carousel.v1.tokenization_pb2_grpc import TokenizationServicer
from scheduler.errors import InvalidFieldError
from scheduler.frontend.chat_template import ChatTemplates
from scheduler.frontend.server.status import Context, answers_with_status
from scheduler.frontend.tokenizer import Tokenizer

AnswerT = TypeVar("AnswerT")

MOST = 1 << 21  # characters of a text, or tokens: some seconds of the tokenizer's time, and 250 MiB


class Tokenization(TokenizationServicer):
    def __init__(self, tokenizer: Tokenizer, templates: ChatTemplates, threads: Executor) -> None:
        self._tokenizer, self._templates, self._threads = tokenizer, templates, threads

    @answers_with_status
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        _check_length("text", "characters", len(request.text))
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return pb.TokenizeResponse(token_ids=await self._in_thread(self._token_ids, request.text, special))

    @answers_with_status
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        _check_length("token_ids", "token ids", len(request.token_ids))
        skip, token_ids = request.skip_special_tokens, list(request.token_ids)
        if max(token_ids, default=0) >= self._tokenizer.vocab_size:
            what = f"has token id {max(token_ids)}; the tokenizer's are below {self._tokenizer.vocab_size}"
            raise InvalidFieldError("token_ids", what)
        skip = skip if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=await self._in_thread(self._tokenizer.decode, token_ids, skip))

    @answers_with_status
    async def ApplyChatTemplate(self, request: pb.ApplyChatTemplateRequest, context: Context) -> pb.ApplyChatTemplateResponse:
        if not request.messages:
            raise InvalidFieldError("messages", "must be one or more")
        text, token_ids = await self._in_thread(self._prompt, request)
        return pb.ApplyChatTemplateResponse(text=text, token_ids=token_ids)

    def _prompt(self, request: pb.ApplyChatTemplateRequest) -> tuple[str, list[int]]:
        text = self._templates.apply(
            [
                _values(f"messages[{i}].more", message.more) | {"role": message.role, "content": message.content}
                for i, message in enumerate(request.messages)
            ],
            add_generation_prompt=request.add_generation_prompt if request.HasField("add_generation_prompt") else True,
            tools=[_values(f"tools[{i}]", tool) for i, tool in enumerate(request.tools)],
            variables=_values("variables", request.variables),
            name=request.template_name if request.HasField("template_name") else None,
        )
        _check_length("messages", "characters as a prompt", len(text))
        return text, self._token_ids(text, False)

    def _token_ids(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens).ids
        return ids

    async def _in_thread(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _check_length(field: str, what: str, length: int) -> None:
    """Raises InvalidFieldError."""
    if length > MOST:
        raise InvalidFieldError(field, f"has {length} {what}; at most {MOST} are taken at once")


def _values(field: str, text: str) -> dict[str, Any]:
    """Of a JSON object; none of an empty text. Raises InvalidFieldError."""
    try:
        values = json.loads(text or "{}")
        json.dumps(values, ensure_ascii=False).encode()  # JSON can hold half of a surrogate pair, and no text can
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InvalidFieldError(field, "must be a JSON object")
    return values
