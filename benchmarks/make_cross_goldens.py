"""Logits of transformers for the tiny decoders of `tests/models/crossing.py`.

Run ``python -m benchmarks.make_cross_goldens`` (needs the extra ``peers``) after changing one.
"""

from typing import Any

import numpy as np

from tests.models.crossing import (
    CONFIGS,
    GOLDENS,
    IMAGE_BEGINS,
    LENGTHS,
    NUM_TOKENS,
    encoded,
    tensor_of,
    texts,
)


def golden_logits(kind: str) -> np.ndarray:
    """Teacher-forced logits ``[3, tokens, vocabulary]``, each text by itself, in float32."""
    import torch

    model = _model(kind)
    rows = zip(texts(kind), encoded(kind), LENGTHS[kind], IMAGE_BEGINS, strict=True)
    with torch.no_grad():
        logits = [
            model(**_inputs(kind, torch.from_numpy(ids.astype(np.int64))[None], states, *beside))
            for ids, states, *beside in rows
        ]
    return np.stack([each.logits[0].numpy() for each in logits])


def _inputs(kind: str, ids: Any, states: np.ndarray, length: int, begins: int) -> dict[str, Any]:
    import torch
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

    made = torch.from_numpy(states)[None, :length]
    if kind != "mllama":
        encoder_outputs = BaseModelOutput(last_hidden_state=made)
        return {"decoder_input_ids": ids, "encoder_outputs": encoder_outputs, "use_cache": False}
    if length == 0:
        return {"input_ids": ids}
    seen = (torch.arange(NUM_TOKENS) >= begins).long()[None, :, None, None]
    masks = _prepare_cross_attention_mask(seen, num_vision_tokens=length, dtype=torch.float32)
    return {
        "input_ids": ids,
        "cross_attention_states": made,
        **dict(zip(("cross_attention_mask", "full_text_row_masked_out_mask"), masks, strict=True)),
    }


def _model(kind: str) -> Any:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIGS[kind], attn_implementation="eager")
    made: Any = {
        "whisper": transformers.WhisperForConditionalGeneration,
        "bart": transformers.BartForConditionalGeneration,
        "t5": transformers.T5ForConditionalGeneration,
        "mllama": transformers.MllamaForCausalLM,
    }[kind]
    model = made(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(tensor_of(kind, _named(name), *parameter.shape)))
    return model.eval()


def _named(name: str) -> str:
    """The embedding that encoder and decoder share goes by the decoder's name."""
    return "model.decoder.embed_tokens.weight" if name == "model.shared.weight" else name


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    logits = {kind: golden_logits(kind) for kind in CONFIGS}
    np.savez_compressed(GOLDENS, made_by=np.array(versions), **logits)
    print(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes, by {versions}")


if __name__ == "__main__":
    main()
