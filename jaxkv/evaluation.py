"""What a policy costs a model: recall of what a context says, and perplexity of what follows."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.attention.observed import observed
from jaxkv.cache.create import create
from jaxkv.cache.hybrid import AnyCache
from jaxkv.compression.compress import compress
from jaxkv.counts import check_count
from jaxkv.policies import Policy, named_policy

NOTHING_DROPPED = "nothing dropped"
_PAIRS = 8  # of the multi-key task
_FOLLOWING = 64  # tokens after a context whose perplexity is taken


class Score(NamedTuple):
    """What a model still knows of contexts of which a share was kept.

    Attributes:
      policy: its name.
      keep: the share.
      needle: of the answers, those that are right, where a context tells one number.
      multi_key: where it tells eight, and one is asked for.
      perplexity: of a text's next 64 tokens, per token.
      cache_bytes: of the compressed cache, with room for what follows.
    """

    policy: str
    keep: float
    needle: float
    multi_key: float
    perplexity: float
    cache_bytes: int


class _Sample(NamedTuple):
    """A context, all of one length, and what follows."""

    context: list[int]
    following: list[int]


def evaluate(
    model: Any,
    tokenizer: Any,
    policies: Mapping[str, Policy | str],
    *,
    keep: Sequence[float] = (0.5,),
    context: int = 512,
    samples: int = 8,
    text: str | None = None,
    codec: Any = None,
    seed: int = 0,
) -> list[Score]:
    """Ask a model about contexts that policies have compressed.

    Needle: a sentence with a number stands somewhere in a text, whose end asks for it; Kamradt,
    "Needle in a haystack" (2023). Multi-key: eight sentences, of which one is asked for; Hsieh et
    al., "RULER" (2024), section 3. An answer is right if each of its tokens is the most likely
    one. The question is part of the context, so policies that look at its end see it.

    Args:
      model: of `jaxkv.models`, or with a ``cache_config`` and calls like theirs.
      tokenizer: a `tokenizers.Tokenizer`.
      policies: by the name that they have in the result, as values or names of
        `jaxkv.policies.POLICIES`.
      keep: shares of the tokens that stay.
      context: tokens of each context.
      samples: contexts of each task.
      text: what contexts are made of; the help texts of Python itself if None.
      codec: of the cache; the model's choice if None.
      seed: of the numbers and of where they stand.

    Returns:
      First a row with nothing dropped, then one for each policy and share.

    Raises:
      ValueError: a text too short, a context too short for its sentences, or a policy or share
        that cannot be.
    """
    check_count("evaluate: samples", samples)
    tasks = _tasks(tokenizer, text, context, samples, np.random.default_rng(seed))
    longest = max(len(sample.following) for task in tasks for sample in task)
    own = {name: named_policy(policy) for name, policy in policies.items()}
    config = model.cache_config(max_context_length=context + longest + 1, codec=codec)
    prefill, step = jax.jit(observed(model)), jax.jit(model)

    def run(policy: Policy | None, name: str, share: float) -> Score:
        found = []
        for task in tasks:
            results = []
            for sample in task:
                tokens = jnp.asarray(sample.context[:-1], jnp.int32)
                _, cache, queries = prefill(tokens, create(config))
                if policy is not None:
                    size = max(1, round(share * len(tokens)))
                    cache = compress(cache, policy, keep=size, new=longest + 1, queries=queries)
                results.append(_likelihood(step, cache, sample, longest))
            found.append(results)
        needle, multi_key, following = found
        return Score(
            name,
            share,
            float(np.mean([right for right, _ in needle])),
            float(np.mean([right for right, _ in multi_key])),
            float(np.exp(-np.mean([mean for _, mean in following]))),
            cache.size_bytes,
        )

    scores = [run(None, NOTHING_DROPPED, 1.0)]
    return scores + [run(policy, name, share) for name, policy in own.items() for share in keep]


def _likelihood(
    step: Callable[..., Any], cache: AnyCache, sample: _Sample, longest: int
) -> tuple[bool, float]:
    """Is each following token the most likely one, and their mean log-probability."""
    count = len(sample.following)
    tokens = np.zeros(longest + 1, np.int32)
    tokens[: count + 1] = [sample.context[-1], *sample.following]
    logits = step(jnp.asarray(tokens), cache)[0][:count].astype(jnp.float32)
    expected = jnp.asarray(sample.following)
    right = (logits.argmax(axis=-1) == expected).all()
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), expected[:, None], axis=-1)
    return bool(right), float(logprobs.mean())


def _tasks(
    tokenizer: Any, text: str | None, context: int, samples: int, rng: np.random.Generator
) -> tuple[list[_Sample], list[_Sample], list[_Sample]]:
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    start = tokenizer.encode("").ids  # a token that begins each text, where there is one
    body = encode(_help_texts() if text is None else text).ids
    needed = context + _FOLLOWING
    if len(body) < needed:
        raise ValueError(
            f"evaluate: the text has {len(body)} tokens, and contexts of {context} need {needed}."
        )

    def told(pairs: int) -> _Sample:
        names = rng.choice(len(_NAMES), pairs, replace=False)
        numbers = rng.integers(1000, 10_000, pairs)
        facts = [
            encode(f"\nThe number of {_NAMES[name]} is {number}.\n").ids
            for name, number in zip(names, numbers, strict=True)
        ]
        question = f"\nThe number of {_NAMES[names[0]]} is"
        whole, asked = encode(f"{question} {numbers[0]}").ids, encode(question).ids
        same = [one == other for one, other in zip(whole, asked, strict=False)]
        asked = whole[: same.index(False) if False in same else len(same)]
        size = context - len(start) - len(asked) - sum(map(len, facts))
        if size < 0:
            raise ValueError(
                f"evaluate: a context of {context} tokens is too short for {pairs} sentences."
            )
        filler = _piece(body, size, rng)
        places = sorted(rng.integers(0, size + 1, pairs).tolist(), reverse=True)
        for place, fact in zip(places, rng.permutation(len(facts)), strict=True):
            filler[place:place] = facts[fact]
        return _Sample([*start, *filler, *asked], whole[len(asked) :])

    def plain() -> _Sample:
        piece = _piece(body, needed - len(start), rng)
        return _Sample([*start, *piece[:-_FOLLOWING]], piece[-_FOLLOWING:])

    return (
        [told(1) for _ in range(samples)],
        [told(_PAIRS) for _ in range(samples)],
        [plain() for _ in range(samples)],
    )


def _piece(body: list[int], size: int, rng: np.random.Generator) -> list[int]:
    at = int(rng.integers(0, len(body) - size + 1))
    return body[at : at + size]


def _help_texts() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


_NAMES = (
    *("Amber", "Basil", "Cedar", "Daisy", "Ember", "Fern", "Ginger", "Hazel"),
    *("Iris", "Jade", "Kelp", "Laurel", "Maple", "Nettle", "Olive", "Poppy"),
)
