"""Limits of a tenant on a live server with tokens: who passes them hears when to come again, others are served; and no token is
in the log, at its most talkative.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from tokenizers import AddedToken

from carousel.v1 import control_pb2, control_pb2_grpc, generation_pb2_grpc, tokenization_pb2, tokenization_pb2_grpc
from tests.helpers import tokenizer_files
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import Server, eventually, running
from tests.helpers.streams import collect, details, failure, make

PATIENCE_S = 30.0
LONG = 800  # tokens, 640 KB: such a request does not end before it is read
KEYS = {name: f"carousel_{name}-{'0123456789' * 4}" for name in ("few", "slow", "other", "ops")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    model_dir = make_checkpoint(folder / "tiny", "llama", vocab_size=384, max_position_embeddings=2 * LONG)
    backend = tokenizer_files.byte_level(vocab_size=300)
    backend.add_tokens([AddedToken(f"{i:04}" * 1000, normalized=False) for i in range(84)])  # one in five has 4,000 characters
    backend.save(str(model_dir / "tokenizer.json"))
    tokens = folder / "tokens.jsonl"
    entries = [
        {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": name, "admin": name == "ops"}
        for name, key in KEYS.items()
    ]
    tokens.write_text("\n".join(map(json.dumps, entries)) + "\n")
    tenants = ("--tenant", "few:requests=2", "--tenant", "slow:rate=1", "--tenant", "*")
    options = (
        "--device",
        "sim",
        "--num-blocks",
        "8000",
        "--max-unread-tokens",
        "64",
        "--tokens",
        str(tokens),
        "--log-level",
        "debug",
        *tenants,
    )
    with running("--model", str(model_dir), *options) as server:
        yield server


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target, [("grpc.http2.bdp_probe", 0)]) as channel:
        yield channel


def called_by(name: str, key: str = "") -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {key or KEYS[name]}")], "timeout": PATIENCE_S}


def is_told_to_wait(error: grpc.RpcError, reason: str, limit: dict[str, str]) -> None:
    found = details(error)
    retry, info = found["RetryInfo"], found["ErrorInfo"]
    assert isinstance(retry, error_details_pb2.RetryInfo) and isinstance(info, error_details_pb2.ErrorInfo)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert retry.retry_delay.ToNanoseconds() > 0 and (info.reason, dict(info.metadata)) == (reason, limit)


def test_a_tenant_has_so_many_streams_at_a_time(channel: grpc.Channel) -> None:
    generation = generation_pb2_grpc.GenerationStub(channel)
    streams = [generation.Generate(make(max_tokens=LONG, ignore_eos=True), **called_by("few")) for _ in range(2)]
    for stream in streams:
        next(stream)
    error = failure(generation.Generate(make(max_tokens=1), **called_by("few")))
    is_told_to_wait(error, "TENANT_REQUESTS", {"max_requests": "2"})
    assert len(collect(generation.Generate(make(max_tokens=3, ignore_eos=True), **called_by("other"))).tokens) == 3
    streams[0].cancel()

    def is_served() -> bool:
        try:
            return len(collect(generation.Generate(make(max_tokens=3, ignore_eos=True), **called_by("few"))).tokens) == 3
        except grpc.RpcError:
            return False

    assert eventually(is_served), "once one of them is over"
    streams[1].cancel()


def test_a_tenant_begins_so_many_requests_a_second(channel: grpc.Channel) -> None:
    generation = generation_pb2_grpc.GenerationStub(channel)
    refusals = []
    for _ in range(20):
        try:
            collect(generation.Generate(make(max_tokens=1, ignore_eos=True), **called_by("slow")))
        except grpc.RpcError as error:
            refusals.append(error)
    assert refusals, "twenty do not take twenty seconds"
    for error in refusals:
        is_told_to_wait(error, "TENANT_RATE", {"max_requests_per_s": "1"})
    collect(generation.Generate(make(max_tokens=1, ignore_eos=True), **called_by("other")))


def test_no_token_and_no_prompt_is_in_the_log(server: Server, channel: grpc.Channel) -> None:
    """Of those who may call, and of those who may not."""
    secret, wrong = "the-words-of-a-prompt", "carousel_wrong-9876543210"
    generation = generation_pb2_grpc.GenerationStub(channel)
    collect(generation.Generate(make(secret, max_tokens=3), **called_by("other")))
    assert failure(generation.Generate(make(secret, temperature=-1.0), **called_by("other")))
    assert failure(generation.Generate(make(secret), **called_by("", wrong))).code() is grpc.StatusCode.UNAUTHENTICATED
    tokenization_pb2_grpc.TokenizationStub(channel).Tokenize(
        tokenization_pb2.TokenizeRequest(text=secret), **called_by("other")
    )
    control = control_pb2_grpc.ControlStub(channel)
    control.GetLoad(control_pb2.GetLoadRequest(), **called_by("ops"))
    with pytest.raises(grpc.RpcError) as denied:
        control.GetLoad(control_pb2.GetLoadRequest(), **called_by("other"))
    assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "DEBUG" in server.log(), "it is as talkative as it can be"
    for word in (*KEYS.values(), secret, wrong):
        assert word not in server.log()
