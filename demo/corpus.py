"""What the demo model learns from: the running interpreter's standard library, split by file into three parts.

This module reads files and cuts them into texts. It knows nothing of tokens, models or scores.
"""

import ast
import hashlib
import inspect
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Folders whose code is not written to be read: installed packages, tests (pinned odd syntax), build leftovers that
# differ between machines.
SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test"})
# Generated tables. They are megabytes of numbers or of escaped strings, and say nothing about Python.
SKIPPED_FILES = frozenset({"pydoc_data/topics.py", "html/entities.py"})
TABLE_MARKS = ("decoding_table = (", "decoding_map = codecs.make_identity_dict")  # encodings/cp*.py, iso8859_*.py, ...

BUCKETS = 100
HELD_OUT_BUCKETS = range(0, 5)  # scored, never trained on, never used for a choice
TUNING_BUCKETS = range(10, 12)  # never trained on; learning rates and the n-gram's settings are chosen here

MAX_FUNCTION_CHARS = 1_500  # a function cut out as a document of its own ends within the model's context


@dataclass(frozen=True)
class SourceFile:
    """One file of the library: its path relative to the library, with forward slashes, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    train: tuple[SourceFile, ...]
    tuning: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]

    def digest(self) -> str:
        """SHA-256 over every name and text, so that a figure can say which library it was measured on."""
        sha = hashlib.sha256()
        for part in (self.train, self.tuning, self.held_out):
            for file in part:
                sha.update(f"{file.name}\0{file.text}\0".encode())
        return sha.hexdigest()


@dataclass(frozen=True)
class Function:
    """A function on its own: dedented source, and the first paragraph of its docstring ('' where it has none)."""

    source: str
    summary: str


def load_corpus(library: Path | None = None) -> Corpus:
    """Read the library (default: the running interpreter's) in sorted order and split it by file."""
    root = library or Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[SourceFile]] = {"train": [], "tuning": [], "held_out": []}
    for file in _read_all(root):
        parts[part_of(file.name)].append(file)
    return Corpus(**{name: tuple(files) for name, files in parts.items()})


def part_of(name: str) -> str:
    """The part a file belongs to, by a hash of its stem alone.

    Files that share a name share their text more often than not (`tokenize.py` and `lib2to3/pgen2/tokenize.py`), so
    they go to the same side; `__init__.py` and `__main__.py` count as their folder.
    """
    path = Path(name)
    stem = path.parent.name if path.stem in ("__init__", "__main__") else path.stem
    bucket = int.from_bytes(hashlib.sha256(stem.strip("_").encode()).digest()[:8], "big") % BUCKETS
    if bucket in HELD_OUT_BUCKETS:
        return "held_out"
    return "tuning" if bucket in TUNING_BUCKETS else "train"


def functions(file: SourceFile) -> Iterator[Function]:
    """The file's functions and methods, short ones only, in the order they stand."""
    try:
        tree = ast.parse(file.text)
    except SyntaxError:  # templates that happen to end in .py
        return
    lines = file.text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            if len(source) <= MAX_FUNCTION_CHARS and source.startswith(("def ", "async def ")):
                docstring = inspect.cleandoc(ast.get_docstring(node) or "")
                yield Function(source, docstring.split("\n\n")[0])


def _read_all(root: Path) -> Iterator[SourceFile]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _is_skipped(relative):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a handful of files declare another encoding
            continue
        if text.strip() and not any(mark in text for mark in TABLE_MARKS):
            yield SourceFile(relative.as_posix(), text)


def _is_skipped(relative: Path) -> bool:
    return (
        not SKIPPED_FOLDERS.isdisjoint(relative.parts)
        or relative.as_posix() in SKIPPED_FILES
        or relative.parts[0].startswith(("config-", "_sysconfigdata"))
    )
