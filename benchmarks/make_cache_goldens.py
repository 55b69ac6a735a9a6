"""What the caches of transformers hold, for the default config of each of its decoders of texts.

Run ``python -m benchmarks.make_cache_goldens`` (needs the extra ``peers``) with a new transformers.
It writes what `tests/test_hf_families.py` holds planned caches to, with transformers and without.
"""

import gzip
import itertools
import json
from typing import Any

from tests.hf_caches import CHANGED, GOLDENS, config_of, kept_by_transformers, model_types

# Nested configs that planning has nothing to do with are left out, and so are the names of classes.
_KEPT = ("text_config", "attn_config", "per_layer_config")


def record(model_type: str, changed: dict[str, Any]) -> dict[str, Any]:
    """A config and what its layers keep, equal neighbours counted; None if transformers fails."""
    fields, layers = {"model_type": model_type}, None
    try:
        config = config_of(model_type, **changed)
        fields = config.to_dict()
        runs = itertools.groupby(kept_by_transformers(config))
        layers = [[layer, len(list(run))] for layer, run in runs]
    except Exception as error:  # whatever its own defaults run into
        print(f"{model_type}: {type(error).__name__}: {str(error)[:100]}")
    return {"of": model_type, "changed": changed, "config": _without(fields), "layers": layers}


def _without(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without(value) if name == "text_config" and value else value
        for name, value in fields.items()
        if name not in ("id2label", "label2id")
        and (name in _KEPT or not (isinstance(value, dict) and name.endswith("_config")))
    }


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cases = [(model_type, {}) for model_type in model_types()] + CHANGED
    records = [record(model_type, changed) for model_type, changed in cases]
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    GOLDENS.parent.mkdir(exist_ok=True)
    text = json.dumps({"made_by": made_by, "caches": records}, default=str)
    GOLDENS.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{GOLDENS}: {len(records)} configs, {GOLDENS.stat().st_size} bytes, by {made_by}")


if __name__ == "__main__":
    main()
