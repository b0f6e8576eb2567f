"""Streams a completion over KServe v2, with Triton's own client as it comes from the package index.

make serve                                                  # in one terminal
python3 -m venv triton                                      # in another: the client wants an older protobuf than the server
triton/bin/pip install 'tritonclient[grpc]'
triton/bin/python examples/tritonclient_generate.py 'def fibonacci(n):'
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton


def main() -> None:
    parser = argparse.ArgumentParser(description="Streams a completion over KServe v2.")
    parser.add_argument("prompt", nargs="?", default="def fibonacci(n):")
    parser.add_argument("--target", default="127.0.0.1:50051", help="host and port of the server (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, help="default: the model's own")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for all of it (default: %(default)s)")
    options = parser.parse_args()
    sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature}  # None: the default
    try:
        with triton.InferenceServerClient(options.target) as client:
            [model] = client.get_model_repository_index().models
            for text in generate(client, model.name, options.prompt, sampling, options.timeout):
                print(text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        sys.exit(130)
    except triton.InferenceServerException as error:
        sys.exit(f"{options.target}: {error}")


def generate(
    client: triton.InferenceServerClient, model: str, prompt: str, sampling: dict[str, Any], timeout_s: float
) -> Iterator[str]:
    """The pieces of text as they come; left early, it cancels the request. Raises InferenceServerException."""
    answers: queue.Queue[tuple[triton.InferResult | None, triton.InferenceServerException | None]] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)), stream_timeout=timeout_s)
    inputs = [tensor("text_input", prompt), tensor("sampling_parameters", json.dumps(sampling)), tensor("stream", True)]
    client.async_stream_infer(model, inputs)
    try:
        while True:
            result, error = answers.get()
            if error is not None:
                raise error
            yield result.as_numpy("text_output")[0].decode()
            if result.get_response().parameters["triton_final_response"].bool_param:
                return
    finally:
        client.stop_stream(cancel_requests=True)


def tensor(name: str, value: str | bool) -> triton.InferInput:
    """Of one element."""
    array = np.array([value]) if isinstance(value, bool) else np.array([value.encode()], dtype=np.object_)
    made = triton.InferInput(name, [1], "BOOL" if isinstance(value, bool) else "BYTES")
    return made.set_data_from_numpy(array)


if __name__ == "__main__":
    main()
