import ast
import builtins
import dis
import importlib
import types
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ldm_jax"
FLOOR_BY_ROOM = {
    "types": 0,
    "config": 0,
    "cli": 0,
    "images": 0,
    "launch": 0,
    "rng": 0,
    "diffusion": 1,
    "nn": 1,
    "data": 2,
    "evaluation": 2,
    "interop": 2,
    "training": 3,
    "any_steps": 4,
    "browse": 4,
    "drawing": 4,
    "loading": 4,
    "edit": 4,
    "generate": 4,
    "inversion": 4,
    "chunk": 4,
    "comparison": 4,
    "networks": 4,
    "pictures": 4,
    "programs": 4,
    "recipes": 4,
    "replay": 4,
    "requests": 0,
    "settings": 0,
    "studio": 4,
    "subjects": 4,
    "build": 4,
    "caching": 4,
    "first_stage": 4,
    "second_stage": 4,
    "describe": 4,
    "exchange": 4,
    "pretrained": 4,
    "report": 4,
    "run": 4,
    "scoring": 4,
    "words": 4,
    "workdir": 4,
    "gallery": 4,
    "synthetic": 4,
    "flops": 4,
    "planning": 4,
}
ROOF = 5
DOORS = {
    "data/cache_latents.py",
    "evaluation/__main__.py",
    "evaluation/steps.py",
    "plan.py",
    "report/__main__.py",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {
                f"{node.module}.{alias.name}" for alias in node.names
            }
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_rooms(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path)]
    return {part[1] for part in parts if part[0] == "ldm_jax" and len(part) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_imports_from_a_higher_floor(path):
    if room(path) == "__init__":
        return
    # `python -m ldm_jax.room` is a door, like train.py; and so are the named ones.
    is_door = path.name == "__main__.py" or str(path.relative_to(PACKAGE)) in DOORS
    floor = ROOF if is_door else FLOOR_BY_ROOM[room(path)]
    above = {r for r in imported_rooms(path) if FLOOR_BY_ROOM[r] > floor}
    assert not above


def test_the_package_knows_no_example():
    for path in FILES:
        assert not any(name.split(".")[0] == "examples" for name in imported(path))
        assert "scene" not in path.read_text().lower(), path


def test_nothing_imports_a_door_into_the_house():
    """A door may look down on everything only as long as nobody stands behind it."""
    doors = {f"ldm_jax.{door.removesuffix('.py').replace('/', '.')}" for door in DOORS}
    assert not any(doors & imported(path) for path in FILES)


def test_the_two_wings_of_the_first_floor_never_meet():
    for path in FILES:
        if room(path) == "diffusion":
            assert "nn" not in imported_rooms(path)
            assert not any(name.split(".")[0] == "flax" for name in imported(path))
        if room(path) == "nn":
            assert "diffusion" not in imported_rooms(path)


def test_only_the_config_and_command_line_are_free_of_jax():
    files = [PACKAGE / "types.py", PACKAGE / "cli.py"]
    for path in [*files, *(PACKAGE / "config").glob("*.py")]:
        roots = {n.split(".")[0] for n in imported(path)}
        assert not roots & {"jax", "flax", "numpy", "optax", "orbax"}


def test_devices_are_named_by_the_layouts_only():
    for path in FILES:
        if path.name not in ("pmap.py", "fsdp.py"):
            text = path.read_text()
            # Which kind of chip is here may be asked, not which devices there are.
            text = text.replace("jax.local_devices()[0].device_kind", "")
            assert "jax.devices(" not in text
            assert "jax.local_devices(" not in text
            assert "jax.pmap(" not in text


def test_no_file_reaches_into_private_jax():
    for path in FILES:
        assert not any(name.startswith("jax._src") for name in imported(path))


def global_names(code: types.CodeType) -> set[str]:
    loads = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return loads.union(*map(global_names, inner))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_name_that_a_function_reads_is_defined(path):
    # The linter cannot tell: it takes shape strings for names, so that rule is off.
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(p for p in parts if p != "__init__"))
    code = compile(path.read_text(), str(path), "exec")
    assert not {
        name
        for name in global_names(code)
        if not hasattr(module, name) and not hasattr(builtins, name)
    }
