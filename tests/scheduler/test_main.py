"""The options of the service: what they come to, and which contradict one another."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest

from client.cli import serve as carousel_serve
from scheduler.config import ServeConfig
from scheduler.core import CoreConfig, policies
from scheduler.core.config import TenantLimits
from scheduler.errors import StartError
from scheduler.main import config_from, serve_command
from scheduler.supervisor import check_extras, reserve_recording
from worker.config import DEVICES, DTYPES, QUANTIZATIONS, WorkerConfig


def config(*options: str) -> ServeConfig:
    return config_from(serve_command.make_context("serve", ["--model", "some/model", *options]).params)


def test_without_options_the_core_has_its_own_defaults() -> None:
    core = config().core
    assert replace(core, max_batch_rows=64, max_step_tokens=512) == CoreConfig()
    assert config().record == "" and config().served_model_name == "model"


def test_every_option_of_the_core_arrives() -> None:
    core = config(
        *("--policy", "prefill_first", "--max-batch-rows", "8", "--max-step-tokens", "128", "--static-batch-size", "4"),
        *("--max-queue-requests", "5", "--max-queue-tokens", "6", "--target-itl-ms", "12.5", "--max-preemptions", "7"),
        *("--max-unread-tokens", "9", "--no-prefix-caching", "--oldest-every", "3"),
        *("--tenant", "a:rate=9:weight=2:blocks=100:requests=8", "--tenant", "b", "--tenant", "*:weight=1"),
    ).core
    assert core == CoreConfig(
        policy="prefill_first",
        max_batch_rows=8,
        max_step_tokens=128,
        static_batch_size=4,
        max_queue_requests=5,
        max_queue_tokens=6,
        target_itl_ns=12_500_000,
        max_preemptions=7,
        max_unread_tokens=9,
        prefix_caching=False,
        oldest_every=3,
        tenants=(TenantLimits("a", 2, 100, 8, 9), TenantLimits("b"), TenantLimits("*")),
    )


@pytest.mark.parametrize("command", [serve_command, carousel_serve], ids=["scheduler", "carousel"])
@pytest.mark.parametrize(("name", "choices"), [("dtype", DTYPES), ("device", DEVICES), ("quantization", QUANTIZATIONS)])
def test_what_a_worker_can_do_can_be_chosen(command: click.Command, name: str, choices: tuple[str, ...]) -> None:
    [option] = [parameter for parameter in command.params if parameter.name == name]
    assert isinstance(option.type, click.Choice) and tuple(option.type.choices) == choices


@pytest.mark.parametrize("command", [serve_command, carousel_serve], ids=["scheduler", "carousel"])
def test_all_policies_can_be_chosen_and_no_others(command: click.Command) -> None:
    [option] = [parameter for parameter in command.params if parameter.name == "policy"]
    assert isinstance(option.type, click.Choice)
    for name in option.type.choices:
        assert policies.by_name(name).name == name
    with pytest.raises(ValueError, match=", ".join(option.type.choices)):
        policies.by_name("another")


def test_carousel_serve_has_the_options_that_matter_and_the_scheduler_takes_all_of_them() -> None:
    theirs = {word for parameter in serve_command.params for word in parameter.opts}
    mine = {word for parameter in carousel_serve.params for word in parameter.opts if word.startswith("--")}
    assert mine <= theirs
    assert mine >= {"--record", "--tenant", "--target-itl-ms", "--swap-gib", "--no-prefix-caching"}


def test_as_many_workers_compute_as_are_started_here_unless_more_may_come() -> None:
    assert (config().workers, config().max_groups) == (1, 1)
    assert (config("--workers", "3").workers, config("--workers", "3").max_groups) == (3, 3)
    assert (config("--max-groups", "16").workers, config("--max-groups", "16").max_groups) == (1, 16)


def test_a_limit_that_is_given_alone_holds() -> None:
    few = config("--max-step-tokens", "32")
    assert few.core.max_step_tokens == 32 and "--max-batch-rows" not in few.worker_options
    many = config("--max-batch-rows", "1024")
    assert many.core.max_batch_rows == 1024 and "1024" in many.worker_options


def test_without_limits_the_workers_own_hold() -> None:
    free = config()
    assert not {"--max-batch-rows", "--max-step-tokens"} & set(free.worker_options)
    rows, tokens = WorkerConfig(connect="ipc://x", device="sim").limits("cuda")
    assert rows < free.core.max_batch_rows and tokens < free.core.max_step_tokens


def test_the_worker_gets_its_options() -> None:
    options = config("--device", "cpu", "--swap-gib", "1.5", "--num-blocks", "77", "--quantization", "int8").worker_options
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert (given["--swap-gib"], given["--num-blocks"], given["--device"]) == ("1.5", "77", "cpu")
    assert given["--quantization"] == "int8"
    assert "--kv-memory-gib" not in given


def test_a_worker_is_deterministic_when_that_was_asked_for() -> None:
    assert config("--deterministic").worker_options.count("--deterministic") == 1
    assert "--deterministic" not in config().worker_options
    with pytest.raises(ValueError, match="--deterministic is for workers, and with --inner-address none starts here"):
        config("--deterministic", "--inner-address", "tcp://h:1", "--inner-keys", "k")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--max-batch-rows 100 --max-step-tokens 50", "--max-batch-rows 100 is more than --max-step-tokens 50"),
        ("--static-batch-size 65 --max-batch-rows 64", "--static-batch-size 65 is more than --max-batch-rows 64"),
        ("--num-blocks 5 --kv-memory-gib 1", "both say how large"),
        ("--workers 3 --max-groups 2", "--workers 3 is more than --max-groups 2"),
        ("--workers 2 --inner-address tcp://127.0.0.1:1 --inner-keys d", "start them there, with --max-groups"),
        ("--standby 1 --max-groups 2", "nobody stands by as long as fewer than --max-groups 2 compute"),
        ("--record-limit-mib 5", "--record FILE"),
        ("--journal-fsync always", "--journal DIR"),
        ("--journal-limit-mib 64", "--journal DIR"),
        ("--journal d --journal-fsync hourly", "never, always or interval:MS"),
        ("--otlp-endpoint 127.0.0.1:4317", "write it with http:// or https://"),
        ("--tenant a --tenant a:weight=2", "listed twice"),
        ("--tenant a:weight=0", "weight is at least 1"),
        ("--tenant a:weigth=3", "NAME[:weight=N][:blocks=N][:requests=N][:rate=N]"),
        ("--tenant a:weight=3:weight=4", "NAME[:weight=N][:blocks=N][:requests=N][:rate=N]"),
        ("--tenant a:blocks=many", "NAME[:weight=N][:blocks=N][:requests=N][:rate=N]"),
        ("--tenant :weight=3", "needs a name"),
    ],
)
def test_limits_that_contradict_one_another_are_one_line(options: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(*options.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_process_says_it_in_one_line_and_exits_with_2() -> None:
    command = [sys.executable, "-m", "client", "serve", "--model", "x", "--tenant", "a", "--tenant", "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "listed twice" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "--model x --bogus",
        "--model x --num-blocks 0",
        "",
        "--model x --record r --record-limit-mib 0.5",
        "replay",
        "replay f --seeds",
    ],
)
def test_wrong_usage_behind_the_dashes_is_one_line_too(arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "scheduler", *arguments.split()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("carousel: ") and done.stderr.endswith("--help`\n")


def test_tracing_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    check_extras(config("--otlp-endpoint", "http://127.0.0.1:4317"))
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(StartError, match=r"pip install 'carousel-serve\[tracing\]'"):
        check_extras(config("--otlp-endpoint", "http://127.0.0.1:4317"))
    check_extras(config())


def test_the_configuration_is_printed_and_nothing_started() -> None:
    command = [sys.executable, "-m", "client", "serve", "--device", "sim", "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and 'device = "sim"  # --device' in done.stdout.splitlines()
    assert "# model =  # default: none" in done.stdout and done.stderr == ""


def test_a_recording_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    reserve_recording("")
    reserve_recording(str(path))
    assert path.stat().st_size == 0 and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StartError, match="already"):
        reserve_recording(str(path))
    with pytest.raises(StartError, match="No such file or directory"):
        reserve_recording(str(tmp_path / "nowhere" / "a.rec"))
