"""One process of several: `python -m tests.mesh_process PORT NUMBER PROCESSES AXIS`."""

import sys

import jax
import pytest
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType

import jaxkv
from tests.decoders import sharp_decoder

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7]]


def main(port, number, processes, axis):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(number))
    mesh = jax.make_mesh((len(jax.devices()),), (axis,), axis_types=(AxisType.Auto,))
    place = {"mesh": mesh, "axes": jaxkv.Axes(**{axis: axis})}
    model = sharp_decoder()
    config = model.cache_config(max_context_length=64, batch_size=2, codec=jaxkv.Dense("float32"))
    one = jaxkv.generate(model, PROMPTS, max_new_tokens=12, config=config)
    many = jaxkv.generate(model, PROMPTS, max_new_tokens=12, config=config, **place)
    assert many.tokens == one.tokens, (many.tokens, one.tokens)
    with jaxkv.session(config, **place) as session:
        cache = jaxkv.advance(session.cache, 3)  # outside jit
        jaxkv.check(cache)
        assert process_allgather(cache.lengths, tiled=True).tolist() == [3, 3]
        assert "devices by" in session.report()
        session.cache = cache
    if axis != "context":
        check_engine(model, config, place)
    print("right", number)


def check_engine(model, config, place):
    """Every process submits the same, so all keep the same books."""

    def tokens(**options):
        with jaxkv.Engine(model, pool, prefill_chunk=4, decode_steps=4, **options) as engine:
            requests = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS * 3]
            engine.run()
            engine.pages.check()
            assert engine.pages.usage().hit_tokens > 0
            return [request.tokens for request in requests]

    pool = config.replace(addressing=jaxkv.Paged(4, num_pages=16))
    assert tokens(**place) == tokens()
    with pytest.raises(
        jaxkv.ConfigError, match="swap_space must be 0 where devices are in several"
    ):
        jaxkv.Engine(model, pool, swap_space=1 << 20, **place)


if __name__ == "__main__":
    main(*sys.argv[1:])
