"""Set before jax starts: CPU devices, strict promotion, and nothing from the network.

``JAXKV_TEST_DEVICES=1 pytest`` runs the tests in a process as most users have it, with one device;
those that need more, which say so with ``pytest.mark.devices(number)``, are skipped.
``JAXKV_TEST_TYPES=1 pytest`` checks every annotation of jaxkv in every call, shapes included.
"""

import os
import pathlib

from tests import haste

os.environ.setdefault("JAXKV_TEST_DEVICES", "8")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={os.environ['JAXKV_TEST_DEVICES']}"
    + haste.FLAGS
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers have it from who started them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = haste.folder_of_programs()

import gc
import itertools
import re
import resource

import hypothesis
import jax
import jaxtyping
import pytest

if os.environ.get("JAXKV_TEST_TYPES") == "1":
    import tests.annotations  # noqa: F401, which jaxtyping looks for among what is imported

    jaxtyping.install_import_hook("jaxkv", "tests.annotations.checked")

# Thousands of examples where a test leaves their number open: --hypothesis-profile=nightly.
hypothesis.settings.register_profile("nightly", max_examples=5000)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
haste.make_few_mlir_contexts()

# Of what programs are made from, for a debugger.
jax.config.update("jax_traceback_in_locations_limit", 0)

# Tracing makes many objects that stay, and the collector would walk them all again and again.
gc.set_threshold(100_000, 20, 20)

TESTS = itertools.count(1)

# Examples of these modules take long to run; tests carry marks of their own.
SLOW_EXAMPLES = {
    "jaxkv.attention.fetched",
    "jaxkv.drafts.draft",
    "jaxkv.drafts.draft_model",
    "jaxkv.serve.calibration",
    "jaxkv.serve.generate",
    "jaxkv.quality",
    "jaxkv.models.decoder",
    "jaxkv.models.gpt2",
    "jaxkv.models.loading",
    "jaxkv.policies.recent",
    "jaxkv.policies.reconstruction",
    "jaxkv.policies.select",
}


def pytest_collection_modifyitems(items):
    """Give `slow` and `full` to the cases and examples that are said to be so."""
    for item in items:
        case = getattr(item, "callspec", None)
        for cases in ("full", "slow"):
            patterns = [mark.args[0] for mark in item.iter_markers(f"{cases}_cases")]
            if case and any(re.search(pattern, case.id) for pattern in patterns):
                item.add_marker(cases)
                break
        if isinstance(item, pytest.DoctestItem) and item.dtest.globs["__name__"] in SLOW_EXAMPLES:
            item.add_marker(pytest.mark.slow)
        needs = item.get_closest_marker("devices")
        if needs and needs.args[0] > int(os.environ["JAXKV_TEST_DEVICES"]):
            item.add_marker(pytest.mark.skip(reason=f"needs {needs.args[0]} devices"))


@pytest.fixture(autouse=True)
def compiled_as_users_do(request):
    """What proofs about a compiled program are about."""
    proof = "in_place" in request.node.nodeid
    jax.config.update("jax_disable_most_optimizations", not proof)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def fewer_programs_than_a_process_has_room_for():
    """Let go of compiled ones: they take memory, and mappings, of which Linux allows 65,530."""
    yield
    mine = pathlib.Path("/proc/self")
    if next(TESTS) % 10 or not mine.exists():  # mappings take 10 ms to count
        return
    num_bytes = int((mine / "statm").read_text().split()[1]) * resource.getpagesize()
    if num_bytes > 8e9 or (mine / "maps").read_bytes().count(b"\n") > 20_000:
        gc.unfreeze()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def garbage_of_one_module():
    """Let the collector walk what a module left, and then leave that alone: it takes seconds."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def compilations():
    """A list that grows with each program that XLA compiles."""
    durations = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield durations
    jax.monitoring.unregister_event_duration_listener(listen)
