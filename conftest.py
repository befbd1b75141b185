"""Settings that every test and docstring example runs under."""

import importlib.util

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

# Before the first array: eight virtual devices, so that sharded code is tested on a
# machine with one. The device count cannot change once a backend has started.
jax.config.update("jax_num_cpu_devices", 8)
# int32 + float32 without a word said is an error, not a silent float32.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A property test compiles on its first example, so time says nothing. `settings()` is
# Hypothesis's own profile, which is a fixed sequence of examples where CI is set.
settings.register_profile(
    "nmjax",
    settings(),
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("nmjax")


@pytest.fixture
def unchecked(monkeypatch):
    """Switch type checks off, to see the errors that users without them see."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_collection_modifyitems(items):
    """Skip what compiles for GPUs where the compiler is not installed."""
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins and importlib.util.find_spec("jax_plugins.xla_cuda13"):
        return
    reason = "compiling for GPUs needs `pip install 'nmjax[gpu-compile]'`"
    for item in items:
        if item.get_closest_marker("compiler"):
            item.add_marker(pytest.mark.skip(reason=reason))
