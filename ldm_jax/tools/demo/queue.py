"""One drawing at a time, and no more than a few that wait."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ldm_jax.types import InputError


class RenderQueue:
    """Who draws next: one at a time, in the order they came.

    Attributes:
      most: How many may wait.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock, self._waiting = asyncio.Lock(), 0

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for one's turn, and have it.

        Raises:
          InputError: If too many wait already.
        """
        if self._waiting >= self.most:
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
