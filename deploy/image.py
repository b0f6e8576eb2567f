"""What the Dockerfile does in Python: which requirements an image has, and the last touches to what was installed. Standard
library only, since it runs where nothing is installed yet; knows nothing of the project but pyproject.toml and constraints.txt.
"""

from __future__ import annotations

import contextlib
import os
import py_compile
import re
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path

_TIME_S = 315_532_800  # 1980-01-01, the earliest that a zip file knows
# What comes with CUDA's torch, in the versions that it asks for.
_OF_CUDA = re.compile(r"(nvidia|cuda)-.*|triton")


def requirements(project: Path, extras: list[str]) -> list[str]:
    """Of the project itself and of these extras."""
    told = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    return [*told["dependencies"], *(each for extra in extras for each in told["optional-dependencies"][extra])]


def pinned(constraints: Path) -> dict[str, str]:
    """Version by normalized name."""
    lines = (line.strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {_normalized(name): version for name, version in pairs}


def strangers(environment: Path, versions: dict[str, str]) -> list[str]:
    """Installed distributions that are not pinned, or in another version. torch's own variant (+cpu) does not count."""
    [site] = environment.glob("lib/python3*/site-packages")
    found = []
    for each in distributions(path=[str(site)]):
        name, version = _normalized(each.metadata["Name"]), each.version.split("+")[0]
        if name != "carousel-serve" and not _OF_CUDA.fullmatch(name) and versions.get(name) != version:
            found.append(f"{name}=={each.version}")
    return sorted(found)


def finish(environment: Path) -> None:
    """The same bytes each time: one time for all files (numba's cache knows sources by it), and compiled code that does not
    depend on it. What is finished already is left alone."""
    new = [path for path in environment.rglob("*") if not path.is_symlink() and path.stat().st_mtime != _TIME_S]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_compile, (path for path in new if path.suffix == ".py"), chunksize=64))
    for path in (environment, *environment.rglob("*")):
        if path.lstat().st_mtime != _TIME_S:
            os.utime(path, (_TIME_S, _TIME_S), follow_symlinks=False)


def _compile(source: Path) -> None:
    """Some packages ship files for other versions of Python: those stay as they are."""
    with contextlib.suppress(py_compile.PyCompileError, SyntaxError):
        py_compile.compile(str(source), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: list[str]) -> int:
    match arguments:
        case ["requirements", *extras]:
            print("\n".join(requirements(Path("pyproject.toml"), extras)))
        case ["finish", folder]:
            if unknown := strangers(Path(folder), pinned(Path("constraints.txt"))):
                print(f"not in constraints.txt: {', '.join(unknown)}", file=sys.stderr)
                return 1
            finish(Path(folder))
        case _:
            print("image.py requirements [EXTRA]… | finish FOLDER", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
