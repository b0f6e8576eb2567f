"""The options of the service, checked and made into its configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from scheduler.config import ServeConfig
from scheduler.core import CoreConfig


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--model", required=True, metavar="DIR_OR_HUB_ID", help="Checkpoint directory, or a model id of the Hugging Face hub."
)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--served-model-name", help="Name in GetServerInfo. [default: last part of --model]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "sim"]),
    default="auto",
    help="Where the worker computes; sim: no model, invented tokens.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="auto: float32 on a CPU, the checkpoint's own on a GPU.",
)
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=50051, help="Port to listen on; 0: any free one.")
@click.option("--frontends", type=click.IntRange(1, 64), default=1, help="Front-end processes that share the port.")
@click.option(
    "--policy",
    type=click.Choice(["continuous", "static"]),
    default="continuous",
    help="Scheduling policy; static is the baseline.",
)
@click.option("--static-batch-size", type=click.IntRange(0), default=0, help="Rows of a static batch; 0: as many as fit.")
@click.option("--max-batch-rows", type=click.IntRange(1, 65535), default=64, help="Sequences in the batch.")
@click.option(
    "--max-step-tokens", type=click.IntRange(1), default=512, help="Tokens computed in one step: decodes and chunks of prompts."
)
@click.option("--max-queue-requests", type=click.IntRange(1), default=4096, help="Requests that may wait.")
@click.option("--max-queue-tokens", type=click.IntRange(1), default=4_000_000, help="Prompt tokens that may wait.")
@click.option("--max-model-len", type=click.IntRange(2), help="Tokens of prompt and output together. [default: the model's]")
@click.option("--block-size", type=click.IntRange(16, 128), default=16, help="Tokens of one KV-cache block.")
@click.option("--num-blocks", type=click.IntRange(1), help="Blocks of the KV cache. [default: what the memory allows]")
@click.option(
    "--kv-memory-gib", type=click.FloatRange(0, min_open=True), help="Memory of the KV cache, instead of --num-blocks."
)
@click.option("--threads", type=click.IntRange(1), help="Threads of the CPU worker. [default: one per core]")
@click.option(
    "--drain-timeout", type=click.FloatRange(0), default=30.0, help="Seconds that running requests get after SIGTERM or Ctrl-C."
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
def serve_command(**options: object) -> int:
    """Serve a model: one scheduler with its gRPC front ends, and one worker."""
    from scheduler.supervisor import serve

    sys.exit(serve(config_from(options)))


# Options that only the worker reads.
_WORKER_OPTIONS = (
    "device",
    "dtype",
    "max_model_len",
    "block_size",
    "num_blocks",
    "kv_memory_gib",
    "threads",
    "max_batch_rows",
    "max_step_tokens",
)


def config_from(options: dict[str, object]) -> ServeConfig:
    """The configuration for these options."""
    worker_options: list[str] = []
    for name in _WORKER_OPTIONS:
        if options[name] is not None:
            worker_options += [f"--{name.replace('_', '-')}", str(options[name])]
    core = {
        name: options[name]
        for name in (
            "policy",
            "static_batch_size",
            "max_batch_rows",
            "max_step_tokens",
            "max_queue_requests",
            "max_queue_tokens",
        )
    }
    model = str(options["model"])
    return ServeConfig(
        core=CoreConfig(**core),  # type: ignore[arg-type]
        model=model,
        revision=options["revision"],  # type: ignore[arg-type]
        served_model_name=str(options["served_model_name"] or Path(model).name or model),
        host=str(options["host"]),
        port=int(str(options["port"])),
        frontends=int(str(options["frontends"])),
        drain_timeout_s=float(str(options["drain_timeout"])),
        log_level=str(options["log_level"]),
        worker_options=tuple(worker_options),
    )
