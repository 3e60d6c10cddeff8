"""What Orbax says of its failures, heard before it raises them, and in few words."""

import logging
import sys
from pathlib import Path
from typing import Any

MAX_REASON = 300
SAVING_THREAD = "async_save"
"""What Orbax calls the thread that writes."""


class AsyncioErrors(logging.Filter):
    """Keeps what Orbax logs of its failures out of a run's output.

    It raises them too, and one line tells them; but where it has to wait for other
    processes, only once it has done so, in twenty minutes.

    Attributes:
      error: What went wrong with a save into the folder; None if nothing did.
    """

    def __init__(self, directory: Path) -> None:
        """Listen for failures of one folder."""
        super().__init__()
        self.error: BaseException | None = None
        self._directory = str(directory)

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop a record, and keep its exception."""
        error = record.exc_info[1] if record.exc_info else None
        saving = record.threadName == SAVING_THREAD
        if saving and error is not None and self._directory in record.getMessage():
            self.error = self.error or error
        return False


def quieten(asyncio_errors: AsyncioErrors) -> None:
    """Keep Orbax, and what it leaves to Python, from printing of their own."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("absl").addFilter(asyncio_errors)
    logging.getLogger("asyncio").addFilter(_is_of_others)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _is_of_others(record: logging.LogRecord) -> bool:
    # Of reads that fail at once Orbax raises the first. The rest are tensorstore's, but
    # its name is not in all: a future may fail, and the task that waits for it.
    words = ("orbax", "tensorstore", "OCDBT", "_wrap_awaitable")
    return not any(word in record.getMessage() for word in words)


def _unraisable(details: Any) -> None:
    # Of tensorstore's work on a step that ends when Orbax has given the step up.
    if str(details.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(details)


def reason_of(error: Exception) -> str:
    """Say what went wrong: tensorstore names the array first and the cause last."""
    if isinstance(error.__cause__, Exception):
        return reason_of(error.__cause__)
    text = " ".join(str(error).split()).split(" [tensorstore_spec=")[0]
    text = text or type(error).__name__
    if len(text) <= MAX_REASON:
        return text
    return f"{text[: MAX_REASON // 2]} ... {text[-MAX_REASON // 2 :]}"
