"""One environment for each peer: made once, kept while its recipe stays the same. Knows nothing of what runs there."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE / ".envs"
LLAMA_CPP_PYTHON = "0.3.36"  # its source package brings llama.cpp along

_STAMP = "installed.json"
_LOG = "install.log"
_STEP_S = 2 * 3600.0
_REASON_CHARACTERS = 300


class PeerUnavailableError(Exception):
    """It can't be installed or run here; the text says why."""


@dataclass(frozen=True)
class Recipe:
    """Commands, one after the other, with {python}, {bin}, {folder}, {here} and {cores} to be filled in."""

    commands: tuple[tuple[str, ...], ...]
    disk_gb: float  # that it takes, builds and downloads included
    optional: tuple[tuple[str, ...], ...] = ()  # may fail
    machines: tuple[str, ...] = ()  # () all
    tools: tuple[tuple[str, ...], ...] = ()  # one of each group must be there


_PIP = ("{python}", "-m", "pip", "install", "--no-input", "-r")
_UNINSTALL = ("{python}", "-m", "pip", "uninstall", "-y")
_LLAMA = f"{{folder}}/llama_cpp_python-{LLAMA_CPP_PYTHON}"

RECIPES: Mapping[str, Recipe] = {
    "openvino": Recipe(
        commands=((*_PIP, "{here}/requirements/openvino.txt"), (*_UNINSTALL, "torchvision")),
        disk_gb=4,
    ),
    "vllm": Recipe(
        commands=(
            ("{python}", "-m", "pip", "install", "--no-input", "torch==2.13.0"),
            (*_PIP, "{here}/requirements/vllm.txt"),
            (*_UNINSTALL, "torchvision", "torchaudio", "torchcodec"),
        ),
        # Its documentation asks for tcmalloc; on Debian and Ubuntu it can be unpacked without being installed.
        optional=(
            ("sh", "-c", "mkdir -p {folder}/tcmalloc && cd {folder}/tcmalloc && apt-get download libtcmalloc-minimal4"),
            ("sh", "-c", "cd {folder}/tcmalloc && dpkg -x libtcmalloc*.deb ."),
        ),
        disk_gb=8,
        machines=("x86_64",),
    ),
    "llamacpp": Recipe(
        commands=(
            (*_PIP, "{here}/requirements/llamacpp.txt"),
            (
                *("{python}", "-m", "pip", "download", "--no-input", "--no-deps", "--no-binary", "llama-cpp-python"),
                *("--dest", "{folder}", f"llama-cpp-python=={LLAMA_CPP_PYTHON}"),
            ),
            ("{python}", "-m", "tarfile", "-e", f"{_LLAMA}.tar.gz", "{folder}"),
            (
                *("{bin}/cmake", "-S", f"{_LLAMA}/vendor/llama.cpp", "-B", "{folder}/build", "-G", "Ninja"),
                *("-DCMAKE_MAKE_PROGRAM={bin}/ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"),
                *("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DBUILD_SHARED_LIBS=OFF"),
            ),
            ("{bin}/cmake", "--build", "{folder}/build", "--target", "llama-server", "-j", "{cores}"),
        ),
        disk_gb=3,
        tools=(("c++", "g++", "clang++"), ("cc", "gcc", "clang")),
    ),
}


@dataclass(frozen=True)
class Environment:
    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "venv" / "bin"

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def models(self) -> Path:
        """Checkpoints as this peer reads them."""
        return self.folder / "models"


def ensure(name: str, cores: int, root: Path = ENVIRONMENTS, recipes: Mapping[str, Recipe] = RECIPES) -> Environment:
    """The environment of that name, installed if it is not yet. Raises PeerUnavailableError."""
    recipe = recipes[name]
    folder = root / name
    environment = Environment(folder)
    print_of_recipe = _fingerprint(recipe)
    if _stamp(folder) == print_of_recipe:
        return environment
    _check(recipe, root)
    print(f"Installing {name} into {folder} (log: {folder / _LOG})", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(environment.models, ignore_errors=True)  # converted by what was here before
    began = time.monotonic()
    with (folder / _LOG).open("w") as log:
        _step((sys.executable, "-m", "venv", str(folder / "venv")), log.fileno(), folder)
        for command in recipe.commands:
            _step(_filled(command, environment, cores), log.fileno(), folder)
        for command in recipe.optional:
            if _exit_code(_filled(command, environment, cores), log.fileno()):
                break
    (folder / _STAMP).write_text(json.dumps({"recipe": print_of_recipe, "seconds": round(time.monotonic() - began)}))
    return environment


def _check(recipe: Recipe, root: Path) -> None:
    """What can be known before anything is downloaded."""
    if recipe.machines and platform.machine() not in recipe.machines:
        raise PeerUnavailableError(f"is made for {', '.join(recipe.machines)}, this is {platform.machine()}")
    for group in recipe.tools:
        if not any(shutil.which(tool) for tool in group):
            raise PeerUnavailableError(f"building it needs {' or '.join(group)}, and none is here")
    nearest = next(folder for folder in (root, *root.parents) if folder.exists())
    free_gb = shutil.disk_usage(nearest).free / 1e9
    if free_gb < recipe.disk_gb:
        raise PeerUnavailableError(f"installing it takes {recipe.disk_gb:g} GB, and {free_gb:.1f} GB are free")


def _step(command: tuple[str, ...], log: int, folder: Path) -> None:
    try:
        code = _exit_code(command, log)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailableError(f"can't be installed: {error}") from error
    if code:
        raise PeerUnavailableError(f"can't be installed: {last_error((folder / _LOG).read_text(errors='replace'))}")


def _exit_code(command: tuple[str, ...], log: int) -> int:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, timeout=_STEP_S, check=False)
    return done.returncode


def _filled(command: tuple[str, ...], environment: Environment, cores: int) -> tuple[str, ...]:
    places = {"here": HERE, "folder": environment.folder, "bin": environment.bin, "python": environment.python}
    return tuple(part.format(cores=cores, **places) for part in command)


def last_error(said: str) -> str:
    """Of all that a program said, the one line that most likely tells why it failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not lines:
        return "it said nothing"
    told = [line for line in lines if "error" in line.lower() and not line.lower().startswith(("note", "hint"))]
    return (told or lines)[-1][:_REASON_CHARACTERS]


def _fingerprint(recipe: Recipe) -> str:
    """Changes with the recipe and with the files of pins that it names."""
    text = json.dumps(asdict(recipe))
    for path in sorted((HERE / "requirements").glob("*.txt")):
        if f"requirements/{path.name}" in text:
            text += path.read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stamp(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / _STAMP).read_text())["recipe"])
    except (OSError, ValueError, KeyError):
        return None
