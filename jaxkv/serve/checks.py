"""What an engine refuses, before anything changes."""

import numpy as np

from jaxkv.cache.hybrid import AnyConfig
from jaxkv.counts import ceil_div, check_count
from jaxkv.errors import CacheFullError, ConfigError
from jaxkv.paging import Group, PageAllocator
from jaxkv.serve.request import MOST_STOP_TOKENS
from jaxkv.serve.sampling import Sampling


def check_config(
    config: AnyConfig,
    prefill_chunk: int,
    prefill_rows: int,
    decode_steps: int,
    token_budget: int,
    swap_space: int,
) -> tuple[list[Group], int]:
    """The groups of pages that a cache is made of, and their page size."""
    if any(each.codec_state for each in config.cross):
        raise ConfigError(
            "Engine: cross-attention must have a codec that learns nothing, got "
            f"{', '.join(each.codec.name for each in config.cross)}: what it learns from one "
            "request would be in the answers of others."
        )
    if config.states and swap_space:
        raise ConfigError(
            f"Engine: swap_space must be 0, got {swap_space}: this model's layers keep a state, "
            "which is not brought to host memory. Preempted requests are computed again."
        )
    addressings = [group.addressing for group in config.groups]
    groups = [
        Group(paged.num_pages, paged.window)
        for paged in addressings
        if paged.num_pages is not None and not paged.per_head
    ]
    if len(groups) < len(addressings) or config.batch_size is None:
        raise ConfigError(
            "Engine needs a cache with a shared pool of pages and a batch_size, as in "
            "model.cache_config(max_context_length=4096, batch_size=8, "
            f"addressing=jaxkv.Paged(num_pages=1024)), got {addressings} and batch_size "
            f"{config.batch_size}."
        )
    if any(group.placement is not None for group in config.groups):
        raise ConfigError(
            "Engine: its pool must be on the device, got placement in host memory. swap_space "
            "keeps pages of waiting requests there."
        )
    sizes = {paged.page_size for paged in addressings if paged.page_size is not None}
    if len(sizes) > 1:
        raise ConfigError(f"Engine: all groups need the same page_size, got {sorted(sizes)}.")
    for name, number, least in (
        ("prefill_chunk", prefill_chunk, 1),
        ("prefill_rows", prefill_rows, 1),
        ("decode_steps", decode_steps, 1),
        ("token_budget", token_budget, 1),
        ("swap_space", swap_space, 0),
    ):
        check_count(f"Engine: {name}", number, least, ConfigError)
    if decode_steps > prefill_chunk:  # what a window's pool has room for beyond its window
        raise ConfigError(
            f"Engine: decode_steps must be at most prefill_chunk, {prefill_chunk}, got "
            f"{decode_steps}."
        )
    return groups, sizes.pop()


def check_request(
    config: AnyConfig,
    pages: PageAllocator,
    prompt_length: int,
    max_new_tokens: int,
    seed: int,
    stop_tokens: tuple[int, ...],
    sampling: Sampling,
    num_kept: int | None = None,
) -> None:
    """Refuse what could never run.

    Args:
      num_kept: of the prompt, tokens that stay once it is computed; None for all.
    """
    if not isinstance(sampling, Sampling):
        raise TypeError(f"a sampling must be a jaxkv.Sampling, got {sampling!r}.")
    limits = np.iinfo(np.int32)
    if not isinstance(seed, int) or not limits.min <= seed <= limits.max:
        raise ValueError(f"a seed must be an int32, got {seed!r}.")
    check_count("max_new_tokens", max_new_tokens)
    if len(stop_tokens) > MOST_STOP_TOKENS:
        raise ValueError(f"at most {MOST_STOP_TOKENS} stop tokens, got {len(stop_tokens)}.")
    needed, context = prompt_length + max_new_tokens, config.max_context_length
    if needed > context:
        raise CacheFullError(
            f"the prompt and {max_new_tokens} new tokens are {needed} tokens, and the context "
            f"holds {context}. Ask for fewer new tokens or a larger max_context_length."
        )
    if num_kept is None:
        pages.check_fits(needed)
    else:  # first the prompt, and then what stays of it, in whole pages, and the answer
        pages.check_fits(prompt_length)
        stay = ceil_div(num_kept, pages.page_size) * pages.page_size
        pages.check_fits(stay + max_new_tokens)
