"""A program for an environment with tritonclient, which the project's own can't hold: its calls, and what came of them as JSON.

python tritonclient_calls.py TARGET MODEL PROMPT
"""

from __future__ import annotations

import asyncio
import base64
import json
import queue
import sys
from collections.abc import AsyncIterator, Callable
from importlib import metadata
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio
from tritonclient.grpc import model_config_pb2, service_pb2

PARAMETERS = json.dumps({"max_tokens": 12})


def tensor(name: str, value: str | bool) -> triton.InferInput:
    array = np.array([value]) if isinstance(value, bool) else np.array([value.encode()], dtype=np.object_)
    return triton.InferInput(name, [1], "BOOL" if isinstance(value, bool) else "BYTES").set_data_from_numpy(array)


def inputs(prompt: str, **more: str | bool) -> list[triton.InferInput]:
    given = {"text_input": prompt, "sampling_parameters": PARAMETERS} | more
    return [tensor(name, value) for name, value in given.items()]


def text(result: triton.InferResult) -> str | None:
    """None: there is no output."""
    array = result.as_numpy("text_output")
    return None if array is None else array[0].decode()


def described(result: triton.InferResult | None, error: Exception | None) -> dict[str, Any]:
    """A response of a stream."""
    if error is not None:
        return {"error": error.message()}
    assert result is not None
    response = result.get_response()
    final = response.parameters["triton_final_response"].bool_param
    return {"id": response.id, "text": text(result), "final": final}


def failure(call: Callable[[], object]) -> dict[str, str]:
    try:
        call()
    except triton.InferenceServerException as error:
        return {"status": error.status(), "message": error.message()}
    raise AssertionError("it did not fail")


def facts(client: triton.InferenceServerClient, model: str) -> dict[str, Any]:
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata(model, as_json=True),
        "config": client.get_model_config(model, as_json=True),
        "index": client.get_model_repository_index(as_json=True),
        "other_metadata": failure(lambda: client.get_model_metadata("other")),
    }


def infer(client: triton.InferenceServerClient, model: str, prompt: str) -> dict[str, Any]:
    wanted = [triton.InferRequestedOutput("text_output")]
    whole = client.infer(model, inputs(prompt), outputs=wanted, request_id="whole", priority=1, timeout=20_000_000)
    as_parameters = client.infer(model, inputs(prompt)[:1], parameters={"max_tokens": 12})
    answers: queue.Queue[triton.InferResult | None] = queue.Queue()
    for _ in range(3):
        client.async_infer(model, inputs(prompt), callback=lambda result, error: answers.put(result))
    return {
        "text": text(whole),
        "id": whole.get_response().id,
        "with_prompt": text(client.infer(model, inputs(prompt, exclude_input_in_output=False))),
        "as_parameters": text(as_parameters),
        "at_once": [text(answers.get(timeout=20)) for _ in range(3)],
        "of_a_sequence": text(client.infer(model, inputs(prompt), sequence_id=7, sequence_start=True, sequence_end=True)),
        "refused": failure(lambda: client.infer(model, inputs(prompt, sampling_parameters='{"best_of": 2}'))),
        "streaming": failure(lambda: client.infer(model, inputs(prompt, stream=True))),
    }


def stream(client: triton.InferenceServerClient, model: str, prompt: str) -> list[dict[str, Any]]:
    """What its callback was given."""
    got: list[dict[str, Any]] = []
    client.start_stream(callback=lambda result, error: got.append(described(result, error)))
    client.async_stream_infer(model, inputs(prompt, stream=True), request_id="pieces")
    client.async_stream_infer(model, inputs(prompt), request_id="whole")
    client.async_stream_infer(model, inputs(prompt, stream=True), request_id="empty", enable_empty_final_response=True)
    client.async_stream_infer(model, inputs(prompt, sampling_parameters='{"best_of": 2}'), request_id="refused")
    client.stop_stream()  # waits for all
    return got


async def stream_aio(target: str, model: str, prompt: str) -> list[dict[str, Any]]:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": model, "inputs": inputs(prompt, stream=True), "request_id": "aio"}

    async with tritonclient.grpc.aio.InferenceServerClient(target) as client:
        return [described(*each) async for each in client.stream_infer(requests())]


def main() -> None:
    target, model, prompt = sys.argv[1:]
    with triton.InferenceServerClient(target) as client:
        found = {
            "version": metadata.version("tritonclient"),
            "files": [base64.b64encode(file.DESCRIPTOR.serialized_pb).decode() for file in (service_pb2, model_config_pb2)],
            "facts": facts(client, model),
            "infer": infer(client, model, prompt),
            "stream": stream(client, model, prompt),
        }
    found["aio"] = asyncio.run(stream_aio(target, model, prompt))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
