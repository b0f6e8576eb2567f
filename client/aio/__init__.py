"""The Python client for asyncio: the same methods, with `await` and `async for`. The rest is the blocking client's."""
