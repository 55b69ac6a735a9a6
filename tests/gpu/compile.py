"""Compile steps for a GPU that is not there: `python -m tests.gpu.compile "NVIDIA H200"`.

Prints a line of JSON a program. Needs Python 3.12, jax 0.11 and the jax-cuda13-pjrt and -plugin
wheels, but no driver and no CUDA libraries.
"""

import dataclasses
import json
import os
import sys

if __name__ == "__main__":  # before jax starts; not in a process that only looks at this file
    # Before jax starts. The autotuner would want a device to try things on.
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu,cuda"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # registers and spills, on the output

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS
from jaxkv.attention.cudnn import attend as cudnn
from jaxkv.attention.mosaic import attend as mosaic
from tests.compiled import assert_in_place

# From the vendor's data sheets and `cudaGetDeviceProperties`.
DEVICES = {
    "NVIDIA H200": (9, 132, 232448, 233472, 62914560, 4_800_000_000_000, 1.98),
    "NVIDIA A100": (8, 108, 166912, 167936, 41943040, 2_039_000_000_000, 1.41),
}
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {2} shared_memory_per_core: {3}
  core_count: {1} fpus_per_core: 128 l2_cache_size: {4}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {5} clock_rate_ghz: {6} device_memory_size: 80000000000
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {0} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 13 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
LAYERS, CONTEXT, KV_HEADS, HEADS = 4, 4096, 8, 32
DECODE = {
    "bfloat16": (jaxkv.Dense("bfloat16"), jaxkv.Contiguous(), 128),
    "bfloat16 pages": (jaxkv.Dense("bfloat16"), jaxkv.Paged(16, num_pages=2000), 64),
    "bfloat16 ring": (jaxkv.Dense("bfloat16"), jaxkv.Ring(window=1024, sinks=4), 128),
    "int8": (jaxkv.Int8(), jaxkv.Contiguous(), 128),
    "rotated4": (jaxkv.Rotated(bits=4), jaxkv.Contiguous(), 128),
    "rotated4-centred": (
        jaxkv.Centred(jaxkv.Rotated(bits=4), rope=jaxkv.Rope.of(5e5, rotary_dim=128)),
        jaxkv.Contiguous(),
        128,
    ),
    "rotated2 pages": (jaxkv.Rotated(bits=2), jaxkv.Paged(16, num_pages=2050), 128),
}
CHUNK = 96
PREFILL = {
    "bfloat16": (jaxkv.Dense("bfloat16"), jaxkv.Contiguous(), 128),
    "bfloat16 pages": (jaxkv.Dense("bfloat16"), jaxkv.Paged(16, num_pages=2000), 64),
    "int8": (jaxkv.Int8(), jaxkv.Contiguous(), 128),
}


def step(implementation):
    """A step over all layers, in a loop with a traced layer, and unrolled."""

    def one_layer(layer, state):
        cache, queries = state
        vectors = queries[..., :KV_HEADS, :]
        cache = jaxkv.append(cache, vectors, vectors, layer=layer)
        output = jaxkv.attend(cache, queries, layer=layer, implementation=implementation)
        return cache, queries + output

    def looped(cache, queries):
        cache, queries = jax.lax.fori_loop(0, LAYERS, one_layer, (cache, queries))
        return jaxkv.advance(cache, queries.shape[1]), queries

    def unrolled(cache, queries):
        state = cache, queries
        for layer in range(LAYERS):
            state = one_layer(layer, state)
        return jaxkv.advance(state[0], queries.shape[1]), state[1]

    return {"looped": looped, "unrolled": unrolled}


def main(device_name):
    # What this process would ask of its device.
    for name, module in {"mosaic": mosaic, "cudnn": cudnn}.items():
        row = IMPLEMENTATIONS[name]
        IMPLEMENTATIONS[name] = row._replace(cannot_read=module.cannot_read)
    text = TARGET.format(*DEVICES[device_name], name=device_name)
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    placed = jax.sharding.SingleDeviceSharding(topology.devices[0])
    decoding = "mosaic" if device_name == "NVIDIA H200" else "reference"
    programs = [(1, decoding, name, *kind) for name, kind in DECODE.items()]
    programs += [(CHUNK, "cudnn", name, *kind) for name, kind in PREFILL.items()]
    for tokens, implementation, name, codec, addressing, head_dim in programs:
        config = jaxkv.KVCacheConfig(
            LAYERS, CONTEXT, KV_HEADS, head_dim, batch_size=8, codec=codec, addressing=addressing
        )
        cache = jax.eval_shape(lambda config=config: jaxkv.create(config))
        dtypes = {leaf: dtype for leaf, (_, dtype) in codec.leaves(head_dim).items()}
        cache = dataclasses.replace(
            cache,
            storage={
                leaf: jax.ShapeDtypeStruct(array.shape, dtypes[leaf])
                for leaf, array in cache.storage.items()
            },
        )
        queries = jax.ShapeDtypeStruct((8, tokens, HEADS, head_dim), jnp.bfloat16)
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
            (cache, queries),
        )
        for form, function in step(implementation).items():
            compiled = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
            temp = compiled.memory_analysis().temp_size_in_bytes
            problem = None
            try:
                assert_in_place(compiled, cache, temp_share=2)
            except AssertionError as error:
                problem = str(error)
            share = temp / (config.size_bytes / LAYERS)
            facts = {"program": f"{name}, {form}", "problem": problem, "temp of a layer": share}
            facts |= {"by": implementation}
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
