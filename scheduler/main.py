"""The options of the service, checked and made into its configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import click

from scheduler.config import ServeConfig
from scheduler.core import CoreConfig
from scheduler.core.config import TenantLimits
from scheduler.frontend.config import TlsFiles
from scheduler.journal import Fsync
from scheduler.settings import ConfiguredCommand, load_file, printed, sources


@click.command(cls=ConfiguredCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    callback=load_file,
    help="TOML file of options, each by its name with _ for -, as in max_batch_rows = 32. A flag goes before a variable of the"
    " environment (CAROUSEL_MAX_BATCH_ROWS), that before the file, and that before the default.",
)
@click.option("--print-config", is_flag=True, help="Print all options, each with where its value comes from, and end.")
@click.option("--model", metavar="DIR_OR_HUB_ID", help="Checkpoint directory, or a model id of the Hugging Face hub.")
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
@click.option(
    "--deterministic",
    is_flag=True,
    help="A request's tokens are the same, exactly, in any company and after any preemption or crash. On a CPU, in float32,"
    " slower.",
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
@click.option(
    "--journal",
    metavar="DIR",
    help="Keep requests with a resume window and their tokens here: they outlive the scheduler, and go on where they were after"
    " it, or the whole server, was killed. [default: they do not]",
)
@click.option(
    "--journal-fsync",
    metavar="never|interval:MS|always",
    help="When the journal is forced to the disk, which guards against loss of power, not against a kill. [default: never]",
)
@click.option("--journal-limit-mib", type=click.FloatRange(8), help="Size of the journal. [default: 128]")
@click.option("--max-model-len", type=click.IntRange(2), help="Tokens of prompt and output together. [default: the model's]")
@click.option("--block-size", type=click.IntRange(16, 128), default=16, help="Tokens of one KV-cache block.")
@click.option("--num-blocks", type=click.IntRange(1), help="Blocks of the KV cache. [default: what the memory allows]")
@click.option(
    "--kv-memory-gib", type=click.FloatRange(0, min_open=True), help="Memory of the KV cache, instead of --num-blocks."
)
@click.option("--swap-gib", type=click.FloatRange(0), help="Host memory for preempted requests. [default: the worker's choice]")
@click.option("--threads", type=click.IntRange(1), help="Threads of the CPU worker. [default: one per core]")
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    help="Workers to start here, each with the model and a KV cache of its own; requests go where their beginning is known, and"
    " where least waits.",
)
@click.option(
    "--max-groups",
    type=click.IntRange(1, 64),
    help="Workers that compute at a time, those that join from elsewhere too; further ones stand by. [default: --workers]",
)
@click.option(
    "--standby",
    type=click.IntRange(0, 8),
    default=0,
    help="More workers that load the model and wait; one takes over at once when the worker is lost. Each needs its memory.",
)
@click.option(
    "--worker-timeout",
    type=click.FloatRange(1),
    default=2.0,
    help="Seconds without a heartbeat of the worker, or of a step that uses no processor time, after which it is lost.",
)
@click.option(
    "--step-timeout",
    type=click.FloatRange(0),
    default=0.0,
    help="Seconds that one step may take before the worker is lost; 0: any time. For GPUs, whose steps use no processor.",
)
@click.option(
    "--inner-address",
    metavar="tcp://HOST:PORT",
    help="Workers on other machines join here, encrypted; none is started on this one. Needs --inner-keys.",
)
@click.option("--inner-keys", metavar="DIR", help="Its keys, as `carousel keys` makes them.")
@click.option(
    "--drain-timeout", type=click.FloatRange(0), default=30.0, help="Seconds that running requests get after SIGTERM or Ctrl-C."
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", help="Of the lines on stderr; json: an object a line."
)
@click.option("--no-request-log", is_flag=True, help="No line for each request that ends.")
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Port of http://HOST:PORT/metrics for Prometheus; 0: any free one. [default: none, nothing is measured]",
)
@click.option(
    "--metrics-host", default="127.0.0.1", help="Address to serve metrics on. They name tenants, and everybody may read them."
)
@click.option(
    "--otlp-endpoint",
    metavar="URL",
    help="Send a trace of each request to this OpenTelemetry collector (gRPC), as http://127.0.0.1:4317. Needs the extra"
    " `tracing`. [default: no tracing]",
)
@click.pass_context
def serve_command(ctx: click.Context, /, **options: object) -> int:
    """Serve a model: one scheduler with its gRPC front ends, and its workers."""
    from scheduler.supervisor import serve

    if options["model"] is None and not options["print_config"]:
        raise click.UsageError("say what to serve with --model DIR_OR_HUB_ID", ctx)
    try:
        config = config_from(options, sources(ctx))
    except ValueError as error:
        print(f"carousel: {error}", file=sys.stderr)
        sys.exit(2)
    if options["print_config"]:
        print("\n".join(printed(ctx)))
        return 0
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
    "log_level",
    "log_format",
)


def config_from(options: dict[str, object], came_from: dict[str, str] | None = None) -> ServeConfig:
    """The configuration for these options. came_from: of those that were set, where. Raises ValueError when they contradict
    one another."""
    _check(options)
    worker_options: list[str] = []
    for name in _WORKER_OPTIONS:
        if options[name] is not None:
            worker_options += [f"--{name.replace('_', '-')}", str(options[name])]
    if options["deterministic"]:
        worker_options.append("--deterministic")
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
    model = str(options["model"] or "")
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
        log_format=str(options["log_format"]),
        request_log=not options["no_request_log"],
        metrics_host=str(options["metrics_host"]),
        metrics_port=cast(int | None, options["metrics_port"]),
        otlp_endpoint=str(options["otlp_endpoint"] or ""),
        chosen=_chosen(options, came_from or {}),
        record=str(options["record"] or ""),
        record_limit_mib=float(str(options["record_limit_mib"] or 0)),
        workers=int(str(options["workers"])),
        max_groups=int(str(options["max_groups"] or options["workers"])),
        standby=int(str(options["standby"])),
        worker_timeout_s=float(str(options["worker_timeout"])),
        step_timeout_s=float(str(options["step_timeout"])),
        inner_address=str(options["inner_address"] or ""),
        inner_keys=str(options["inner_keys"] or ""),
        journal=str(options["journal"] or ""),
        journal_fsync=str(options["journal_fsync"] or "never"),
        journal_limit_mib=float(str(options["journal_limit_mib"] or 128)),
        worker_options=tuple(worker_options),
    )


def _chosen(options: dict[str, object], came_from: dict[str, str]) -> tuple[str, ...]:
    """Each option that was set, for the log: its value and where it was set."""
    values = options | {"tenant": " ".join(cast(tuple[str, ...], options["tenants"]))}
    return tuple(f"{key}={values[key]} ({where})" for key, where in came_from.items())


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
    address = str(options["inner_address"] or "")
    if bool(address) != bool(options["inner_keys"]):
        raise ValueError("--inner-address and --inner-keys go together: a link that leaves this machine is encrypted")
    if address and not address.startswith("tcp://"):
        raise ValueError(f"--inner-address {address}: write it as tcp://HOST:PORT")
    if address and options["standby"]:
        raise ValueError("--standby starts workers here, and with --inner-address none is: start one more there")
    if address and options["deterministic"]:
        raise ValueError("--deterministic is for workers, and with --inner-address none starts here: give it to each of them")
    if address and int(str(options["workers"])) > 1:
        raise ValueError("--workers starts workers here, and with --inner-address none is: start them there, with --max-groups")
    workers, max_groups = int(str(options["workers"])), int(str(options["max_groups"] or options["workers"]))
    if workers > max_groups:
        raise ValueError(f"--workers {workers} is more than --max-groups {max_groups}: each computes for a group of its own")
    if options["standby"] and max_groups > workers:
        raise ValueError(f"--standby: nobody stands by as long as fewer than --max-groups {max_groups} compute")
    if options["num_blocks"] is not None and options["kv_memory_gib"] is not None:
        raise ValueError("--num-blocks and --kv-memory-gib both say how large the KV cache is: give one of them")
    endpoint = options["otlp_endpoint"]
    if endpoint is not None and not str(endpoint).startswith(("http://", "https://")):
        raise ValueError(f"--otlp-endpoint {endpoint}: write it with http:// or https://, as in http://127.0.0.1:4317")
    if options["record_limit_mib"] is not None and not options["record"]:
        raise ValueError("--record-limit-mib is the size of a recording: say where with --record FILE")
    for name in ("journal_fsync", "journal_limit_mib"):
        if options[name] is not None and not options["journal"]:
            raise ValueError(f"--{name.replace('_', '-')} is about a journal: say where with --journal DIR")
    Fsync(str(options["journal_fsync"] or "never"))


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
