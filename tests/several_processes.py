"""One process of two, each with a device: `python -m tests.several_processes PORT NUMBER`."""

import sys

import jax
import numpy as np
import pytest
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxkv
from tests.oracle import Oracle, config_of, random_step, step


def main(port, number):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    over_heads = NamedSharding(mesh, PartitionSpec(None, None, None, "heads"))
    config = config_of(head_dim=16)
    oracle, cache = Oracle(config), jaxkv.create(config, device=over_heads)
    for tokens in (3, 1):
        arrays = random_step(config, tokens, heads=4)
        cache, outputs = step(cache, *arrays)  # outside jit
        outputs = process_allgather(outputs, tiled=True)
        np.testing.assert_allclose(outputs, oracle.step(*arrays), rtol=1e-5, atol=1e-5)
    assert "on 2 devices" in jaxkv.explain(cache)
    assert "4 of 8 tokens" in repr(jaxkv.check(cache))
    with pytest.raises(ValueError, match="spread over several processes"):
        jaxkv.save(cache, "nowhere")
    keys = process_allgather(jaxkv.layer(cache, 0)[0], tiled=True)
    gathered = process_allgather(cache, tiled=True)
    np.testing.assert_array_equal(jaxkv.layer(gathered, 0)[0], keys)
    print("right", number)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
