"""The lines of the log, as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import logging, sys
from scheduler.process import Fields, log_to_stderr
log_to_stderr("part", "info", sys.argv[1])
log = logging.getLogger("any")
log.debug("not this")
log.info("%d of %s", 3, "four")
log.info("request %s", Fields(request_id="a\\nb", tenant="ü", tokens=5, whole_ms=1.5))
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it failed")
"""


def lines(form: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, form], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_json_is_an_object_a_line_with_parts_by_name() -> None:
    first, second, third = map(json.loads, lines("json"))
    assert first.keys() == {"time", "role", "pid", "level", "message"}
    assert (first["role"], first["level"], first["message"]) == ("part", "info", "3 of four")
    assert first["time"].endswith("Z") and "T" in first["time"]
    assert second["message"] == "request"
    assert (second["request_id"], second["tenant"], second["tokens"], second["whole_ms"]) == ("a\nb", "ü", 5, 1.5)
    assert third["level"] == "error" and "ZeroDivisionError" in third["exception"]


def test_in_text_nobody_can_begin_a_line_of_their_own() -> None:
    first, second, *_ = lines("text")
    assert " INFO 3 of four" in first
    assert second.endswith(" INFO request request_id='a\\nb' tenant='ü' tokens=5 whole_ms=1.5")
