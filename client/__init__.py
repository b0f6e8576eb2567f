"""The Python client of Carousel, and the `carousel` command. Knows the public protos; nothing of scheduler or worker."""

from client.aio.api import AsyncCarouselClient
from client.aio.many import AsyncMany
from client.aio.streams import AsyncGenerateStream, AsyncStream
from client.api import CarouselClient
from client.batch import BatchResult
from client.errors import CarouselError, ServerUnreachableError
from client.many import Many
from client.offline import Carousel
from client.result import Output, Result
from client.server import ServerFailedError
from client.streams import GenerateStream, Stream

__all__ = [
    "AsyncCarouselClient",
    "AsyncGenerateStream",
    "AsyncMany",
    "AsyncStream",
    "BatchResult",
    "Carousel",
    "CarouselClient",
    "CarouselError",
    "GenerateStream",
    "Many",
    "Output",
    "Result",
    "ServerFailedError",
    "ServerUnreachableError",
    "Stream",
]
