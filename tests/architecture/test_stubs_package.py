"""The stubs' own package (protos/pyproject.toml) and the project's: both ask for what the generated code wants, no less."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "protos" / "carousel" / "v1"


def project(path: str) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / path).read_text())["project"]
    return found


@pytest.mark.parametrize("path", ["pyproject.toml", "protos/pyproject.toml"])
def test_the_lowest_grpcio_and_protobuf_are_those_that_the_stubs_accept(path: str) -> None:
    """Older ones refuse them when they are imported."""
    dependencies = project(path)["dependencies"]
    [grpcio] = {re.findall(r"GRPC_GENERATED_VERSION = '(.*)'", stub.read_text())[0] for stub in STUBS.glob("*_pb2_grpc.py")}
    [protobuf] = {
        ".".join(re.findall(r"Domain\.PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+)", stub.read_text())[0])
        for stub in STUBS.glob("*_pb2.py")
    }
    assert f"grpcio>={grpcio}" in dependencies and f"protobuf>={protobuf}" in dependencies


def test_both_packages_are_of_one_release() -> None:
    ours, stubs = project("pyproject.toml"), project("protos/pyproject.toml")
    assert [ours[name] for name in ("version", "license", "requires-python")] == [
        stubs[name] for name in ("version", "license", "requires-python")
    ]


def test_every_file_says_where_go_and_java_put_it() -> None:
    for path in STUBS.glob("*.proto"):
        options = dict(re.findall(r"^option (\w+) = (\".*?\"|\w+);", path.read_text(), re.MULTILINE))
        assert options == {
            "go_package": '"carousel/v1;carouselv1"',
            "java_multiple_files": "true",
            "java_outer_classname": f'"{path.stem.capitalize()}Proto"',
            "java_package": '"carousel.v1"',
        }
