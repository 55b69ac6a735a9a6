"""From the tensors of a file to a cache that is spread over a mesh: on each device its share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxkv.cache.axes import Spread
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.cache.kv_cache import KVCache
from jaxkv.snapshot.fill import fills_of
from jaxkv.snapshot.manifest import Manifest
from jaxkv.snapshot.on_devices import joined, parts_of
from jaxkv.snapshot.parts import Wanted
from jaxkv.snapshot.places import named
from jaxkv.snapshot.split import Share, Split, shares_of


def fill_of_group(
    file: Path,
    saved: Manifest,
    number: int,
    cache: KVCache,
    rows: Sequence[int],
    tensors: dict[str, Any],
) -> Callable[[], KVCache]:
    """What fills one of the kinds of the file, and has checked everything once it is made."""
    group, lengths = saved.kinds[number], saved.lengths_of(number)
    tensors = named(tensors, f"{number}.")
    if cache.spread is None:
        return fills_of(file, group, lengths, cache, rows, tensors).__call__
    split, shares = shares_of(cache.spread, cache.config)
    fills = {}
    for device, part in parts_of(cache).items():
        here = split.sequences(shares[device], cache.config.batch_size or 1)
        chosen = [sequence for sequence, row in enumerate(rows) if row in here]
        heads = split.kv_heads(shares[device], cache.config.num_kv_heads)
        own = _of_share(tensors, chosen, heads, cache.config)
        if (newest := cache.config.newest_config) is not None:
            finer = _of_share(named(tensors, "newest."), chosen, heads, newest)
            own |= {f"newest.{name}": tensor for name, tensor in finer.items()}
        fills[device] = fills_of(
            file,
            group.of_sequences(chosen),
            [lengths[sequence] for sequence in chosen],
            part,
            [rows[sequence] - here.start for sequence in chosen],
            own,
        )
    return lambda: joined(cache, {device: fill() for device, fill in fills.items()})


def wanted_by(cache: AnyCache | None, spread: Spread | None) -> Wanted:
    """Which shares of a file this process needs some of, to fill such a cache."""

    def wanted(config: AnyConfig, split: Split, share: Share) -> bool:
        if spread is None:
            return True
        target, shares = shares_of(spread, config)
        own = {each for device, each in shares.items() if device.process_index == me}
        if cache is not None:  # whose rows are others than those of the file
            target, own = target._replace(batch=1), {each._replace(batch=0) for each in own}
        return any(split.overlaps(share, target, each, config) for each in own)

    me = jax.process_index()
    return wanted


def _of_share(
    tensors: dict[str, Any], sequences: Sequence[int], heads: range, config: KVCacheConfig
) -> dict[str, Any]:
    """The tensors of some sequences, counted anew, of which these heads are asked for."""
    own = {
        f"{number}.{name}": tensor if name == "positions" else tensor.of_heads(heads)
        for number, sequence in enumerate(sequences)
        for name, tensor in named(tensors, f"{sequence}.").items()
    }
    state = {name: tensors[name][:, :, heads.start : heads.stop] for name in config.codec_state}
    return own | state
