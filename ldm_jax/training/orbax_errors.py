"""Errors that Orbax logs: kept out of a run's output, and read before it raises."""

import logging
from pathlib import Path

MAX_REASON = 300
SAVING_THREAD = "async_save"
"""Name of the thread in which Orbax writes."""
OF_ORBAX = ("orbax", "tensorstore", "OCDBT", "_wrap_awaitable")
"""One of these is in every message of asyncio about a failed read of Orbax."""


class OrbaxErrors(logging.Filter):
    """Drops what Orbax logs, and keeps the error of a failed save.

    Orbax raises these errors too, and one line reports them. With several processes it
    raises only after it has waited for the others, up to twenty minutes. Of reads that
    fail together it raises one, and asyncio logs the others.

    Attributes:
      error: Why a save into the folder failed; None if none did.
    """

    def __init__(self, directory: Path) -> None:
        """Start filtering for one folder of checkpoints."""
        super().__init__()
        self.error: BaseException | None = None
        self._directory = str(directory)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(self)

    def close(self) -> None:
        """Stop filtering."""
        for name in ("absl", "asyncio"):
            logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is to be logged."""
        message = record.getMessage()
        if record.name == "asyncio":
            return not any(word in message for word in OF_ORBAX)
        error = record.exc_info[1] if record.exc_info else None
        saving = record.threadName == SAVING_THREAD
        if saving and error is not None and self._directory in message:
            self.error = self.error or error
        return False


def reason_of(error: Exception) -> str:
    """Shorten an error; tensorstore names the array first and the cause last."""
    if isinstance(error.__cause__, Exception):
        return reason_of(error.__cause__)
    text = " ".join(str(error).split()).split(" [tensorstore_spec=")[0]
    text = text or type(error).__name__
    if len(text) <= MAX_REASON:
        return text
    return f"{text[: MAX_REASON // 2]} ... {text[-MAX_REASON // 2 :]}"
