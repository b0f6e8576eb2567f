"""The files of `carousel batch`: lines of prompts in, lines of results out, each whole or not there. Knows JSON; no server.

A result is found again by its id: so a batch that was interrupted goes on where it ended.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import grpc
from google.protobuf import json_format

from carousel.v1 import generation_pb2 as pb
from client.batch import FIELDS, BatchResult, check_names, finish_reason
from client.errors import CarouselError
from client.result import Output

Id: TypeAlias = str | int

_FIRST_BYTES = b'{"id": '  # of each line that is written here


class BatchFileError(Exception):
    """A file can't be used; one line that says what to do."""


# --------------------------------------------------------------------------------------------------------------------- in


@dataclass(slots=True)
class Line:
    """A prompt. number: of its line in the file, from 1; its id, too, where it has none of its own. wrong: why it is none; an
    unreadable line has an id that no other one has."""

    number: int
    id: Id
    prompt: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""


def open_prompts(path: str) -> IO[bytes]:
    """`-`: standard input, by a file object of its own, since a thread may stand in it when the process ends."""
    try:
        return open(0 if path == "-" else path, "rb", closefd=path != "-")
    except OSError as error:
        raise BatchFileError(f"{path}: {error.strerror}") from None


def count_prompts(path: str) -> int | None:
    """None: it can't be known, as the file can be read only once."""
    if path == "-" or not Path(path).is_file():
        return None
    with open_prompts(path) as file:
        return sum(not line.isspace() for line in file)


def read_prompts(file: IO[bytes]) -> Iterator[Line]:
    """Empty lines count and are no prompts."""
    seen: set[Id] = set()
    for number, text in enumerate(file, 1):
        if not text.isspace():
            line = _parse(number, text)
            if line.id in seen and not line.wrong:
                line = Line(number, f"line {number}", wrong=f"id: a line before it has {line.id!r}, too")
            seen.add(line.id)
            yield line


def _parse(number: int, text: bytes) -> Line:
    try:
        prompt = json.loads(text)
    except ValueError as error:  # what is no UTF-8, too
        return Line(number, f"line {number}", wrong=f"it is not JSON: {error}")
    if not isinstance(prompt, dict):
        return Line(
            number, f"line {number}", wrong='it is not a JSON object, as {"prompt": "def fibonacci(n):", "max_tokens": 64}'
        )
    own_id = prompt.pop("id", number)
    if not isinstance(own_id, (str, int)) or isinstance(own_id, bool):
        return Line(number, f"line {number}", wrong="id: it is not text or a whole number")
    try:
        check_names(prompt, ("id", *FIELDS))
    except ValueError as error:
        return Line(number, own_id, wrong=str(error))
    return Line(number, own_id, prompt)


# -------------------------------------------------------------------------------------------------------------------- out


class Results:
    """The file of results, ours alone while it is open; what it holds already is in `done`, by id: whether it failed.

    retry_failed: results that failed are taken out, and so not done. Raises BatchFileError. `-`: standard output, which holds
    nothing.
    """

    def __init__(self, path: str, *, retry_failed: bool = False) -> None:
        self._path = path
        self.done: dict[Id, bool] = {}
        self.torn = False  # an incomplete last line was taken out
        if path == "-":
            self._file = os.dup(1)
            return
        try:
            self._file = self._open(path)
            self._read(retry_failed)
        except OSError as error:
            raise BatchFileError(f"{path}: {error.strerror}") from None

    def write(self, line: dict[str, Any]) -> None:
        """At once, by one call to the system: Ctrl-C does not tear it. Raises BrokenPipeError, BatchFileError."""
        text = json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n"
        try:
            while text:
                text = text[os.write(self._file, text) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BatchFileError(f"{self._path}: {error.strerror}") from None

    def close(self) -> None:
        os.close(self._file)

    def _open(self, path: str) -> int:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BatchFileError(f"{path}: another `carousel batch` writes to it") from None
            raise
        return file

    def _read(self, retry_failed: bool) -> None:
        """Nothing is changed unless the whole file is of ours."""
        whole = 0  # bytes
        kept: list[bytes] = []
        with open(self._path, "rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    self._check_torn(number, text)
                    break
                whole += len(text)
                own_id, failed = self._result(number, text)
                if failed and retry_failed:
                    continue
                self.done[own_id] = failed
                if retry_failed:
                    kept.append(text)
        if self.torn:
            os.ftruncate(self._file, whole)
        if retry_failed:
            self._replace(kept)

    def _check_torn(self, number: int, text: bytes) -> None:
        if text[: len(_FIRST_BYTES)] != _FIRST_BYTES[: len(text)]:
            raise self._not_ours(number)
        self.torn = True

    def _result(self, number: int, text: bytes) -> tuple[Id, bool]:
        try:
            result = json.loads(text)
            own_id = result["id"]
        except (ValueError, TypeError, KeyError):
            raise self._not_ours(number) from None
        if not isinstance(own_id, (str, int)) or not ("outputs" in result or "text" in result or "error" in result):
            raise self._not_ours(number)
        return own_id, "error" in result

    def _not_ours(self, number: int) -> BatchFileError:
        return BatchFileError(
            f"{self._path}, line {number}: it is not a result of `carousel batch`; it is left as it is: name another file"
        )

    def _replace(self, kept: list[bytes]) -> None:
        """As a whole or not at all."""
        beside = f"{self._path}.new"
        file = self._open(beside)
        os.ftruncate(file, 0)
        with open(file, "wb", closefd=False) as new:
            new.writelines(kept)
        os.replace(beside, self._path)
        os.close(self._file)
        self._file = file


def read_with(results: Results, lines: Iterator[Line], skipped: Callable[[bool], None]) -> Iterator[Line]:
    """Those lines that have no result yet; of the others it is told whether they had failed."""
    for line in lines:
        if line.id in results.done:
            skipped(results.done[line.id])
        else:
            yield line


def result_line(own_id: Id, result: BatchResult, *, with_token_ids: bool = False) -> dict[str, Any]:
    """A result as JSON: id first."""
    line: dict[str, Any] = {"id": own_id}
    outputs = [_output(output, with_token_ids) for output in result.outputs]
    if len(outputs) == 1:
        line |= outputs[0]
    elif outputs:
        line["outputs"] = outputs
    if result.summary is not None:
        line["usage"] = _message(result.summary.usage)
    if result.error is not None:
        line["error"] = _error(result.error)
    return line


def _output(output: Output, with_token_ids: bool) -> dict[str, Any]:
    prompt = {} if output.prompt is None else {"prompt": _part(output.prompt, with_token_ids)}
    return prompt | _part(output, with_token_ids) | {"finish_reason": finish_reason(output) or "error"}


def _part(part: Output | pb.Delta, with_token_ids: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"text": part.text}
    if with_token_ids:
        line["token_ids"] = list(part.token_ids)
    if part.logprobs:
        line["logprobs"] = [_message(each) for each in part.logprobs]
    return line


def _error(error: CarouselError) -> dict[str, Any]:
    code: grpc.StatusCode = error.code
    said: dict[str, Any] = {"code": code.name, "message": error.message}
    return said | ({"fields": error.fields} if error.fields else {})


def _message(message: Any) -> dict[str, Any]:
    said = json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return dict(said)
