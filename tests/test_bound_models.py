"""Models that are bound to a device or spread over several: each program is compiled once."""

import logging

import jax
import pytest
from jax.sharding import AxisType

import jaxkv
from tests.decoders import sharp_decoder

POOL = jaxkv.Paged(16, num_pages=32)
PROMPTS = [[1, 2, 3, 4 + number] * 9 for number in range(3)]
NEW = 20  # tokens: several dispatches of decode


def mesh_of(count):
    return jax.make_mesh(
        (count,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def one_device(number):
    return lambda model: (jax.device_put(model, jax.devices()[number]), {})


def two_devices(model):
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), axis_types=auto, devices=jax.devices()[:2])
    return model, {"mesh": mesh, "axes": jaxkv.Axes(heads="x")}


PLACES = {
    "free": lambda model: (model, {}),
    "the default device": one_device(0),
    "another device": one_device(-1),
    "two devices": two_devices,
}


def generated(model, options):
    result = jaxkv.generate(
        model, PROMPTS, max_new_tokens=NEW, max_context_length=128, prefill_chunk=16, **options
    )
    return result.tokens


def served(model, options):
    config = model.cache_config(max_context_length=128, batch_size=3, addressing=POOL)
    with jaxkv.Engine(model, config, prefill_chunk=16, **options) as engine:
        for _ in range(2):
            requests = [engine.submit(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
            engine.run()
    return [request.tokens for request in requests]


@pytest.fixture(scope="module")
def expected():
    return generated(sharp_decoder(num_layers=1), {})


@pytest.mark.skipif(len(jax.devices()) < 2, reason="two devices are needed")
@pytest.mark.parametrize(
    ("answers", "programs"),
    [(generated, ("_prefill", "_decode")), (served, ("prefill", "decode"))],
    ids=["generate", "Engine"],
)
@pytest.mark.parametrize("place", PLACES)
def test_each_program_is_compiled_once(place, answers, programs, expected, caplog):
    model, options = PLACES[place](sharp_decoder(num_layers=1))
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = answers(model, options)
    assert found == expected
    messages = [record.message for record in caplog.records]
    for name in programs:
        assert sum(f"Compiling jit({name})" in message for message in messages) == 1, place


@pytest.mark.skipif(len(jax.devices()) < 2, reason="two devices are needed")
def test_the_cache_is_where_the_model_is():
    model, _ = one_device(-1)(sharp_decoder(num_layers=1))
    config = model.cache_config(max_context_length=32, batch_size=1, addressing=POOL)
    with jaxkv.Engine(model, config) as engine:
        held = jax.tree.leaves(engine._held.cache)
        assert {device for leaf in held for device in leaf.devices()} == {jax.devices()[-1]}
