"""Requests that share one small pool, and what is looked at between the rounds of an engine."""

import dataclasses

import jax.numpy as jnp
import numpy as np

import jaxkv

CONTEXT, PAGE, CHUNK, ROWS = 160, 8, 16, 4
PAGES = 18  # fewer than the requests below would take: some have to wait, or make room
START = [7, 3, 9, 1, 8] * 8  # 40 tokens that several prompts share
PROMPTS = [
    [5],
    [*START, 11, 12, 13],
    [1, 2, 3, 4, 5, 6, 7],
    [*START, 21],
    [9] * 33,
    [*START, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21],
    [2, 4],
    [*START, 11, 12, 13],
]
NEW = 24
HOT = jaxkv.Sampling(temperature=1.5, top_k=20)


def engine(model, num_pages=PAGES, codec="float32", **options):
    config = model.cache_config(
        max_context_length=CONTEXT,
        batch_size=ROWS,
        codec=jaxkv.codecs.CODECS[codec],
        addressing=jaxkv.Paged(PAGE, num_pages),
    )
    options = {"prefill_chunk": CHUNK, "decode_steps": 4, "token_budget": 48} | options
    return jaxkv.Engine(model, config, **options)


def submit_all(running, new=NEW):
    return [
        running.submit(prompt, max_new_tokens=new, seed=seed) for seed, prompt in enumerate(PROMPTS)
    ]


def poison_blank(running):
    """NaN in every page that nobody holds and nothing can find."""
    groups = []
    for number, cache in enumerate(running.cache.groups):
        pools = [books.groups[number].pool for books in running.pages]
        blank = [
            not count and page not in pool.index.contents
            for pool in pools
            for page, count in enumerate(pool.references)
        ]
        storage = {
            name: jnp.where(
                np.repeat(blank, PAGE).reshape(-1, *[1] * (leaf.ndim - 3)),
                jnp.asarray(np.nan if leaf.dtype == jnp.float32 else 127).astype(leaf.dtype),
                leaf,
            )
            for name, leaf in cache.storage.items()
        }
        groups.append(dataclasses.replace(cache, storage=storage))
    running._held.cache = running.cache.with_groups(groups)


def run(running):
    """To the end, the books proved and the free pages poisoned before each round."""
    while running.busy:
        poison_blank(running)
        running.step()
        running.pages.check()
    usage = running.pages.usage()
    assert (usage.held_pages, usage.num_requests) == (0, 0)


def contents(running, request, length):
    """The stored keys and values of a request's tokens, whatever pages they are in, as bytes."""
    pages = running.pages[0].table(request.number)
    slots = (pages[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:length]
    return {name: np.asarray(leaf)[:, :, slots] for name, leaf in running.cache.storage.items()}


def outcome(running, prompt, seed):
    """What a request leaves: its tokens, log-probabilities and stored prompt, bit for bit."""
    request = running.submit(prompt, max_new_tokens=9, seed=seed)
    stored = None
    while not request.done:
        running.step()
        running.pages.check()
        if request.tokens and not request.done:
            stored = contents(running, request, len(prompt) - 1)
    return request, (request.tokens, request.logprobs, stored)
