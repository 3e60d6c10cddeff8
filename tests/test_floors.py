"""The order of the rooms: a file imports from its own room or a lower one."""

import ast
import builtins
import dis
import importlib
import subprocess
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm_jax"
FLOORS = (
    "types",
    "files",
    "images",
    "rng",
    "config",
    "models",
    "diffusion",
    "data",
    "parallel",
    "latent_diffusion",
    "build",
    "training",
    "pretrained",
    "sampling",
    "evaluation",
    "run",
    "tools",
    "cli",
)
"""Lowest first."""
MAX_TOP_MODULES = 8
MAX_ROOMS = 24
FREE_OF_JAX = ("types", "config")
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"
)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in FILES}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """List the modules that a file imports; those of the package by file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else str(node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    return imported(path) & MODULES.keys()


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_file_imports_from_a_higher_floor(path):
    floor = FLOORS.index(room(path))
    rooms = {room(MODULES[name]) for name in ours(path)}
    assert not {above for above in rooms if FLOORS.index(above) > floor}


def test_imports_have_no_cycle():
    left = {name: ours(path) - {name} for name, path in MODULES.items()}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left


def test_number_of_top_modules_and_rooms_is_limited():
    top_modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert len(top_modules) <= MAX_TOP_MODULES
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a checkout")
    parts = [Path(line).parts for line in listed.stdout.splitlines()]
    rooms = {p[1] if p[0] == "ldm_jax" else p[0] for p in parts if p[0] != "tests"}
    assert len(rooms - {"__init__.py"}) <= MAX_ROOMS


def test_models_and_diffusion_do_not_import_each_other():
    for path in FILES:
        rooms = {room(MODULES[name]) for name in ours(path)}
        if room(path) == "diffusion":
            assert "models" not in rooms
            assert not any(name.split(".")[0] == "flax" for name in imported(path))
        if room(path) == "models":
            assert "diffusion" not in rooms


def test_types_and_config_do_not_import_jax():
    for path in FILES:
        if room(path) in FREE_OF_JAX:
            roots = {name.split(".")[0] for name in imported(path)}
            assert not roots & {"jax", "flax", "numpy", "optax", "orbax"}


def test_only_parallel_lists_devices():
    for path in FILES:
        if room(path) != "parallel":
            text = path.read_text()
            # The kind of chip may be read, not the list of devices.
            text = text.replace("jax.local_devices()[0].device_kind", "")
            assert "jax.devices(" not in text
            assert "jax.local_devices(" not in text
            assert "jax.pmap(" not in text


def test_package_does_not_import_or_name_the_examples():
    for path in FILES:
        assert not any(name.split(".")[0] == "examples" for name in imported(path))
        assert "scene" not in path.read_text().lower(), path


def test_no_file_imports_private_jax():
    for path in FILES:
        assert not any(name.startswith("jax._src") for name in imported(path))


def global_names(code: types.CodeType) -> set[str]:
    loads = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return loads.union(*map(global_names, inner))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_global_name_of_a_function_is_defined(path):
    # The linter's rule is off, because it reads shape strings as names.
    module = importlib.import_module(name_of(path))
    code = compile(path.read_text(), str(path), "exec")
    assert not {
        name
        for name in global_names(code)
        if not hasattr(module, name) and not hasattr(builtins, name)
    }
