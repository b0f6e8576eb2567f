"""The gRPC server of a front end: its options, its services, its end. This package is the only place here that knows grpc."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc  # type: ignore[import-untyped]

from carousel.inference import grpc_service_pb2, grpc_service_pb2_grpc
from carousel.v1 import (
    control_pb2,
    control_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    inspect_pb2,
    inspect_pb2_grpc,
    tokenization_pb2,
    tokenization_pb2_grpc,
)
from scheduler.errors import StartError
from scheduler.frontend import tls
from scheduler.frontend.callers import Callers
from scheduler.frontend.chat_template import ChatTemplates
from scheduler.frontend.config import FrontendConfig
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.defaults import ModelDefaults
from scheduler.frontend.ledger import Ledger
from scheduler.frontend.server.authentication import Authentication
from scheduler.frontend.server.control import Control
from scheduler.frontend.server.generation import Generation
from scheduler.frontend.server.health import Health
from scheduler.frontend.server.inspect import Inspect
from scheduler.frontend.server.kserve import Inference
from scheduler.frontend.server.reading import Registrar
from scheduler.frontend.server.status import is_worth_a_line
from scheduler.frontend.server.tokenization import Tokenization
from scheduler.frontend.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (generation_pb2, "Generation"),
        (tokenization_pb2, "Tokenization"),
        (control_pb2, "Control"),
        (inspect_pb2, "Inspect"),
        (grpc_service_pb2, "GRPCInferenceService"),
    )
)
_ADMIN = (
    control_pb2.DESCRIPTOR.services_by_name["Control"].full_name,
    inspect_pb2.DESCRIPTOR.services_by_name["Inspect"].full_name,
)
_STOCK = (health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
_GRPCS_LOG = "grpc._cython.cygrpc"
_LAST_WORDS_S = 0.2  # what a status that is just being sent gets, and calls that never end by themselves
_POLL_S = 0.02


class Server:
    """Listens from `start` to `stop`."""

    def __init__(
        self,
        config: FrontendConfig,
        link: CoreLink,
        tokenizer: Tokenizer,
        templates: ChatTemplates,
        defaults: ModelDefaults,
        ledger: Ledger | None = None,
    ) -> None:
        """Raises StartError."""
        self._config = config
        logging.getLogger(_GRPCS_LOG).addFilter(is_worth_a_line)
        threads = ThreadPoolExecutor(config.tokenizer_threads, thread_name_prefix="tokenizer")
        self._generation = Generation(link, tokenizer, defaults, config.served_model_name, threads, ledger)
        self._health = Health(link, _SERVICES)
        self._server = grpc.aio.server(options=_options(config), interceptors=_interceptors(config))
        services: Any = Registrar(self._server)
        generation_pb2_grpc.add_GenerationServicer_to_server(self._generation, services)
        tokenization = Tokenization(tokenizer, templates, threads)
        tokenization_pb2_grpc.add_TokenizationServicer_to_server(tokenization, services)
        control_pb2_grpc.add_ControlServicer_to_server(Control(link, defaults, config.served_model_name), services)
        inspect_pb2_grpc.add_InspectServicer_to_server(Inspect(link), services)
        inference = Inference(link, self._generation, config.served_model_name)
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference, services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, services)
        told = reflection.aio.ReflectionServicer((*_SERVICES, *_STOCK))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(told, services)
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Returns the port. Raises StartError."""
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            port = self._listen(f"{host}:{self._config.port}")
        except RuntimeError as error:
            raise StartError(f"can't listen on {host}:{self._config.port}: {error}") from None
        await self._health.tell()
        self._following = asyncio.create_task(self._health.follow())
        await self._server.start()
        return port

    def _listen(self, address: str) -> int:
        """Raises StartError, RuntimeError."""
        if self._config.tls is None:
            return self._server.add_insecure_port(address)
        certificate, key, client_ca = tls.read(self._config.tls)
        credentials = grpc.ssl_server_credentials([(key, certificate)], client_ca, require_client_auth=client_ca is not None)
        return self._server.add_secure_port(address, credentials)

    async def stop(self, grace_s: float) -> None:
        """No new calls; streams of tokens get `grace_s` seconds to end, everything else ends with them."""
        assert self._following is not None
        self._following.cancel()
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(grace_s))
        until = time.monotonic() + grace_s
        while self._generation.num_active and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        if self._generation.num_active:
            log.warning("%d requests were cut off", self._generation.num_active)
        await self._server.stop(min(grace_s, _LAST_WORDS_S))
        await stopping


def _interceptors(config: FrontendConfig) -> list[grpc.aio.ServerInterceptor]:
    """Raises StartError."""
    return [Authentication(Callers.load(config.key_file), _ADMIN, _STOCK)] if config.key_file else []


def _options(config: FrontendConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.so_reuseport", 1),  # front ends share the port
        ("grpc.max_concurrent_streams", config.max_streams),
        # Calls that arrived and were not taken up yet; the library's default sheds bursts of more than 1,000.
        ("grpc.server.max_pending_requests", config.max_streams),
        ("grpc.server.max_pending_requests_hard_limit", config.max_streams),
        # … and cancels without a reason what was not taken up for 30 s; a client's own deadline is the better judge.
        ("grpc.server_max_unrequested_time_in_server", 600),
        # A connection that does not begin, with TLS or with HTTP/2's own first words, is closed.
        ("grpc.server_handshake_timeout_ms", 20_000),
        # A reader whose machine is gone is noticed within a minute; clients may ping every 10 s, also without calls.
        ("grpc.keepalive_time_ms", 40_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
