"""How the `carousel` command writes what a server said: JSON lines, tables, text that a terminal can't be harmed by."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from client.errors import CarouselError, ServerUnreachableError

CLOSED_PIPE = 141  # exit code: 128 + SIGPIPE
_WIDE = 240  # columns of a table in a file or pipe
# In grpc's words when somebody is there and the two can't agree; "Socket closed" is all that a side hears which lacks TLS, or a
# certificate.
_TLS_SIGNS = ("Socket closed", "Tls handshake", "verification check")
# The API's own JSON mapping, with the names of the .proto files, zeros written out, on one line.
_JSON: dict[str, Any] = {
    "preserving_proto_field_name": True,
    "always_print_fields_with_no_presence": True,
    "indent": None,
    "ensure_ascii": False,
}
# A model's text may hold escape sequences. A file may have them; a terminal would obey them.
_HARMLESS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def to_json(message: Message) -> str:
    """One line."""
    return json_format.MessageToJson(message, **_JSON)


def harmless(text: str) -> str:
    """Without control characters but line end and tab."""
    return text.translate(_HARMLESS)


def closed_pipe() -> int:
    """Whoever read our output has enough: the exit code for going without a word, as other tools do."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return CLOSED_PIPE


def say(text: str) -> None:
    """One line on stderr."""
    print(f"carousel: {' '.join(text.split())}", file=sys.stderr, flush=True)


def advice(error: CarouselError) -> str:
    """A failed call in one line that says what to do."""
    if isinstance(error, ServerUnreachableError):
        where, _, why = error.message.partition(": ")
        if any(sign in why for sign in _TLS_SIGNS):
            return (
                f"{where} in the way it was asked: with or without TLS, and with which certificates? See --tls-ca, --tls-cert"
            )
        why = why.rpartition(": ")[2].rstrip("]")  # grpc's chain of causes ends with the one that a person knows
        return f"{where} ({why}): start one with `carousel serve --model DIR`, or name another with --target HOST:PORT"
    text = error.message or "the server gave no reason"
    for field, description in error.fields.items():
        if field not in text:
            text = f"{field}: {text}" if description in text else f"{text}; {field}: {description}"
    if error.retry_after_s is not None:
        text += f"; try again in {error.retry_after_s:.3g} s"
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        text += "; give a token with --token or in CAROUSEL_TOKEN"
    if error.code is grpc.StatusCode.INTERNAL:
        text += "; the server's log says more"
    return f"{text} ({error.code.name})"


def write_line(text: str) -> None:
    """Prints it as UTF-8, harmless on a terminal."""
    _write(f"{harmless(text) if sys.stdout.isatty() else text}\n")


def write_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns of text to the left, of numbers to the right; nothing is cut off."""
    from rich.console import Console  # not before it is needed: the other commands start faster
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        numbers = bool(rows) and all(isinstance(row[i], int) for row in rows)
        table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text(harmless(str(cell)).replace("\n", " ")) for cell in row])
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    with console.capture() as captured:  # it would end the process by itself when a pipe is closed
        console.print(table)
    _write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _write(text: str) -> None:
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
