"""Programs that are compiled or exported by one process and run by another."""

import os
import pickle
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

import jaxkv
from jaxkv.addressing import KeptByHead
from jaxkv.native import unavailable
from tests.haste import compiling_anew
from tests.oracle import EACH_ONCE, Oracle, config_of, layer_step, random_step

NATIVE = [jax.export.DisabledSafetyCheck.custom_call("jaxkv_decode")]
SHAPE = {"num_layers": 1, "max_context_length": 8, "num_kv_heads": 2, "head_dim": 16}
PLACED = jaxkv.HostMemory(resident=2, block=2, blocks_per_query=1)


def step(cache, queries, keys, values):
    cache, output = layer_step(cache, 0, queries, keys, values)
    return jaxkv.advance(cache, 1), output


def one_step(config):
    """A cache, the arrays of a step, and what the oracle answers."""
    arrays = random_step(config, 1, heads=4)
    expected = Oracle(config).step(*arrays)[0]
    return jaxkv.create(config), [jnp.asarray(array[0]) for array in arrays], expected


def test_a_compiled_step_runs_in_a_process_that_has_traced_nothing(tmp_path):
    if reason := unavailable():
        pytest.skip(reason)
    cache, arrays, expected = one_step(config_of(**SHAPE))
    with compiling_anew():  # XLA cannot write out what it has read
        compiled = jax.jit(step).lower(cache, *arrays).compile()
    assert "jaxkv_decode" in compiled.as_text()
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((cache, *arrays))]
    file = tmp_path / "step"
    file.write_bytes(pickle.dumps((serialize_executable.serialize(compiled), leaves)))
    code = (
        "import pickle, sys, jax\n"
        "from jax.experimental.serialize_executable import deserialize_and_load\n"
        "program, leaves = pickle.load(open(sys.argv[1], 'rb'))\n"
        "arguments, _ = jax.tree.unflatten(program[1], leaves)\n"
        "print(*deserialize_and_load(*program)(*arguments)[1].ravel().tolist())"
    )
    one_device = os.environ | {"XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-c", code, file], env=one_device, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-1000:]
    np.testing.assert_allclose([float(n) for n in run.stdout.split()], expected.ravel(), atol=1e-5)


KEPT = {"num_layers": 3, "num_kv_heads": 2}
GROUP = config_of("int8", num_layers=1)
CONFIGS = {
    **{f"{codec} {each}": config_of(codec, each, batch_size=2) for codec, each in EACH_ONCE},
    "pool": config_of().replace(addressing=jaxkv.Paged(2, num_pages=4)),
    "newest": config_of(newest=jaxkv.Newest(2, jaxkv.Int8())),
    "host memory": config_of(placement=PLACED),
    "kept": config_of().replace(addressing=jaxkv.Kept(2, new=2, **KEPT, sums=True)),
    "kept by head": config_of().replace(addressing=KeptByHead(6, 3, new=2, **KEPT)),
    "hybrid": jaxkv.HybridConfig((GROUP, GROUP.replace(num_layers=2)), (1, 0, 1)),
}


def exported(cache):
    return jax.export.export(jax.jit(lambda cache: jaxkv.advance(cache, 1)))(cache)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_structure_of_a_cache_comes_back(name):
    pytest.importorskip("flatbuffers")
    cache = jaxkv.create(CONFIGS[name])
    again = jax.export.deserialize(exported(cache).serialize())
    assert again.in_tree == jax.tree.structure(((cache,), {}))
    assert again.out_tree == jax.tree.structure(cache)
    assert (again.call(cache).lengths == 1).all()


def test_what_is_not_of_jaxkv_is_refused_with_a_way_on():
    pytest.importorskip("flatbuffers")

    class Mine(jaxkv.Int8):
        pass

    cache = jaxkv.create(config_of().replace(codec=Mine()))
    with pytest.raises(TypeError, match=r"Mine\(\) is not of jaxkv.*jax.tree.leaves\(cache\)"):
        exported(cache).serialize()


def test_a_step_for_several_platforms_is_right_on_this_one():
    cache, arrays, expected = one_step(config_of(**SHAPE))
    both = jax.export.export(jax.jit(step), platforms=("cpu", "tpu"), disabled_checks=NATIVE)
    _, output = both(cache, *arrays).call(cache, *arrays)
    np.testing.assert_allclose(output, expected, atol=1e-5)
