"""What a policy costs a model: recall of what a context says, and perplexity of what follows."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxkv.attention.observed import observed
from jaxkv.cache.create import create
from jaxkv.cache.hybrid import AnyCache
from jaxkv.compression.compress import compress
from jaxkv.counts import check_count
from jaxkv.policies import Policy, named_policy, reconstruction_scores
from jaxkv.serve.model_step import ModelStep, Weights

NOTHING_DROPPED = "nothing dropped"
KVZIP = "kvzip"  # no policy, but scores that the model gives: `jaxkv.reconstruction_scores`
_PAIRS = 8  # of the multi-key task
_FOLLOWING = 64  # tokens after a context whose perplexity is taken
_SHORT = 32  # tokens of a step that is long enough for most questions and answers
_IN_95_PERCENT = 1.96  # standard errors


class Score(NamedTuple):
    """What a model still knows of contexts of which a share was kept.

    Intervals are half the width of those of 95 %, over contexts: Agresti and Coull's of a share
    (1998), the normal one of a mean.

    Attributes:
      policy: its name.
      keep: the share.
      needle: of the answers, those that are right, where a context tells one number.
      multi_key: where it tells eight, and one is asked for.
      perplexity: of a text's next 64 tokens, per token.
      cache_bytes: of the compressed cache, with room for what follows.
      needle_interval, multi_key_interval: of the two shares.
      nats_more: per token of the text, than with nothing dropped; context by context.
      nats_interval: of its mean; None of one context, which says nothing of others.
    """

    policy: str
    keep: float
    needle: float
    multi_key: float
    perplexity: float
    cache_bytes: int
    needle_interval: float
    multi_key_interval: float
    nats_more: float
    nats_interval: float | None


class _Sample(NamedTuple):
    """A context, all of one length, a question that it does not hold, and what follows."""

    context: list[int]
    question: list[int]
    following: list[int]


class _Answer(NamedTuple):
    """Was each following token the most likely one, and their mean log-probability."""

    right: bool
    logprob: float


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
    question_known: bool = True,
) -> list[Score]:
    """Ask a model about contexts that policies have compressed.

    Needle: a sentence with a number stands somewhere in a text, which is asked for; Kamradt,
    "Needle in a haystack" (2023). Multi-key: eight sentences, of which one is asked for; Hsieh et
    al., "RULER" (2024), section 3. An answer is right if each of its tokens is the most likely
    one.

    Args:
      model: of `jaxkv.models`, or with a ``cache_config`` and calls like theirs.
      tokenizer: a `tokenizers.Tokenizer`.
      policies: by the name that they have in the result, as values or names of
        `jaxkv.policies.POLICIES`, or ``"kvzip"``, which is `jaxkv.reconstruction_scores` with
        as many tokens in each head, and no prompt that asks for repetition.
      keep: shares of the tokens that stay.
      context: tokens of each context.
      samples: contexts of each task.
      text: what contexts are made of; the help texts of Python itself if None.
      codec: of the cache; the model's choice if None.
      seed: of the numbers and of where they stand.
      question_known: whether the question is the end of the context, so that policies that look
        there see it; if not, it comes once the context is compressed.

    Returns:
      First a row with nothing dropped, then one for each policy and share.

    Raises:
      ValueError: a text too short, a context too short for its sentences, or a policy or share
        that cannot be.
    """
    check_count("evaluate: samples", samples)
    rng = np.random.default_rng(seed)
    tasks = _tasks(tokenizer, text, context, samples, rng, question_known=question_known)
    own = {
        name: policy if policy == KVZIP else named_policy(policy)
        for name, policy in policies.items()
    }
    settings = [(name, policy, share) for name, policy in own.items() for share in keep]
    asked = _Asked(model, context, tasks, codec, reads_again=KVZIP in own.values())
    answers = [[asked.answers(sample, settings) for sample in task] for task in tasks]
    whole = [[of_sample[0] for of_sample in task] for task in answers]
    labels = [(NOTHING_DROPPED, 1.0), *((name, share) for name, _, share in settings)]
    return [
        _score(*label, whole, [[of_sample[number] for of_sample in task] for task in answers], size)
        for number, (label, size) in enumerate(zip(labels, asked.sizes, strict=True))
    ]


class _Asked:
    """A model, asked about one context after another: each is read once for all policies."""

    def __init__(
        self,
        model: Any,
        context: int,
        tasks: tuple[list[_Sample], ...],
        codec: Any,
        *,
        reads_again: bool,
    ):
        self._model, self._weights = model, Weights.of(model)
        self._new = 1 + max(_num_fed(sample) for task in tasks for sample in task)
        room = context + max(self._new, context if reads_again else 0)
        whole = model.cache_config(max_context_length=context + self._new, codec=codec)
        self._config = model.cache_config(max_context_length=room, codec=codec)
        self.sizes = [whole.size_bytes]

    def answers(self, sample: _Sample, settings: list[tuple[str, Any, float]]) -> list[_Answer]:
        """With nothing dropped, and for each policy and share; `sizes` has their caches' bytes."""
        tokens = jnp.asarray(sample.context[:-1], jnp.int32)
        cache, queries = _read(self._weights, tokens, create(self._config))
        answers, sizes, scores = [self._answer(cache, sample)], self.sizes[:1], None
        for _, policy, share in settings:
            size = max(1, round(share * len(tokens)))
            if policy == KVZIP:
                if scores is None:
                    scores = reconstruction_scores(self._model, tokens, cache, chunk=len(tokens))
                small = compress(cache, scores, keep=size, new=self._new)
            else:
                small = compress(cache, policy, keep=size, new=self._new, queries=queries)
            answers.append(self._answer(small, sample))
            sizes.append(small.size_bytes)
        self.sizes = sizes
        return answers

    def _answer(self, cache: AnyCache, sample: _Sample) -> _Answer:
        before, count = len(sample.question), len(sample.following)
        tokens = np.zeros(_SHORT if _num_fed(sample) < _SHORT else self._new, np.int32)
        tokens[: 1 + _num_fed(sample)] = [sample.context[-1], *sample.question, *sample.following]
        logits = _told(self._weights, jnp.asarray(tokens), cache)[before : before + count]
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
        expected = jnp.asarray(sample.following)
        right = (logits.argmax(axis=-1) == expected).all()
        mean = jnp.take_along_axis(logprobs, expected[:, None], axis=-1).mean()
        return _Answer(bool(right), float(mean))


@functools.partial(ModelStep, donated=[])
def _read(model: Any, tokens: Array, cache: AnyCache) -> tuple[AnyCache, Any]:
    """The cache after a context, and its queries."""
    return observed(model)(tokens, cache)[1:]


@functools.partial(ModelStep, donated=[])
def _told(model: Any, tokens: Array, cache: AnyCache) -> Array:
    return model(tokens, cache)[0]


def _num_fed(sample: _Sample) -> int:
    return len(sample.question) + len(sample.following)


def _score(
    policy: str, keep: float, whole: list[list[_Answer]], answers: list[list[_Answer]], size: int
) -> Score:
    needle, multi_key, following = answers
    more = [
        before.logprob - after.logprob for before, after in zip(whole[2], following, strict=True)
    ]
    return Score(
        policy,
        keep,
        float(np.mean([answer.right for answer in needle])),
        float(np.mean([answer.right for answer in multi_key])),
        float(np.exp(-np.mean([answer.logprob for answer in following]))),
        size,
        _share_interval([answer.right for answer in needle]),
        _share_interval([answer.right for answer in multi_key]),
        float(np.mean(more)),
        _mean_interval(more),
    )


def _share_interval(right: list[bool]) -> float:
    count = len(right) + _IN_95_PERCENT**2
    share = (sum(right) + _IN_95_PERCENT**2 / 2) / count
    return float(_IN_95_PERCENT * (share * (1 - share) / count) ** 0.5)


def _mean_interval(numbers: list[float]) -> float | None:
    if len(numbers) == 1:
        return None
    return float(_IN_95_PERCENT * np.std(numbers, ddof=1) / len(numbers) ** 0.5)


def _tasks(
    tokenizer: Any,
    text: str | None,
    context: int,
    samples: int,
    rng: np.random.Generator,
    *,
    question_known: bool = True,
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
        inside, after = (asked, []) if question_known else ([], asked)
        size = context - len(start) - len(inside) - sum(map(len, facts))
        if size < 0:
            raise ValueError(
                f"evaluate: a context of {context} tokens is too short for {pairs} sentences."
            )
        filler = _piece(body, size, rng)
        places = sorted(rng.integers(0, size + 1, pairs).tolist(), reverse=True)
        for place, fact in zip(places, rng.permutation(len(facts)), strict=True):
            filler[place:place] = facts[fact]
        return _Sample([*start, *filler, *inside], after, whole[len(asked) :])

    def plain() -> _Sample:
        piece = _piece(body, needed - len(start), rng)
        return _Sample([*start, *piece[:-_FOLLOWING]], [], piece[-_FOLLOWING:])

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
