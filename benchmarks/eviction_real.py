"""What eviction costs a released model, SmolLM2-135M-Instruct: `jaxkv.evaluation` by policy.

Contexts of 512 tokens of Python's help texts, in which sentences with numbers stand. Each is read
once, and compressed by all policies; a context of a task takes some 12 s of one core. `--table` and
`--row` choose what is measured, and `--known` takes rows of earlier runs.
"""

from collections.abc import Iterator

from benchmarks.report import Pieces, Row, Table
from jaxkv.evaluation import KVZIP, Score, evaluate
from jaxkv.models import load
from jaxkv.policies import POLICIES, ExpectedAttention, Policy, QueryWindow
from tests.real.checkpoint import smollm2

_SHARES = (0.5, 0.25, 0.1)
_CONTEXT = 512
_QUESTION = 8  # tokens, some
_FOLLOWING = 64  # tokens that queries to come are expected from
_SAMPLES, _FEW_SAMPLES = 8, 1
_BEST = "keydiff"  # of recall: it is measured beside codecs
_CODECS = ("int8-centred", "stair4")


def run(quick: bool, pieces: Pieces) -> Iterator[Table]:
    """A table for questions that are known and one for those that are not, and so beside codecs."""
    model, tokenizer = load(smollm2())
    samples = _FEW_SAMPLES if quick else _SAMPLES
    for what, codecs in (("Eviction", ("float32",)), ("Eviction beside codecs", _CODECS)):
        for question in ("known", "unknown"):
            title = f"{what}: SmolLM2-135M-Instruct, question {question}"
            if not pieces.has_table(title):
                continue
            policies = _policies(model)
            if codecs == _CODECS:
                policies = {_BEST: policies[_BEST]}
            rows = pieces.known_rows(title)
            known = {row["policy"] for row in rows}
            for codec in codecs:
                asked = {
                    name: policy
                    for name, policy in policies.items()
                    if pieces.has_row(_named(name, codec)) and _named(name, codec) not in known
                }
                if asked:
                    scores = evaluate(
                        model,
                        tokenizer,
                        asked,
                        keep=_SHARES,
                        context=_CONTEXT,
                        samples=samples,
                        codec=codec,
                        question_known=question == "known",
                    )
                    new = [_row(score, codec) for score in scores]
                    rows += [row for row in new if row["policy"] not in known]
            yield Table(title, rows, [_note(samples)])


def _policies(model) -> dict[str, Policy | str]:
    """All that are shipped but the oracle, which is told what will be asked."""
    frequencies = tuple(model.config.rope.frequencies(2 * _CONTEXT).tolist())
    shipped = {name: policy for name, policy in POLICIES.items() if name != "oracle"}
    expected = ExpectedAttention(frequencies, future=_FOLLOWING)
    return {
        **shipped,
        "expected_attention": expected,
        "snapkv, 8 queries": QueryWindow(window=_QUESTION),
        KVZIP: KVZIP,
    }


def _named(policy: str, codec: str) -> str:
    return policy if codec == "float32" else f"{policy}, {codec}"


def _row(score: Score, codec: str) -> Row:
    return {
        "policy": _named(score.policy, codec),
        "kept": f"{score.keep:.0%}",
        "needle": score.needle,
        "+-": score.needle_interval,
        "multi-key": score.multi_key,
        "+- ": score.multi_key_interval,
        "perplexity": score.perplexity,
        "nats more": score.nats_more,
        "+-  ": score.nats_interval,
        "bytes": score.cache_bytes,
    }


def _note(samples: int) -> str:
    return (
        f"{samples} contexts of {_CONTEXT} tokens of each task. Needle: one sentence with a number "
        "in a text; multi-key: eight, of which one is asked for. Nats a token more than with "
        "nothing dropped on 64 tokens that follow a text. +-: half the interval of 95 % over "
        "contexts. The first 4 tokens always stay."
    )
