"""Verbs of one cache for one of several groups of layers, and for one device's part of it."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from jaxkv.cache.hybrid import AnyCache, SameCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.shards import where_it_is

_Options = ParamSpec("_Options")
_Result = TypeVar("_Result")


def in_its_group(
    verb: Callable[Concatenate[KVCache, _Options], _Result],
) -> Callable[Concatenate[AnyCache, _Options], _Result]:
    """Let a verb with ``layer=`` read the group that has the layer."""

    @functools.wraps(verb)
    def on_any_cache(
        cache: AnyCache, *arguments: _Options.args, **options: _Options.kwargs
    ) -> _Result:
        group, options["layer"] = cache.config.locate(options["layer"])
        return where_it_is(verb, cache.groups[group], *arguments, **options)

    return on_any_cache


def changing_its_group(
    verb: Callable[Concatenate[KVCache, _Options], KVCache],
) -> Callable[Concatenate[SameCache, _Options], SameCache]:
    """Let a verb with ``layer=`` change the group that has the layer."""

    @functools.wraps(verb)
    def on_any_cache(
        cache: SameCache, *arguments: _Options.args, **options: _Options.kwargs
    ) -> SameCache:
        number, options["layer"] = cache.config.locate(options["layer"], to_write=True)
        groups = list(cache.groups)
        groups[number] = where_it_is(verb, groups[number], *arguments, **options)
        return cache.with_groups(groups)  # type: ignore[return-value]

    return on_any_cache


def in_every_group_of_tokens(
    verb: Callable[Concatenate[KVCache, _Options], KVCache],
) -> Callable[Concatenate[SameCache, _Options], SameCache]:
    """Let a verb that changes keys and values change every group; states stay as they are."""

    @functools.wraps(verb)
    def on_any_cache(
        cache: SameCache, *arguments: _Options.args, **options: _Options.kwargs
    ) -> SameCache:
        groups = [where_it_is(verb, group, *arguments, **options) for group in cache.groups]
        return cache.with_groups(groups)  # type: ignore[return-value]

    return on_any_cache


def in_every_group(
    verb: Callable[Concatenate[KVCache, _Options], KVCache],
) -> Callable[Concatenate[SameCache, _Options], SameCache]:
    """Let a verb that goes on with a text, or back in it, change every group and kind of state.

    A `StateCache` has what such a verb asks of a cache, so no verb has a case for it. What
    cross-attention reads is of no token of the text, and stays as it is.
    """
    return _changing(verb, lambda cache: (cache.groups, cache.states))


def in_every_kind(
    verb: Callable[Concatenate[KVCache, _Options], KVCache],
) -> Callable[Concatenate[SameCache, _Options], SameCache]:
    """Let a verb of whole sequences change all that is kept: what cross-attention reads too."""
    return _changing(verb, lambda cache: (cache.groups, cache.states, cache.cross))


def _changing(
    verb: Callable[Concatenate[KVCache, _Options], KVCache],
    kinds_of: Callable[[AnyCache], tuple[Any, ...]],
) -> Callable[Concatenate[SameCache, _Options], SameCache]:
    @functools.wraps(verb)
    def on_any_cache(
        cache: SameCache, *arguments: _Options.args, **options: _Options.kwargs
    ) -> SameCache:
        changed = (
            [where_it_is(verb, each, *arguments, **options) for each in kind]
            for kind in kinds_of(cache)
        )
        return cache.with_groups(*changed)  # type: ignore[return-value]

    return on_any_cache
