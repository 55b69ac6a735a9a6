"""What the caches of transformers hold, for configs of each of its decoders of texts.

Run ``python -m benchmarks.make_cache_goldens`` (needs the extra ``peers``) with a new transformers.
It writes what `tests/models/test_hf_families.py` holds planned caches to, without torch. Names of
families make it record those anew and keep the others.
"""

import gzip
import itertools
import json
import signal
import sys
from typing import Any

from jaxkv.models.hf_families import BY_MODEL_TYPE
from tests.models.hf_caches import (
    CHANGED,
    GOLDENS,
    Layer,
    config_of,
    decoder_of,
    kept_by_transformers,
    model_types,
)

# Nested configs that planning has nothing to do with are left out, and so are the names of classes.
_KEPT = ("text_config", "attn_config", "per_layer_config")
_SECONDS = 120  # of the processor, a config


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """Family, size and changed fields; of a family that no row plans, the default is enough."""
    made = [(kind, "default", {}) for kind in model_types()]
    made += [(kind, "tiny", {}) for kind in model_types() if kind in BY_MODEL_TYPE]
    return made + [(kind, "default", changed) for kind, changed in CHANGED]


def record(model_type: str, size: str, changed: dict[str, Any]) -> dict[str, Any]:
    """A config and what its layers keep, equal neighbours counted; or why transformers fails."""
    made: dict[str, Any] = {"of": model_type, "size": size, "changed": changed}
    fields: dict[str, Any] = {"model_type": model_type}
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        config = config_of(model_type, tiny=size == "tiny", **changed)
        fields = config.to_dict()
        runs = itertools.groupby(_kept(config, size))
        made["layers"] = [[layer, len(list(run))] for layer, run in runs]
    except Exception as error:  # whatever its own defaults run into
        made["why"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(model_type, size, made.get("why") or f"{made['layers']!s:.120}", flush=True)
    return made | {"config": _without(fields)}


def _kept(config: Any, size: str) -> list[Layer]:
    """By a model without memory; by a tiny one on the CPU where what it does depends on data."""
    try:
        return kept_by_transformers(config, "meta")
    except Exception:
        if size != "tiny" or config is not decoder_of(config):
            raise  # too large for the CPU, if only for what sees or hears
        return kept_by_transformers(config)


def _without(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without(value) if name == "text_config" and value else value
        for name, value in fields.items()
        if name not in ("id2label", "label2id")
        and (name in _KEPT or not (isinstance(value, dict) and name.endswith("_config")))
    }


def _out_of_time(*signalled: Any) -> None:
    raise TimeoutError(f"more than {_SECONDS} seconds")


def main(named: list[str]) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, _out_of_time)
    old = json.loads(gzip.decompress(GOLDENS.read_bytes()))["caches"] if named else []
    records = [one for one in old if one["of"] not in named]
    records += [record(*case) for case in cases() if not named or case[0] in named]
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    GOLDENS.parent.mkdir(exist_ok=True)
    text = json.dumps({"made_by": made_by, "caches": records}, default=str)
    GOLDENS.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{GOLDENS}: {len(records)} configs, {GOLDENS.stat().st_size} bytes, by {made_by}")


if __name__ == "__main__":
    main(sys.argv[1:])
