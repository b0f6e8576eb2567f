"""The options of the service, checked and made into its configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import click

from scheduler.command import OneLineCommand
from scheduler.config import ServeConfig
from scheduler.core import CoreConfig
from scheduler.core.config import TenantLimits
from scheduler.frontend.config import TlsFiles


@click.command(cls=OneLineCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
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
@click.option(
    "--quantization",
    type=click.Choice(["none", "int8"]),
    default="none",
    help="int8: weights of 8 bits, on a CPU only; a quarter of the memory, and faster.",
)
@click.option("--weights", metavar="random:SEED", help="Made up instead of read, for measurements of a model's shape.")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=50051, help="Port to listen on; 0: any free one.")
@click.option("--tls-cert", metavar="FILE", help="PEM certificate of this server: calls are encrypted. Needs --tls-key.")
@click.option("--tls-key", metavar="FILE", help="Its private key, PEM without a password.")
@click.option("--tls-client-ca", metavar="FILE", help="PEM certificates: clients must show one that these vouch for.")
@click.option(
    "--tokens",
    metavar="FILE",
    help="Who may call: hashed keys, a JSON object a line, each with sha256, tenant and, for Control and Inspect, admin;"
    " `carousel token` makes them. Read at the start. [default: everybody may]",
)
@click.option("--frontends", type=click.IntRange(1, 64), default=1, help="Front-end processes that share the port.")
@click.option(
    "--policy",
    type=click.Choice(["continuous", "prefill_first", "static"]),
    default="continuous",
    help="Scheduling policy; static and prefill_first are baselines.",
)
@click.option("--static-batch-size", type=click.IntRange(0), default=0, help="Rows of a static batch; 0: as many as fit.")
@click.option("--max-batch-rows", type=click.IntRange(1, 65535), help="Sequences in the batch. [default: 64; 256 on a GPU]")
@click.option(
    "--max-step-tokens",
    type=click.IntRange(1),
    help="Tokens computed in one step: decodes and chunks of prompts. [default: 512]",
)
@click.option("--max-queue-requests", type=click.IntRange(1), default=4096, help="Requests that may wait.")
@click.option("--max-queue-tokens", type=click.IntRange(1), default=4_000_000, help="Prompt tokens that may wait.")
@click.option(
    "--target-itl-ms",
    type=click.FloatRange(0),
    default=100.0,
    help="Inter-token time that running requests keep while prompts are computed, if it can be; 0: no target.",
)
@click.option(
    "--max-preemptions",
    type=click.IntRange(0),
    default=3,
    help="Times that a request may lose its place to another one; then it comes back only when it can stay to its end. 0: as"
    " often as need be.",
)
@click.option(
    "--max-unread-tokens",
    type=click.IntRange(1),
    default=1024,
    help="Tokens of an output that its reader has not taken, before it stops being computed.",
)
@click.option("--no-prefix-caching", is_flag=True, help="Compute every prompt in whole.")
@click.option(
    "--oldest-every", type=click.IntRange(1), default=16, help="One admission in so many goes to whoever has waited longest."
)
@click.option(
    "--tenant",
    "tenants",
    multiple=True,
    metavar="NAME[:LIMIT=N]…",
    help="A tenant's limits: weight, its share against the others'; blocks, its most KV blocks; requests, most at a time; rate,"
    " most a second. May be given several times; *: everybody who is not listed. Without *, once one is given, nobody else is"
    " served. [default: weight 1 and no other limit for everybody]",
)
@click.option("--record", metavar="FILE", help="Write all that the core is told and plans, for `carousel replay`.")
@click.option("--record-limit-mib", type=click.FloatRange(1), help="The recording ends at this size.")
@click.option("--max-model-len", type=click.IntRange(2), help="Tokens of prompt and output together. [default: the model's]")
@click.option("--block-size", type=click.IntRange(16, 128), default=16, help="Tokens of one KV-cache block.")
@click.option("--num-blocks", type=click.IntRange(1), help="Blocks of the KV cache. [default: what the memory allows]")
@click.option(
    "--kv-memory-gib", type=click.FloatRange(0, min_open=True), help="Memory of the KV cache, instead of --num-blocks."
)
@click.option("--swap-gib", type=click.FloatRange(0), help="Host memory for preempted requests. [default: the worker's choice]")
@click.option("--threads", type=click.IntRange(1), help="Threads of the CPU worker. [default: one per core]")
@click.option(
    "--drain-timeout", type=click.FloatRange(0), default=30.0, help="Seconds that running requests get after SIGTERM or Ctrl-C."
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
def serve_command(**options: object) -> int:
    """Serve a model: one scheduler with its gRPC front ends, and one worker."""
    from scheduler.supervisor import serve

    try:
        config = config_from(options)
    except ValueError as error:
        print(f"carousel: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(serve(config))


# Options that only the worker reads.
_WORKER_OPTIONS = (
    "device",
    "dtype",
    "quantization",
    "weights",
    "max_model_len",
    "block_size",
    "num_blocks",
    "kv_memory_gib",
    "swap_gib",
    "threads",
    "max_batch_rows",
    "max_step_tokens",
)


def config_from(options: dict[str, object]) -> ServeConfig:
    """The configuration for these options. Raises ValueError when they contradict one another."""
    _check(options)
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
            "max_preemptions",
            "max_unread_tokens",
            "oldest_every",
        )
    }
    core |= {name: most for name, most in _MOST.items() if core[name] is None}
    core["target_itl_ns"] = round(float(str(options["target_itl_ms"])) * 1e6)
    core["prefix_caching"] = not options["no_prefix_caching"]
    core["tenants"] = tuple(_tenant(text) for text in cast(tuple[str, ...], options["tenants"]))
    model = str(options["model"])
    return ServeConfig(
        core=CoreConfig(**core),  # type: ignore[arg-type]
        model=model,
        revision=options["revision"],  # type: ignore[arg-type]
        served_model_name=str(options["served_model_name"] or Path(model).name or model),
        host=str(options["host"]),
        port=int(str(options["port"])),
        frontends=int(str(options["frontends"])),
        tls=_tls(options),
        key_file=str(options["tokens"] or ""),
        drain_timeout_s=float(str(options["drain_timeout"])),
        log_level=str(options["log_level"]),
        record=str(options["record"] or ""),
        record_limit_mib=float(str(options["record_limit_mib"] or 0)),
        worker_options=tuple(worker_options),
    )


def _tls(options: dict[str, object]) -> TlsFiles | None:
    certificate, key, client_ca = (str(options[name] or "") for name in ("tls_cert", "tls_key", "tls_client_ca"))
    if not (certificate or key or client_ca):
        return None
    if not (certificate and key):
        raise ValueError("TLS needs --tls-cert and --tls-key together; --tls-client-ca goes with them")
    return TlsFiles(certificate=certificate, key=key, client_ca=client_ca)


_MOST = {"max_batch_rows": 4096, "max_step_tokens": 65_536}  # where the user has set none, the worker's own are lower


def _check(options: dict[str, object]) -> None:
    """What CoreConfig can't know: which limits the user has set against one another."""
    at_most = (
        ("max_batch_rows", "max_step_tokens", "each sequence computes at least one token in a step"),
        ("static_batch_size", "max_batch_rows", "a static batch can't have more rows than there are"),
        ("static_batch_size", "max_step_tokens", "each sequence computes at least one token in a step"),
    )
    for less, more, why in at_most:
        if None not in (options[less], options[more]) and int(str(options[less])) > int(str(options[more])):
            names = [f"--{name.replace('_', '-')} {options[name]}" for name in (less, more)]
            raise ValueError(f"{names[0]} is more than {names[1]}: {why}")
    if options["num_blocks"] is not None and options["kv_memory_gib"] is not None:
        raise ValueError("--num-blocks and --kv-memory-gib both say how large the KV cache is: give one of them")
    if options["record_limit_mib"] is not None and not options["record"]:
        raise ValueError("--record-limit-mib is the size of a recording: say where with --record FILE")


_LIMITS = {"weight": "weight", "blocks": "max_blocks", "requests": "max_requests", "rate": "max_requests_per_s"}


def _tenant(text: str) -> TenantLimits:
    """NAME, and its limits."""
    name, *limits = text.split(":")
    numbers: dict[str, int] = {}
    for limit in limits:
        key, _, number = limit.partition("=")
        if key not in _LIMITS or key in numbers or not number.isdecimal():
            form = "".join(f"[:{key}=N]" for key in _LIMITS)
            raise ValueError(f"--tenant {text}: write it as NAME{form}, where N are whole numbers")
        numbers[key] = int(number)
    return TenantLimits(name, **{_LIMITS[key]: number for key, number in numbers.items()})
