"""Logits of transformers for the tiny models of `tests/models/variants.py`.

Run ``python -m benchmarks.make_goldens`` (needs the extra ``peers``) after adding a variant, for
all or with names for some. It writes one compressed file of float32 logits that the tests hold
jaxkv's models to.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.variants import (
    GOLDENS,
    VARIANTS,
    hf_config,
    token_ids,
    weights,
    write_checkpoint,
)


def golden_logits(variant: str) -> np.ndarray:
    """Teacher-forced logits ``[tokens, vocab]`` of a variant, by transformers in float32."""
    import torch

    packed = "quantization_config" in VARIANTS[variant]
    model = _with_unpacked(variant) if packed else _loaded(variant)
    with torch.no_grad():
        ids = torch.from_numpy(token_ids(variant).astype(np.int64))[None]
        # Without a cache no layer reads another's keys and values.
        shares = "num_kv_shared_layers" in VARIANTS[variant]
        return model.eval()(ids, use_cache=shares).logits[0].float().numpy()


def _loaded(variant: str) -> Any:
    """As transformers reads a checkpoint, the names of its tensors included."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            write_checkpoint(variant, Path(folder)),
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    if any(info.values()):
        raise SystemExit(f"{variant}: transformers does not read it whole: {info}")
    for module in model.modules():  # which DeepSeek-V2's router of groups reads, and 5.2 lacks
        if hasattr(module, "topk_method") and not hasattr(module, "num_experts"):
            module.num_experts = model.config.n_routed_experts
    if model.config.model_type == "bamba":  # whose rope 5.2 lets turn whole heads, unlike 4.48
        rope = model.config.rope_parameters
        dim = int(model.config.hidden_size / model.config.num_attention_heads * 0.5)
        powers = torch.arange(0, dim, 2).float() / dim
        model.model.rotary_emb.inv_freq = 1 / rope["rope_theta"] ** powers
    return model


def _with_unpacked(variant: str) -> Any:
    """MXFP4 as floats, which transformers makes of it on GPUs alone."""
    import torch
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    fields = hf_config(variant)
    del fields["quantization_config"]
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = {name: torch.from_numpy(tensor) for name, tensor in weights(variant).items()}
    for blocks in [name for name in tensors if name.endswith("_blocks")]:
        name = blocks.removesuffix("_blocks")
        packed = tensors.pop(blocks), tensors.pop(f"{name}_scales")
        tensors[name] = convert_moe_packed_tensors(*packed, dtype=torch.float32)
    model.load_state_dict(tensors)
    return model


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    named = sys.argv[1:]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    with np.load(GOLDENS) as file:
        kept = {name: file[name] for name in file if named and name in VARIANTS}
        made_by = f"{file['made_by']}; {', '.join(named)}: {versions}" if named else versions
    logits = kept | {variant: golden_logits(variant) for variant in named or VARIANTS}
    np.savez_compressed(GOLDENS, made_by=np.array(made_by), **logits)
    print(f"{GOLDENS}: {len(logits)} variants, {GOLDENS.stat().st_size} bytes, by {made_by}")


if __name__ == "__main__":
    main()
