"""Logits of transformers for the tiny models of `tests/models/variants.py`.

Run ``python -m benchmarks.make_goldens`` (needs the extra ``peers``) after adding a variant. It
writes one compressed file of float32 logits that the tests hold jaxkv's models to.
"""

import numpy as np

from tests.models.variants import GOLDENS, VARIANTS, hf_config, token_ids, weights


def golden_logits(variant: str) -> np.ndarray:
    """Teacher-forced logits ``[tokens, vocab]`` of a variant, by transformers in float32."""
    import torch
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    fields = hf_config(variant)
    fields.pop("quantization_config", None)  # its weights are given dequantized
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = {name: torch.from_numpy(tensor) for name, tensor in weights(variant).items()}
    for blocks in [name for name in tensors if name.endswith("_blocks")]:
        name = blocks.removesuffix("_blocks")
        packed = tensors.pop(blocks), tensors.pop(f"{name}_scales")
        tensors[name] = convert_moe_packed_tensors(*packed, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{variant}: transformers misses {missing}, does not know {unexpected}")
    with torch.no_grad():
        ids = torch.from_numpy(token_ids(variant).astype(np.int64))[None]
        return model.eval()(ids, use_cache=False).logits[0].float().numpy()


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    logits = {variant: golden_logits(variant) for variant in VARIANTS}
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, made_by=np.array(versions), **logits)
    print(f"{GOLDENS}: {len(logits)} variants, {GOLDENS.stat().st_size} bytes, by {versions}")


if __name__ == "__main__":
    main()
