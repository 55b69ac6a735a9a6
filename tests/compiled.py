"""What a compiled program does to a cache, read from the program itself."""

import math
import re

import jax

from tests.haste import AS_USERS_DO

# What may yield an array as large as a cache leaf: instructions that hand one on or write a
# part of it. The inside of every fusion is in the text too, so a fused copy is seen.
_PASS_OR_WRITE_A_PART = {
    "bitcast",
    "dynamic-update-slice",
    "fusion",
    "get-tuple-element",
    "parameter",
    "scatter",
}
_INSTRUCTION = re.compile(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(")


def assert_in_place(compiled, cache, *, temp_share=0.01):
    """The program updates the donated cache where it is: aliased, not copied, not converted."""
    sizes = {math.prod(_local_shape(leaf)) for leaf in cache.storage.values()}
    held = sum(
        math.prod(_local_shape(leaf)) * leaf.dtype.itemsize for leaf in cache.storage.values()
    )
    for shape, opcode in _INSTRUCTION.findall(compiled.as_text()):
        elements = math.prod(int(size) for size in shape.split(",") if size)
        if elements in sizes or elements > max(sizes):
            assert opcode in _PASS_OR_WRITE_A_PART, f"{opcode} of a whole leaf, [{shape}]"
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held, "the cache is not aliased"
    temp = memory.temp_size_in_bytes
    assert temp < temp_share * held, f"temp is {temp / held:.1%} of the cache"


def _local_shape(leaf):
    """Of one device's part."""
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def compile_donating(function, cache, *arguments):
    """The program of ``function(cache, ...)`` with the cache donated; shapes suffice."""
    return compiled_as_users_do(jax.jit(function, donate_argnums=0).lower(cache, *arguments))


def compiled_as_users_do(lowered):
    """The program that XLA makes outside of tests, where nobody is in haste."""
    return lowered.compile(compiler_options=AS_USERS_DO)
