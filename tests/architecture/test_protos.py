"""The public .proto files: every line of the contract says what it means, and the committed stubs are theirs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "protos" / "carousel").rglob("*.proto"))
OUR_OWN = [path for path in PROTOS if path.parent.name == "v1"]  # the others keep the names of a public protocol
# A field, an entry of a oneof, a value of an enum, or an rpc.
DECLARATION = re.compile(r"^\s*(rpc \w+|((optional|repeated) )?[\w.<>, ]+ \w+ = \d+|[A-Z][A-Z0-9_]* = \d+)")


def declarations(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text().splitlines()
    return [(number, line) for number, line in enumerate(lines) if DECLARATION.match(line)]


def test_there_are_proto_files() -> None:
    assert {path.name for path in PROTOS} >= {"generation.proto", "control.proto", "inspect.proto"}
    assert sum(len(declarations(path)) for path in PROTOS) > 100


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_every_field_rpc_and_enum_value_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    bare = [
        f"{path.name}:{number + 1}: {line.strip()}"
        for number, line in declarations(path)
        if not lines[number - 1].strip().startswith("//") and "//" not in line
    ]
    assert not bare, "\n".join(bare)


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_files_import_only_protobuf_and_each_other(path: Path) -> None:
    imports = re.findall(r'^import (?:public )?"([^"]+)"', path.read_text(), re.MULTILINE)
    assert all(name.startswith(("google/protobuf/", "carousel/v1/")) for name in imports)


@pytest.mark.parametrize("path", OUR_OWN, ids=lambda path: path.name)
def test_every_enum_begins_with_unspecified_and_carries_its_name_as_prefix(path: Path) -> None:
    for name, body in re.findall(r"enum (\w+) \{(.*?)\}", path.read_text(), re.DOTALL):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper() + "_"
        values = re.findall(r"^\s*([A-Z0-9_]+) = (\d+);", body, re.MULTILINE)
        assert values[0] == (f"{prefix}UNSPECIFIED", "0"), name
        assert all(value.startswith(prefix) for value, _ in values), name


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_no_number_is_used_twice_in_a_message(path: Path) -> None:
    for name, body in re.findall(r"(?:message|enum) (\w+) \{(.*?)^\}", path.read_text(), re.DOTALL | re.MULTILINE):
        if "message " in body or "enum " in body:
            continue  # nested: protoc checks those
        numbers = re.findall(r" = (\d+)(?: \[[^\]]*\])?;", body)
        assert len(set(numbers)) == len(numbers), name


def test_the_committed_stubs_are_those_of_the_proto_files() -> None:
    command = [sys.executable, str(ROOT / "protos" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
