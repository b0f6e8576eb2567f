"""grpc.health.v1: SERVING exactly while a worker is ready and the server is not draining; `liveness` SERVING until it stops."""

from __future__ import annotations

from collections.abc import Iterable

from grpc_health.v1 import health, health_pb2  # type: ignore[import-untyped]

from scheduler.frontend.core_link import CoreLink

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LIVENESS = "liveness"  # no service of ours: who asks for it wants to know whether to start this process again


class Health(health.aio.HealthServicer):  # type: ignore[misc]
    """`services`: full names; the empty one, the server as a whole, is always among them."""

    def __init__(self, link: CoreLink, services: Iterable[str]) -> None:
        super().__init__()
        self._link = link
        self._services = ("", *services)

    async def tell(self) -> None:
        """Says what the core's facts mean now."""
        facts = self._link.facts
        serving = facts is not None and facts.ready and not facts.draining
        for service in self._services:
            await self.set(service, SERVING if serving else NOT_SERVING)
        await self.set(LIVENESS, SERVING)

    async def follow(self) -> None:
        """Tells after each change of the facts; runs until it is cancelled."""
        while True:
            await self._link.facts_changed.wait()
            self._link.facts_changed.clear()
            await self.tell()
