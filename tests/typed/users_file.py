"""What a user writes. A type checker flags the lines that end with `# wrong`, and no others."""

from typing import assert_type

import jax
import jax.numpy as jnp

import jaxkv

config = jaxkv.KVCacheConfig(num_layers=2, max_context_length=16, num_kv_heads=1, head_dim=4)
mixed_config = jaxkv.HybridConfig((config, config.replace(codec=jaxkv.Int8())), (0, 0, 1, 1))
keys = values = queries = jnp.ones((3, 1, 4))

cache = jaxkv.create(config)
mixed = jaxkv.create(mixed_config, device=jax.devices()[0])
assert_type(cache, jaxkv.KVCache)
assert_type(mixed, jaxkv.HybridCache)


def step(cache: jaxkv.KVCache, layers: int) -> tuple[jax.Array, jaxkv.KVCache]:
    out = queries
    for layer in range(layers):
        cache = jaxkv.append(cache, keys, values, layer=layer, num_tokens=2)
        out = jaxkv.attend(cache, out, layer=layer, num_tokens=2, window=8)
    return out, jaxkv.advance(cache, 2)


jitted = jax.jit(step, static_argnums=1, donate_argnums=0)
print(jitted(cache, 2), jax.jit(jaxkv.advance)(cache, 2))
decoded_keys, decoded_values = jaxkv.layer(cache, jnp.int32(0))
assert_type(decoded_keys, jax.Array)
assert_type(jaxkv.next_positions(mixed, 3), jax.Array)
assert_type(jaxkv.append(mixed, keys, values, layer=0), jaxkv.HybridCache)
assert_type(jaxkv.truncate(cache, 1), jaxkv.KVCache)
assert_type(jaxkv.reset(mixed), jaxkv.HybridCache)
assert_type(jaxkv.fork(cache, 2), jaxkv.KVCache)
assert_type(jaxkv.select(mixed, [0]), jaxkv.HybridCache)
assert_type(jaxkv.prefetch(jaxkv.offload(cache)), jaxkv.KVCache)
assert_type(jaxkv.check(cache), jaxkv.KVCache)
assert_type(jaxkv.evict(cache, jaxkv.policies.SinksAndRecent(), tokens=4), jaxkv.KVCache)
with jaxkv.session(config) as session:
    session.cache = jaxkv.advance(session.cache, 1)
    print(session.report())
jaxkv.save(cache, "cache.safetensors")
loaded = jaxkv.load("cache.safetensors")
print(cache.storage["data"].shape, mixed.groups[0].lengths, jaxkv.plan(config), loaded.lengths)

jaxkv.append(cache, keys, values, lyer=0)  # wrong
jaxkv.append(cache, keys, values)  # wrong
jaxkv.append(keys, values, cache, layer=0)  # wrong
jaxkv.attend(cache, queries, layer=0, windw=8)  # wrong
jaxkv.attend(cache, queries, layer="0")  # wrong
jaxkv.advance(cache, "3")  # wrong
jaxkv.truncate(cache)  # wrong
jaxkv.fork(cache, copies=2)  # wrong
jaxkv.create(config, devise=None)  # wrong
jaxkv.create("Llama-3-8B")  # wrong
jaxkv.KVCacheConfig(num_layers=2, max_context_length=16)  # wrong
print(mixed.storage)  # wrong
jaxkv.apend(cache, keys, values, layer=0)  # wrong
