"""Eight emulated CPU devices, strict promotion and caches that persist between runs."""

import contextlib
import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache"
# Set before JAX is imported; commands that the tests run inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TFDS_DATA_DIR", str(CACHE / "tfds"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Less optimisation compiles faster: a quarter of the time from an empty cache. Tests
# that need the rounding of optimised programs use `tests.support.compiling.AS_SHIPPED`.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
]
if "LDM_JAX_AS_SHIPPED" in os.environ:
    del FLAGS[1:]
os.environ["XLA_FLAGS"] = " ".join(FLAGS)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_programs():
    """Free the compiled programs of a test module: two thousand tests fill 8 GiB."""
    yield
    jax.clear_caches()


@pytest.fixture
def lowered():
    """List that grows by one for each program given to the compiler."""
    with recorded("/jax/core/compile/jaxpr_to_mlir_module_duration") as programs:
        yield programs


@pytest.fixture
def compiled():
    """List that grows by one for each program compiled, or read from JAX's cache."""
    with recorded("/jax/core/compile/backend_compile_duration") as programs:
        yield programs


@contextlib.contextmanager
def recorded(wanted):
    """Record the keywords of JAX's events of one kind."""
    found = []

    def listen(event, duration, **kwargs):
        if event == wanted:
            found.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
