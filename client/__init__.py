"""The Python client of Carousel, and the `carousel` command. Knows the public protos; nothing of scheduler or worker."""

from client.api import CarouselClient
from client.errors import CarouselError, ServerUnreachableError
from client.many import Many
from client.streams import GenerateStream, Stream

__all__ = ["CarouselClient", "CarouselError", "GenerateStream", "Many", "ServerUnreachableError", "Stream"]
