"""Batches that are sent to the devices while a step is running."""

from typing import Any

import jax
import numpy as np
from jaxtyping import UInt32

from ldm_jax.data.pipeline import BatchIterator, to_batch
from ldm_jax.parallel.layout import Layout
from ldm_jax.types import PyTree


class Prefetch:
    """Reads and sends batches one dispatch ahead."""

    def __init__(self, iterator: BatchIterator, layout: Layout) -> None:
        """Wrap an iterator; nothing is read yet."""
        self._iterator = iterator
        self._layout = layout
        self._next: tuple[PyTree, UInt32[np.ndarray, "k b"]] | None = None
        self._position = iterator.get_state()

    def position(self) -> Any:
        """Return the iterator's state before the batches that were not taken yet."""
        return self._position

    def peek(self, num_steps: int) -> PyTree:
        """Return the batches of the first dispatch; `take` returns them again."""
        self._next = self._read(num_steps)
        return self._next[0]

    def take(
        self, num_steps: int, *, then: int
    ) -> tuple[PyTree, UInt32[np.ndarray, "k b"]]:
        """Return the batches of a dispatch and start to send those of the next.

        Args:
          num_steps: Steps of this dispatch; equals `then` of the call before.
          then: Steps of the next dispatch; 0 if this is the last.

        Returns:
          The batches on the devices, and the indices of this process' examples.
        """
        batch = self._read(num_steps) if self._next is None else self._next
        self._position = self._iterator.get_state()
        self._next = self._read(then) if then else None
        return batch

    def _read(self, num_steps: int) -> tuple[PyTree, UInt32[np.ndarray, "k b"]]:
        rows = [to_batch(next(self._iterator)) for _ in range(num_steps)]
        indices = np.stack([row.example_index for row in rows])
        if num_steps == 1:
            return self._layout.split(rows[0]), indices
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        return self._layout.split(stacked, stacked=True), indices
