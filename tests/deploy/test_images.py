"""The Dockerfile and its helper: targets, users, pins. Without an engine; docs/log.md tells what a real one made of it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
JOINED = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
LINES = [line for line in JOINED.splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FINAL = ("scheduler", "worker-cpu", "worker-cuda", "client")


def stages() -> dict[str, tuple[str, list[str]]]:
    """By name: what it is made from, and its instructions."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in LINES:
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            current = found[match[2]] = (match[1], [])
        elif found:
            current[1].append(line)
    return found


def whole(name: str) -> list[str]:
    """The instructions of a stage and of those below it."""
    base, own = stages()[name]
    return (whole(base) if base in stages() else []) + own


def instructions(name: str, word: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in whole(name) if line.startswith(f"{word} ")]


@pytest.fixture(scope="module")
def image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_image", ROOT / "deploy" / "image.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its pool looks for it there
    spec.loader.exec_module(module)
    return module


def test_all_four_images_are_there_and_nothing_is_pulled_but_python() -> None:
    assert set(FINAL) <= stages().keys()
    assert {base for base, _ in stages().values()} - stages().keys() == {"python:${PYTHON}-slim"}
    assert not any(line.startswith("# syntax") for line in (ROOT / "Dockerfile").read_text().splitlines())


@pytest.mark.parametrize("name", FINAL)
def test_an_image_runs_as_a_user_by_an_exec_form_and_installs_nothing_itself(name: str) -> None:
    assert instructions(name, "USER")[-1] == "10001:10001"
    [entrypoint] = instructions(name, "ENTRYPOINT")
    assert json.loads(entrypoint)[0] in ("carousel", "python")
    assert not re.search(r"\b(apt-get|pip|gcc)\b", " ".join(instructions(name, "RUN"))), "compilers and pip stay in the build"


def test_the_scheduler_asks_the_health_service_and_takes_no_torch() -> None:
    [check] = instructions("scheduler", "HEALTHCHECK")
    assert json.loads(check.partition("CMD ")[2])[:2] == ["carousel", "health"]
    assert not instructions("worker-cpu", "HEALTHCHECK")
    assert "--from=service /opt/carousel /opt/carousel" in instructions("scheduler", "COPY")
    assert "torch" not in " ".join(whole("service"))


@pytest.mark.parametrize("name", ["service", "cpu", "cuda"])
def test_what_is_installed_is_constrained(name: str) -> None:
    installs = [part for line in instructions(name, "RUN") for part in line.split("&&") if "/bin/python install" in part]
    assert installs
    for part in installs:
        assert re.search(r" -c (constraints|versions)\.txt ", part) or "--no-deps --no-index" in part, part


def test_requirements_are_those_of_the_project(image: ModuleType) -> None:
    told = image.requirements(ROOT / "pyproject.toml", ["worker"])
    assert told == [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["worker"]]


def test_what_is_not_pinned_is_found(image: ModuleType, tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, version in (("Torch", "2.13.0+cpu"), ("type_ing", "1.0"), ("other", "2.0"), ("nvidia-nccl-cu13", "2.29")):
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    (tmp_path / "constraints.txt").write_text("# a comment\ntorch==2.13.0\ntype-ing==1.0\nother==2.1\n")
    assert image.strangers(tmp_path, image.pinned(tmp_path / "constraints.txt")) == ["other==2.0"]


def test_the_same_time_for_all_files_and_compiled_code_that_does_not_ask_for_it(image: ModuleType, tmp_path: Path) -> None:
    module = tmp_path / "lib" / "thing.py"
    module.parent.mkdir()
    module.write_text("x = 1\n")
    image.finish(tmp_path)
    assert module.stat().st_mtime == 315_532_800
    [compiled] = module.parent.glob("__pycache__/*.pyc")
    assert int.from_bytes(compiled.read_bytes()[4:8], "little") == 0b01, "by its hash, which nobody checks"


def test_what_is_copied_is_sent_to_the_engine() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line.removeprefix("!").split("/**")[0] for line in lines if line.startswith("!")]
    copies = [line.split()[1:-1] for _, own in stages().values() for line in own if line.startswith("COPY ")]
    copied = {source.rstrip("/") for sources in copies for source in sources if not source.startswith(("-", "/", "$"))}
    assert copied <= set(sent), copied - set(sent)
    assert all((ROOT / path).exists() for path in sent)


def test_the_helper_runs_where_nothing_is_installed() -> None:
    imported = re.findall(r"^(?:from|import) (\w+)", (ROOT / "deploy" / "image.py").read_text(), re.MULTILINE)
    assert set(imported) <= sys.stdlib_module_names


def test_ports_and_images_agree_with_compose() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for service in services.values():
        if "build" in service:
            assert service["build"]["target"] in FINAL and service["image"].startswith(
                f"carousel-{service['build']['target']}:"
            )
    assert instructions("scheduler", "EXPOSE") == ["50051 7000 9464"]
