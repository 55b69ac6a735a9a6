"""One process of several: `python -m tests.mesh_process PORT NUMBER PROCESSES AXIS`."""

import sys

import jax
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
    print("right", number)


if __name__ == "__main__":
    main(*sys.argv[1:])
