"""Write `docs/reference/config.md` from the config dataclasses.

python docs/make_config_reference.py
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.config import Config
from ldm_jax.config.validation import in_words

PAGE = Path(__file__).parent / "reference/config.md"
INTRODUCTION = """\
# Config fields

<!-- Written by docs/make_config_reference.py. Change the field's docstring instead. -->

A config is a Python file with `get_config() -> Config`. `--config` takes such a file,
or the name of one in `configs/` (`digits`, `ldm/sd15`). Every field is a flag of
`ldm train`: the field `diffusion.optim.lr` is `--diffusion.optim.lr 2e-4`, and an
underscore is a dash (`--data.image-size`). A switch is `--data.flip` or
`--data.no-flip`. A run keeps its config in `config.json`, under the same names.
"""


class Section(NamedTuple):
    """A dataclass and where it stands in the config."""

    cls: type[Any]
    """The dataclass."""
    paths: list[str]
    """Names of the fields that hold one, from the root."""


def sections(cls: type[Any] = Config, path: str = "") -> list[Section]:
    """List the dataclasses of a config once each, the outer ones first."""
    found = [Section(cls, [path])]
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(field.type):
            continue
        inner = f"{path}.{field.name}".strip(".")
        for section in sections(field.type, inner):
            known = [one for one in found if one.cls is section.cls]
            if known:
                known[0].paths.extend(section.paths)
            else:
                found.append(section)
    return found


def field_docstrings(cls: type[Any]) -> dict[str, str]:
    """Read the string behind each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assigned, texts = "", {}
    for node in getattr(body, "body", ()):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assigned = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if assigned:
                texts[assigned] = " ".join(str(node.value.value).split())
            assigned = ""
    return texts


def default_of(field: "dataclasses.Field[Any]") -> str:
    """Write the default of a field as Python has it; a dataclass as a link."""
    if field.default is None:
        return "unset"
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    return f"[{field.type.__name__}](#{field.type.__name__.lower()})"


def values_of(annotation: Any) -> str:
    """Say what values a field takes."""
    if dataclasses.is_dataclass(annotation):
        return "fields"
    return in_words(annotation).replace("|", "\\|")


def table(section: Section) -> str:
    """Write a dataclass as a table of its fields."""
    cls, paths = section
    texts = field_docstrings(cls)
    rows = [
        f"| `{field.name}` | {default_of(field)} | {values_of(field.type)} "
        f"| {texts[field.name]} |"
        for field in dataclasses.fields(cls)
    ]
    summary = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    where = ", ".join(f"`{path}`" for path in paths if path)
    title = f"## {cls.__name__}\n\n" + (f"Fields of {where}. " if where else "")
    head = "| field | default | values | meaning |\n|---|---|---|---|\n"
    return f"{title}{' '.join(summary.split())}\n\n{head}" + "\n".join(rows) + "\n"


def page() -> str:
    """Write the page."""
    return "\n".join([INTRODUCTION, *map(table, sections())])


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE}\n")
