"""`python -m bench.sim_server`: `carousel serve` whose simulated worker takes its time: --sim-… options are the worker's own.

`carousel serve` has no such options, because nobody wants to be served by a formula.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from scheduler.main import config_from, serve_command
from scheduler.supervisor import serve

_WORKERS = "--sim-"


def parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options of `carousel serve`, options of the worker, each with its value)."""
    service, worker = [], list[str]()
    following = iter(arguments)
    for argument in following:
        if argument.startswith(_WORKERS):
            worker += [argument, next(following, "")]
        else:
            service.append(argument)
    return service, worker


def main() -> int:
    service, worker = parted(sys.argv[1:])
    options = serve_command.make_context("sim_server", service).params
    config = config_from(options)
    return serve(msgspec.structs.replace(config, worker_options=(*config.worker_options, *worker)))


if __name__ == "__main__":
    sys.exit(main())
