"""The front-end process: loads the tokenizer, connects to the core, serves gRPC until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scheduler.errors import StartError
from scheduler.frontend import defaults, server
from scheduler.frontend.chat_template import ChatTemplates
from scheduler.frontend.config import FrontendConfig
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.defaults import ModelDefaults
from scheduler.frontend.ledger import Ledger, Listener, log_request
from scheduler.frontend.tokenizer import Tokenizer
from scheduler.process import log_to_stderr, obey_the_supervisor

if TYPE_CHECKING:
    from scheduler.frontend.tracing import Tracing

log = logging.getLogger(__name__)

_CORE_WAIT_S = 5.0  # a core that begins at the same time is there much sooner


def run(config: FrontendConfig) -> int:
    """The process `python -m scheduler frontend`; returns the exit code."""
    obey_the_supervisor()
    log_to_stderr("frontend", config.log_level, config.log_format)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: its thread pool would only be in the way
    try:
        tokenizer = Tokenizer.load(Path(config.model_dir))
        model_defaults = defaults.load(Path(config.model_dir), tokenizer.eos_token_id)
        templates = ChatTemplates.load(Path(config.model_dir))
        asyncio.run(_serve(config, tokenizer, templates, model_defaults))
    except StartError as error:
        print(f"frontend: {error}", file=sys.stderr)
        return 1
    return 0


class Listeners:
    """Who is told of the ends of requests. What is off is not imported."""

    def __init__(self, config: FrontendConfig, link: CoreLink) -> None:
        self.all: list[Listener] = [log_request] if config.request_log else []
        self._tracing: Tracing | None = None
        if config.metrics:
            from scheduler.metrics import RequestMetrics

            self.all.append(RequestMetrics().ended)
        if config.otlp_endpoint:
            from scheduler.frontend.tracing import Tracing

            self._tracing = Tracing(config.otlp_endpoint, config.served_model_name, link.explain)
            self.all.append(self._tracing.ended)

    async def close(self) -> None:
        if self._tracing is not None:
            await self._tracing.close()


async def _first_facts(link: CoreLink) -> None:
    """Nobody's call should come to a front end that knows nothing yet, where another one of the port knows. Without a core it
    listens all the same: its health says why."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CORE_WAIT_S):
            await link.facts_changed.wait()


async def _serve(config: FrontendConfig, tokenizer: Tokenizer, templates: ChatTemplates, model_defaults: ModelDefaults) -> None:
    told_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    link = CoreLink(config.core_endpoint)
    try:
        listeners = Listeners(config, link)
        await _first_facts(link)
        grpc_server = server.Server(config, link, tokenizer, templates, model_defaults, Ledger(listeners.all))
        port = await grpc_server.start()
        log.info("listening on %s, port %d, %s", config.host, port, "with TLS" if config.tls else "without TLS")
        await told_to_stop.wait()
        log.info("stopping")
        await grpc_server.stop(config.drain_timeout_s)
        await listeners.close()
    finally:
        link.close()
