"""Set before jax starts: CPU devices, strict promotion, and nothing from the network.

``JAXKV_TEST_DEVICES=1 pytest`` runs the tests in a process as most users have it, with one device;
those that need more, which say so with ``pytest.mark.devices(number)``, are skipped.
"""

import os

os.environ.setdefault("JAXKV_TEST_DEVICES", "8")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={os.environ['JAXKV_TEST_DEVICES']}"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import re

import hypothesis
import jax
import pytest

# Thousands of examples where a test leaves their number open: --hypothesis-profile=nightly.
hypothesis.settings.register_profile("nightly", max_examples=5000)

jax.config.update("jax_numpy_dtype_promotion", "strict")

# What `pytest` leaves to `pytest -m slow`, so that it takes less than six minutes on two cores. CI
# runs both. A part of each table stays: the rest of it, and notebooks that take long, are here.
SLOW = re.compile(
    r"test_notebooks\.py::test_it_prints.*\[[245]_"
    r"|test_attention\.py::test_every_pair.*((rotated|float8|centred).*(MHA|MQA)|float16)"
    r"|test_attention\.py.*(test_every_option.*(contiguous|ring|-(scale|softcap|window|sinks)-)|split|"
    r"garbage).*streamed|test_attention\.py.*(scale|softcap|window|sinks)-paged-streamed"
    r"|test_attention\.py::test_every_pair.*((float(32|8)|contiguous|paged-None|ring-None).*streamed|float8-(ring|paged)|float8.*native)"
    r"|test_attention\.py::test_every_option.*together-paged-streamed"
    r"|test_(cache|cache_full|in_place)\.py.*rotated"
    r"|test_streaming\.py::test_attention_is_that_of_the_oracle.*(rotated|placement[23]|int8-3)"
    r"|test_measure\.py::test_(vectors|kivi|error_is|a_plan)"
    r"|test_compress\.py::test_every_policy.*(paged|float16|float8|rotated)"
    r"|test_compress\.py::test_codecs_with_a_space"
    r"|test_snapshot\.py.*(rotated|float16|float8)"
    r"|test_kept\.py.*evicting|test_pool\.py.*int8-False"
    r"|integrations/test_(flax|linen|nnx)\.py.*(scan|remat|equivalence|codec_and_addressing)"
    r"|models/test_goldens\.py::test_(a_codec_a_layer|logits_of_chunks)"
    r"|jaxkv/(models/(decoder|gpt2|load)|policies/|measure|attention/fetched|generation)"
    r"|test_native\.py::test_(long_contexts.*\[([17]|.*(96|256)|.*(rotated[123]|int8-c|bfloat16-c)|3-[bfr].*80)|"
    r"it_is_built)"
    r"|test_in_place\.py::test_(a_cache_sharded.*(float|int8-[pr])|in_a_mesh.*(ring|paged))"
    r"|test_newest\.py::test_attention.*fine turned-ring"
    r"|test_compress\.py::test_(a_fork_of|attention_is.*(head-pages|layer-single))"
    r"|test_measure\.py::test_samples"
    r"|compression/test_evict\.py::test_(heavy|sinks|eviction.*newest)"
    r"|test_streaming\.py::test_(the_block_with|offload|what_is_written|ragged)"
    r"|test_streaming\.py.*(in_host_memory\[a|addressings\[(pages|chosen|shared|ring,)|context\[(ring|contig)|are\[ring)"
    r"|test_generation\.py::test_greedy"
    r"|engine/test_(saved_prefix|swap)\.py.*\[(centred int8|newest too|windows)"
    r"|engine/test_newest\.py::test_an_answer"
    r"|test_snapshot\.py::test_going_on.*newest"
    r"|snapshot/test_kept\.py.*\[(one number|pages|a number a)"
    r"|snapshot/test_kept\.py::test_rows"
    r"|compression/test_pool\.py.*\[bfloat16"
    r"|integrations/test_flax\.py::test_prefill_chunks"
    r"|test_newest\.py.*(left_by|centred|coarse|-(contiguous|paged|host memory)-)"
    r"|test_cache\.py::test_(eager|selected|verbs_under_jit.*batch)"
    r"|test_cache_full\.py::test_full_inside_jit.*(float16|float8)"
    r"|test_in_place\.py::test_in_place.*(append_in_a_layer_scan|append_in_a_while|-float16|-float8)"
    r"|models/test_decoder\.py::test_random_model"
)


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
        needs = item.get_closest_marker("devices")
        if needs and needs.args[0] > int(os.environ["JAXKV_TEST_DEVICES"]):
            item.add_marker(pytest.mark.skip(reason=f"needs {needs.args[0]} devices"))
