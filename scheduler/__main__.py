"""`python -m scheduler OPTIONS` is the service; `… engine JSON` and `… frontend JSON` are the processes that it starts."""

from __future__ import annotations

import sys

import msgspec


def main() -> int:
    role = sys.argv[1] if len(sys.argv) == 3 else ""
    if role == "engine":
        from scheduler import engine
        from scheduler.config import EngineConfig

        return engine.main(msgspec.json.decode(sys.argv[2], type=EngineConfig))
    if role == "frontend":
        from scheduler.frontend.config import FrontendConfig
        from scheduler.frontend.main import run

        return run(msgspec.json.decode(sys.argv[2], type=FrontendConfig))
    from scheduler.main import serve_command

    return int(serve_command(prog_name="python -m scheduler") or 0)


if __name__ == "__main__":
    sys.exit(main())
