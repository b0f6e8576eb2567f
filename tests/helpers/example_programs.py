"""Makes the programs of examples/ ready to run, each with its own language's tools, and runs them.

What a machine lacks (a compiler, a package index) is a reason to skip. What our own files get wrong is a failure.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PROTOS = ROOT / "protos"
PUBLIC = sorted(str(path) for path in (PROTOS / "carousel" / "v1").glob("*.proto"))
JARS = Path("/usr/share/java")  # Debian's
GO_SOURCES = Path("/usr/share/gocode")  # Debian's
INSTALL_S, BUILD_S, RUN_S = 150, 120, 60
# No proxy is meant for the loopback, and none of our own folders for their Python.
ENVIRONMENT = {**os.environ, "PIP_USER": "0", "no_proxy": "127.0.0.1", "no_grpc_proxy": "127.0.0.1"}
ENVIRONMENT.pop("PYTHONPATH", None)


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def build(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    done = _call(*command, cwd=cwd, timeout_s=BUILD_S, environment=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def fetch(*command: str | Path, cwd: Path = ROOT) -> None:
    """From a package index: skips where there is none."""
    done = _call(*command, cwd=cwd, timeout_s=INSTALL_S, environment={})
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        pytest.skip(f"{command[0]} can't install: {said[-1] if said else done.returncode}")


def run(command: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    return _call(*command, *options, cwd=ROOT, timeout_s=RUN_S, environment={})


def start(command: list[str], *options: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *options], env=ENVIRONMENT, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True
    )


def _call(*command: str | Path, cwd: Path, timeout_s: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# ------------------------------------------------------------------------------------------- the programs, as commands


def python_with_stubs(folder: Path) -> Path:
    """An interpreter that has the stubs' package and what that asks for, at the lowest releases it allows; nothing else."""
    project = (PROTOS / "pyproject.toml").read_text()
    lowest = re.findall(r'"(grpcio|protobuf)>=([0-9.]+)"', project)
    assert len(lowest) == 2
    interpreter = folder / "bin" / "python"
    build(sys.executable, "-m", "venv", folder)
    fetch(interpreter, "-m", "pip", "install", "--no-input", *(f"{name}=={version}" for name, version in lowest))
    build(interpreter, "-m", "pip", "install", "--no-input", "./protos")
    return interpreter


def node(cache: Path) -> list[str]:
    """The program copied beside the modules that its lock file names, with the .proto files where it looks for them."""
    need("node", "npm")
    lock = hashlib.sha256((EXAMPLES / "node" / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = cache / lock / "examples" / "node"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json", "generate.js"):
        shutil.copyfile(EXAMPLES / "node" / name, folder / name)
    shutil.copytree(PROTOS / "carousel" / "v1", cache / lock / "protos" / "carousel" / "v1", dirs_exist_ok=True)
    is_installed = folder / "is_installed"
    if not is_installed.exists():
        fetch("npm", "ci", "--no-audit", "--no-fund", cwd=folder)
        is_installed.touch()
    return ["node", str(folder / "generate.js")]


def cpp(folder: Path) -> list[str]:
    need("make", "g++", "protoc", "grpc_cpp_plugin", "pkg-config")
    if subprocess.run(["pkg-config", "--exists", "grpc++", "protobuf"], check=False).returncode != 0:
        pytest.skip("not installed: libgrpc++-dev or libprotobuf-dev")
    build("make", "-C", EXAMPLES / "cpp", f"BUILD={folder}", "CXXFLAGS=-O0 -Wall -Werror")
    return [str(folder / "generate")]


# ------------------------------------------------------------------------------------- the snippets of examples/README


def snippet(language: str) -> str:
    [code] = re.findall(rf"```{language}\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    return str(code)


# Debian's grpc-go is of 2020: it names these otherwise,
PRESENT_AND_OLD_GO = {
    "grpc.NewClient(": "grpc.Dial(",
    "grpc.WithTransportCredentials(insecure.NewCredentials())": "grpc.WithInsecure()",
    '\t"google.golang.org/grpc/credentials/insecure"\n': "",
}
# and speaks the protobuf library of before it by default, where stubs are of the present one.
PRESENT_CODEC = """package main

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/protobuf/proto"
)

type codec struct{}

func (codec) Marshal(v interface{}) ([]byte, error)      { return proto.Marshal(v.(proto.Message)) }
func (codec) Unmarshal(data []byte, v interface{}) error { return proto.Unmarshal(data, v.(proto.Message)) }
func (codec) Name() string                               { return "proto" }

func init() { encoding.RegisterCodec(codec{}) }
"""


def go(folder: Path) -> list[str]:
    """Compiled against Debian's libraries, which know no modules: the module is a folder of GOPATH."""
    need("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
    if not (GO_SOURCES / "src" / "google.golang.org" / "grpc").exists():
        pytest.skip("not installed: golang-google-grpc-dev")
    module = folder / "src" / "example.com" / "app"
    module.mkdir(parents=True)
    build("protoc", f"-I{PROTOS}", f"--go_out={module}", f"--go-grpc_out={module}", *PUBLIC)
    code = snippet("go")
    for present, old in PRESENT_AND_OLD_GO.items():
        assert present in code
        code = code.replace(present, old)
    (module / "main.go").write_text(code)
    (module / "codec.go").write_text(PRESENT_CODEC)
    settings = {"GO111MODULE": "off", "GOPATH": f"{folder}:{GO_SOURCES}", "GOFLAGS": "", "GOCACHE": str(folder / "cache")}
    build("go", "build", "-o", folder / "generate", ".", cwd=module, **settings)
    return [str(folder / "generate")]


def java(folder: Path) -> list[str]:
    need("java", "javac", "protoc", "grpc_java_plugin")
    names = ["grpc-*", "protobuf*", "guava", "failureaccess", "jsr305", "gson", "perfmark-api", "opencensus-api", "netty-*"]
    jars = [str(jar) for name in [*names, "geronimo-annotation-1.3-spec"] for jar in sorted(JARS.glob(f"{name}.jar"))]
    if not any("grpc-netty" in jar for jar in jars) or not any("geronimo" in jar for jar in jars):
        pytest.skip("not installed: libgrpc-java or libgeronimo-annotation-1.3-spec-java")
    path = ":".join([str(folder / "classes"), *jars])
    plugin = f"--plugin=protoc-gen-grpc={shutil.which('grpc_java_plugin')}"
    build("protoc", f"-I{PROTOS}", f"--java_out={folder}", f"--grpc_out={folder}", plugin, *PUBLIC)
    (folder / "Generate.java").write_text(snippet("java"))
    sources = [str(source) for source in folder.rglob("*.java")]
    build("javac", "-nowarn", "-d", folder / "classes", "-cp", path, *sources)
    return ["java", "-cp", path, "Generate"]
