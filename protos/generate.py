"""Generates the Python stubs beside the .proto files: `python protos/generate.py`, or `--check` to compare only (CI)."""

from __future__ import annotations

import filecmp
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent


def generate(out: Path) -> list[Path]:
    """Stubs of every public .proto file under `out`; returns their paths relative to it."""
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    kinds = [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
    kinds += [f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")]
    files = sorted(str(path.relative_to(HERE)) for path in HERE.glob("carousel/**/*.proto"))
    include = str(Path(protoc.__file__).parent / "_proto")
    if protoc.main(["protoc", f"-I{HERE}", f"-I{include}", *plugins, *kinds, *files]) != 0:
        raise SystemExit("protoc failed")
    return sorted(path.relative_to(out) for path in out.rglob("*_pb2*.py*") if path.suffix in (".py", ".pyi"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        stubs = generate(Path(folder))
        if "--check" in sys.argv[1:]:
            stale = [
                str(path)
                for path in stubs
                if not (HERE / path).exists() or not filecmp.cmp(Path(folder, path), HERE / path, False)
            ]
            if stale:
                raise SystemExit(f"stubs differ from their .proto files: {', '.join(stale)}; run `make protos`")
        else:
            for path in stubs:
                shutil.copyfile(Path(folder, path), HERE / path)


if __name__ == "__main__":
    main()
