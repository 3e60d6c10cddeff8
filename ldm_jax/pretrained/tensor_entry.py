"""A tensor of a weights file that is not read yet."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """Shape, dtype and reader of one tensor of a file."""

    shape: tuple[int, ...]
    """Shape of the tensor."""
    dtype: str
    """Element type in the file, in safetensors' notation (F32, BF16, I64, ...)."""
    read: Callable[[], np.ndarray]
    """Reads the tensor in the dtype of the file."""
