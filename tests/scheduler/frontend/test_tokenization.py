"""carousel.v1.Tokenization on a live front end: what it says is what Generate does with the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from carousel.v1 import tokenization_pb2 as pb
from client import CarouselClient
from scheduler.frontend.tokenizer import Tokenizer
from tests.helpers import tokenizer_files
from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import Frontend, running
from tests.helpers.streams import bad_field

TEXTS = ["", "def f():\n", "é😀 \x00", "x " * 5000]
TEMPLATE = """{{ bos_token }}
{%- for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{{ m.content }}{% endfor %}
{{- tools | tojson }}{{ depth }}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tokenizer_files.with_bos(tokenizer_files.byte_level())
    folder = tmp_path_factory.mktemp("model")
    bos = tokenizer.id_to_token(tokenizer.encode("").ids[0])
    tokenizer_files.save(tokenizer, folder, {"bos_token": bos})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def served(model_dir: Path) -> Iterator[Frontend]:
    with FakeCore() as core, running(model_dir, core.endpoint) as frontend:
        frontend.wait_serving()
        yield frontend
        assert "Traceback" not in frontend.log(), frontend.log()


@pytest.fixture
def client(served: Frontend) -> Iterator[CarouselClient]:
    with CarouselClient(served.target) as client:
        yield client


@pytest.mark.parametrize("text", TEXTS)
def test_texts_become_ids_and_come_back(client: CarouselClient, model_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.load(model_dir)
    ids = client.tokenize(text)
    assert ids == tokenizer.encode(text).ids and client.detokenize(ids) == text
    bare = client.tokenize(text, add_special_tokens=False)
    assert ids[1:] == bare, "only the beginning-of-text token is added"
    assert client.detokenize(ids, skip_special_tokens=False) != text


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_ids_beyond_the_vocabulary_are_refused(served: Frontend) -> None:
    error = refusal(lambda: served.tokenization.Detokenize(pb.DetokenizeRequest(token_ids=[1, 2**32 - 1])))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "token_ids"


def test_a_conversation_becomes_the_prompt(served: Frontend, client: CarouselClient) -> None:
    chat = [{"role": "user", "name": "Ann", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    ids = client.apply_chat_template(chat, tools=[{"n": 5, "x": 0.5, "list": [1, {"y": None}]}], depth=3)
    text = client.detokenize(ids, skip_special_tokens=False)
    assert text.endswith('<user Ann>Hi<assistant>Ho[{"n": 5, "x": 0.5, "list": [1, {"y": null}]}]3<assistant>')
    assert ids[1:] == client.tokenize(client.detokenize(ids), add_special_tokens=False), "one beginning-of-text token only"
    request = pb.ApplyChatTemplateRequest(messages=[pb.ChatMessage(role="user", content="a")], add_generation_prompt=False)
    answer = served.tokenization.ApplyChatTemplate(request)
    assert answer.text.endswith("<user>anull") and "<assistant>" not in answer.text


USER = pb.ChatMessage(role="user")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (dict(), "messages"),
        (dict(messages=[USER], template_name="x"), "template_name"),
        (dict(messages=[USER], variables="[1]"), "variables"),
        (dict(messages=[USER], variables="[" * 100_000), "variables"),
        (dict(messages=[USER], variables='{"depth": "\\ud800"}'), "variables"),
        (dict(messages=[USER], tools=["{}", "{"]), "tools[1]"),
        (dict(messages=[USER, pb.ChatMessage(role="user", more="x")]), "messages[1].more"),
    ],
)
def test_what_is_wrong_is_named(served: Frontend, fields: dict[str, Any], field: str) -> None:
    error = refusal(lambda: served.tokenization.ApplyChatTemplate(pb.ApplyChatTemplateRequest(**fields)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == field


def test_a_model_without_a_template_is_a_failed_precondition(tmp_path: Path) -> None:
    folder = tokenizer_files.save(tokenizer_files.byte_level(), tmp_path)
    request = pb.ApplyChatTemplateRequest(messages=[pb.ChatMessage(role="user", content="a")])
    with FakeCore() as core, running(folder, core.endpoint) as frontend:
        frontend.wait_serving()
        error = refusal(lambda: frontend.tokenization.ApplyChatTemplate(request))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION and "chat template" in (error.details() or "")
