"""Text chunks of PNG files."""

from pathlib import Path

from PIL import Image


def read_texts(path: Path) -> dict[str, str]:
    """Read the text chunks of a PNG."""
    with Image.open(path) as picture:
        texts = getattr(picture, "text", {})
    return {str(keyword): str(text) for keyword, text in texts.items()}
