"""`python -m scheduler OPTIONS` is the service; `… engine JSON`, `… frontend JSON`, `… exporter JSON` are the processes that it
starts.

`python -m scheduler replay FILE` runs the core on a recording; `… keys DIR` makes the keys of an encrypted link.
"""

from __future__ import annotations

import sys

import msgspec


def main() -> int:
    if sys.argv[1:2] == ["replay"]:
        from scheduler.replay import replay_command

        replay_command(sys.argv[2:], prog_name="carousel replay")
    role = sys.argv[1] if len(sys.argv) == 3 else ""
    if role == "keys":
        from scheduler import curve

        return curve.main(sys.argv[2])
    if role == "engine":
        from scheduler import engine
        from scheduler.config import EngineConfig

        return engine.main(msgspec.json.decode(sys.argv[2], type=EngineConfig))
    if role == "frontend":
        from scheduler.frontend.config import FrontendConfig
        from scheduler.frontend.main import run

        return run(msgspec.json.decode(sys.argv[2], type=FrontendConfig))
    if role == "exporter":
        from scheduler import exporter
        from scheduler.config import ExporterConfig

        return exporter.run(msgspec.json.decode(sys.argv[2], type=ExporterConfig))
    from scheduler.main import serve_command

    return int(serve_command(prog_name="python -m scheduler") or 0)


if __name__ == "__main__":
    sys.exit(main())
