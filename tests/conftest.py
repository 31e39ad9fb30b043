"""Tests run on eight fake CPU devices, so that every sharded path is exercised anywhere."""

import os

import pytest

# Before jax is first imported, which reads both.
os.environ["JAX_PLATFORMS"] = "cpu"
_COUNT = "--xla_force_host_platform_device_count"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Each run makes its own jitted functions; what they compile to is shared, over processes."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name.upper(), str(value))  # for the runs in processes of their own
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at the settings only once
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
