"""A queue of pages: one makes images, a few wait."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ldm_jax.types import InputError


class RenderQueue:
    """Lets one page at a time make images, in order of arrival.

    Attributes:
      max_waiting: Maximum number of pages that wait.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._lock, self._waiting = asyncio.Lock(), 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait, then run the block alone.

        Raises:
          InputError: If too many pages wait already.
        """
        if self._waiting >= self.max_waiting:
            raise InputError(
                f"busy: {self._waiting} other pages wait for their images; try again"
            )
        self._waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._lock.release()
