"""torch-fidelity, without the torchvision that it imports; nothing here uses that."""

import importlib
import sys
import types

STAND_INS = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


def stand_in(name):
    """Make a module that has every attribute, and its own submodules."""

    def attribute(wanted):
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return sys.modules.get(f"{name}.{wanted}", object)

    module = types.ModuleType(name)
    module.__dict__.update({"__path__": [], "__getattr__": attribute})
    return module


def fidelity(name):
    """Import a module of torch-fidelity."""
    added = [module for module in STAND_INS if module not in sys.modules]
    for module in added:
        sys.modules[module] = stand_in(module)
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    finally:
        for module in added:
            sys.modules.pop(module, None)
