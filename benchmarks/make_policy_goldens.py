"""The tokens that kvpress keeps, on the random Llama of `tests/models/variants.py`.

Run ``python -m benchmarks.make_policy_goldens`` in an environment with kvpress (it pins an older
transformers than the extra ``peers``). It writes the positions that each press keeps, a layer and
KV head, which the tests hold jaxkv's policies to.
"""

import contextlib
import importlib.metadata
from unittest import mock

import numpy as np
import torch
import transformers

from tests.models.variants import hf_config, weights
from tests.policies.golden_cases import CASES, GOLDENS, PREFIX_IDS, RATIO, VARIANT, context_ids


def make_model() -> transformers.PreTrainedModel:
    """The variant in float32, with the attention that every press accepts."""
    config = transformers.AutoConfig.for_model(**hf_config(VARIANT))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    tensors = {name: torch.from_numpy(tensor) for name, tensor in weights(VARIANT).items()}
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def kept_by(press, model: transformers.PreTrainedModel) -> np.ndarray:
    """Positions ``[layers, kv_heads, kept]`` that a press keeps of the context."""
    kept, compress = [], press.compress

    def watched(module, hidden_states, keys, values, attentions, kwargs):
        few_keys, few_values = compress(module, hidden_states, keys, values, attentions, kwargs)
        same = (few_keys[0][:, :, None] == keys[0][:, None]).all(-1)  # [kv_heads, kept, tokens]
        kept.append(np.sort(same.int().argmax(-1).numpy(), axis=-1))
        return few_keys, few_values

    press.compress = watched
    with press(model):
        run(model)
    return np.stack(kept).astype(np.int16)


def kept_by_kvzip(press, model: transformers.PreTrainedModel) -> np.ndarray:
    """KVzip only masks; its scores say what each head would keep."""
    scores = []
    press.compress_post = lambda model: scores.append(press.score_val[:, 0].clone())
    tokenizer = mock.Mock(chat_template=None)
    texts = {"": [], "\n": []}  # all other texts are the request to repeat
    tokenizer.encode = lambda text, **_: torch.tensor([texts.get(text, PREFIX_IDS)]).long()
    with mock.patch("kvpress.presses.kvzip_press.AutoTokenizer") as tokenizers:
        tokenizers.from_pretrained.return_value = tokenizer
        with press(model):
            run(model)
    [found] = scores
    found[..., : press.n_sink] = torch.inf
    count = int(found.shape[-1] * (1 - RATIO))
    return np.sort(found.topk(count).indices.numpy(), axis=-1).astype(np.int16)


def run(model: transformers.PreTrainedModel) -> None:
    cache = transformers.DynamicCache()
    ids = torch.from_numpy(context_ids().astype(np.int64))[None]
    with torch.no_grad():
        model.model(input_ids=ids, past_key_values=cache)


def main() -> None:
    import kvpress

    torch.set_num_threads(1)
    found = {}
    for name, (press_name, options, _) in CASES.items():
        press = getattr(kvpress, press_name)(compression_ratio=RATIO, **options)
        model = make_model()
        if press_name == "ObservedAttentionPress":
            model.set_attn_implementation("eager")
        with contextlib.redirect_stderr(None):
            found[name] = (kept_by_kvzip if name == "kvzip" else kept_by)(press, model)
    packages = ("kvpress", "transformers", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    np.savez_compressed(GOLDENS, made_by=np.array(versions), **found)
    print(f"{GOLDENS}: {len(found)} presses, {GOLDENS.stat().st_size} bytes, by {versions}")


if __name__ == "__main__":
    main()
