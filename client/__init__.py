"""The Python client of Carousel, and the `carousel` command. Knows the public protos; nothing of scheduler or worker."""

from client.api import CarouselClient, GenerateStream, Stream
from client.errors import CarouselError, ServerUnreachableError

__all__ = ["CarouselClient", "CarouselError", "GenerateStream", "ServerUnreachableError", "Stream"]
