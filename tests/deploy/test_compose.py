"""docker-compose.yml: what is open, what is writable, which options are given, which variables there are. Without an engine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from scheduler.main import serve_command
from scheduler.settings import keys, variable
from worker.main import parse

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
WORKERS = {name: service for name, service in OURS.items() if name.startswith("worker")}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

_VARIABLE = re.compile(r"\$\{(\w+)(?::?[-?][^}]*)?\}")
_SETTING = re.compile(r"^#?(\w+)=", re.MULTILINE)


def filled(text: str) -> str:
    """With the defaults of its variables, as without an .env."""
    return re.sub(r"\$\{\w+(?::?-([^}]*))?\}", lambda match: match[1] or "", text)


def command(service: dict[str, Any]) -> list[str]:
    return [filled(part) for part in service["command"]]


def test_nothing_of_ours_can_write_elsewhere_or_gain_rights() -> None:
    assert {"keys", "scheduler", "worker", "worker-gpu", "worker-sim", "client"} == OURS.keys()
    for name, service in OURS.items():
        assert service["read_only"] is True and service["tmpfs"] == ["/tmp"], name
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert "user" not in service and "privileged" not in service, name


def test_everything_that_is_published_is_on_loopback() -> None:
    published = {name: port for name, service in SERVICES.items() for port in service.get("ports", [])}
    assert published.keys() == {"scheduler", "prometheus", "grafana", "jaeger"}, "and no port of a worker, which may be several"
    assert all(port.startswith("127.0.0.1:") for port in published.values()), published
    assert filled(published["scheduler"]) == "127.0.0.1:50051:50051"


def test_scheduler_and_cpu_worker_start_by_themselves_all_others_by_a_profile() -> None:
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert {name for name, wanted in profiles.items() if not wanted} == {"keys", "scheduler", "worker"}
    assert profiles["worker-gpu"] == ["gpu"] and profiles["worker-sim"] == ["sim"]
    assert profiles["prometheus"] == profiles["grafana"] == profiles["jaeger"] == ["observability"]


def test_services_can_be_scaled_and_come_back() -> None:
    for name, service in SERVICES.items():
        assert "container_name" not in service, name
        if name not in ("keys", "client"):
            assert service["restart"] == "unless-stopped", name


def test_the_gpu_is_asked_for() -> None:
    [device] = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_the_options_of_the_scheduler_are_options_and_agree_with_the_image() -> None:
    options = command(SERVICES["scheduler"])
    parsed = serve_command.make_context("serve", options).params
    assert (parsed["host"], parsed["port"], parsed["metrics_port"]) == ("0.0.0.0", 50051, 9464)
    assert parsed["inner_address"].rsplit(":", 1)[1] == "7000"
    assert float(SERVICES["scheduler"]["stop_grace_period"].removesuffix("s")) >= parsed["drain_timeout"] + 10
    for name in SERVICES["scheduler"]["environment"]:
        if name.startswith("CAROUSEL_"):
            assert name in {variable(key) for key in keys(serve_command)}, name


@pytest.mark.parametrize("name", sorted(WORKERS))
def test_the_options_of_each_worker_are_options(name: str) -> None:
    config, _, _ = parse(command(SERVICES[name]))
    assert config.connect == "tcp://scheduler:7000" and config.model == "/model" and config.keys == "/keys/worker"


def test_each_side_of_the_link_sees_its_own_keys_only_and_cannot_change_them() -> None:
    def mounts(name: str) -> list[str]:
        return [volume for volume in SERVICES[name]["volumes"] if "keys" in volume]

    assert mounts("scheduler") == ["core-keys:/keys/core:ro"]
    for name in WORKERS:
        assert mounts(name) == ["worker-keys:/keys/worker:ro"], name
        assert SERVICES[name]["depends_on"]["keys"]["condition"] == "service_completed_successfully"
    assert SERVICES["keys"]["network_mode"] == "none"


def test_workers_are_stopped_after_the_scheduler_which_drains() -> None:
    assert WORKERS.keys() <= SERVICES["scheduler"]["depends_on"].keys()
    assert all("scheduler" not in service["depends_on"] for service in WORKERS.values())


def test_volumes_are_declared_and_used() -> None:
    mounted = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    named = {name for name in mounted if not name.startswith((".", "$"))}
    assert named == COMPOSE["volumes"].keys()
    for folder in (name for name in mounted if name.startswith(".")):
        assert (ROOT / folder).is_dir(), folder


def test_images_have_this_version_or_a_pinned_one() -> None:
    for name, service in SERVICES.items():
        tag = service["image"].rpartition(":")[2]
        assert tag == VERSION if name in OURS else re.fullmatch(r"v?\d+\.\d+\.\d+", tag), name


def test_every_variable_is_documented_and_every_documented_one_is_used() -> None:
    environments = [service.get("environment", {}) for service in SERVICES.values()]
    handed_on = {name for each in environments for name, value in each.items() if value is None}
    documented = set(_SETTING.findall((ROOT / ".env.example").read_text()))
    assert {*_VARIABLE.findall(TEXT)} | handed_on | {"COMPOSE_PROFILES"} == documented


def test_the_defaults_of_the_variables_are_those_that_are_documented() -> None:
    documented = dict(
        line.lstrip("#").split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if "=" in line
    )
    for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT):
        assert default in (documented[name], "/model"), name
