"""Streams a completion with the stubs alone: `pip install ./protos` in an environment of your own, no other part of Carousel.

make serve                                                  # in one terminal
python3 -m venv stubs                                       # in another
stubs/bin/pip install ./protos
stubs/bin/python examples/python/generate.py 'def fibonacci(n):'
"""

from __future__ import annotations

import argparse
import sys

import grpc

from carousel.v1 import generation_pb2 as pb
from carousel.v1.generation_pb2_grpc import GenerationStub


def main() -> int:
    """The exit code: 0 done, 1 refused or broken, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Streams a completion.")
    parser.add_argument("prompt", nargs="?", default="def fibonacci(n):")
    parser.add_argument("--target", default="127.0.0.1:50051", help="host and port of the server (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text (default: random)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for all of it (default: %(default)s)")
    options = parser.parse_args()
    request = pb.GenerateRequest(
        text=options.prompt,
        sampling=pb.SamplingParams(seed=options.seed),  # None: absent, the server's default
        stopping=pb.StoppingParams(max_tokens=options.max_tokens),
    )
    with grpc.insecure_channel(options.target) as channel:
        # The deadline goes to the server: it plans by it, refuses what can't be done in time, and computes nothing after it.
        call = GenerationStub(channel).Generate(request, timeout=options.timeout)
        try:
            for response in call:
                show(response)
        except KeyboardInterrupt:
            call.cancel()  # the server stops computing at its next step
            print("\ncancelled", file=sys.stderr)
            return 130
        except grpc.RpcError:
            print(f"{options.target}: {call.code().name}: {call.details()}", file=sys.stderr)
            return 1
    return 0


def show(response: pb.GenerateResponse) -> None:
    """The text on stdout as it comes, how it ended and what it took on stderr."""
    match response.WhichOneof("event"):
        case "delta":
            print(response.delta.text, end="", flush=True)
        case "finished":
            print(flush=True)
            reason = pb.FinishReason.Name(response.finished.reason).removeprefix("FINISH_REASON_")
            print(f"finish reason: {reason}", file=sys.stderr)
        case "summary":
            usage = response.summary.usage
            print(f"usage: {usage.prompt_tokens} prompt tokens, {usage.output_tokens} output tokens", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
