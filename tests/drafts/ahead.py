"""Models with a module that predicts ahead, and what it must say, in float64 numpy."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import jaxkv
from tests.drafts.toy import _HEAD, _VECTORS, HEAD_DIM, HEADS, VOCABULARY
from tests.models.variants import VOCAB_SIZE, hf_config, mtp_weights, weights


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vectors", "head"],
    meta_fields=["predicts_ahead"],
)
@dataclasses.dataclass(frozen=True)
class Toy:
    """The toy with hidden states, and a module that attends too: in layer 1 of the cache."""

    vectors: jax.Array
    head: jax.Array
    predicts_ahead: bool = True

    hidden_size = HEADS * HEAD_DIM
    dtype = jnp.dtype("float32")
    vocab_size = VOCABULARY

    def __call__(self, tokens, cache):
        hidden, cache = self.hidden(tokens, cache)
        return self.logits(hidden), cache

    def hidden(self, tokens, cache):
        return self._attend(self.vectors[tokens], cache, 0)

    def logits(self, hidden):
        return jnp.einsum("btf,fv->btv", hidden, self.head)

    def ahead(self, hidden, tokens, cache):
        vectors = self.vectors[tokens]
        return self._attend(vectors + 0.1 * hidden.reshape(vectors.shape), cache, 1)

    def _attend(self, vectors, cache, layer):
        cache = jaxkv.append(cache, vectors, vectors[..., ::-1], layer=layer)
        seen = jaxkv.attend(cache, vectors, layer=layer) + vectors
        hidden = seen.reshape(*vectors.shape[:2], -1)
        return hidden, jaxkv.advance(cache, vectors.shape[1])


TOY = Toy(jnp.asarray(_VECTORS), jnp.asarray(_HEAD))


def config_of(batch_size, **fields):
    return jaxkv.KVCacheConfig(2, 64, HEADS, HEAD_DIM, batch_size=batch_size, **fields)


def write_mtp_checkpoint(variant: str, folder: Path, **changed) -> Path:
    """The variant's folder with a layer more that predicts ahead; ``changed`` are tensors of it."""
    own = mtp_weights(variant) | changed
    tensors = weights(variant) | {name: each for name, each in own.items() if each is not None}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(mtp_config(variant)))
    return folder


def mtp_config(variant: str) -> dict:
    """Its config.json. A Qwen 2 with a module is called MiMo."""
    named = _MIMO_NAMES if variant == "qwen2" else {}
    return hf_config(variant) | {"num_nextn_predict_layers": 1} | named


_MIMO_NAMES = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}


def counting_checkpoint(folder: Path, by: str) -> Path:
    """A MiMo that says the token after the last, and a module that is always right.

    Args:
      by: what the module goes by, the "hidden" state or the embedding of the "token" after it.
    """
    config = hf_config("qwen2") | {"hidden_size": VOCAB_SIZE, "num_hidden_layers": 1}
    tensors = weights("qwen2", config) | mtp_weights("qwen2", config)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # layers add nothing
            tensors[name] = np.zeros_like(tensors[name])
        elif name.endswith("norm.weight"):
            tensors[name] = np.ones_like(tensors[name])
    unit, one_further = np.eye(VOCAB_SIZE), np.roll(np.eye(VOCAB_SIZE), 1, axis=0)
    tensors["model.embed_tokens.weight"] = unit
    tensors["lm_head.weight"] = one_further
    nothing = np.zeros_like(unit)
    parts = [nothing, unit] if by == "token" else [one_further, nothing]
    tensors["model.mtp_layers.0.input_proj.weight"] = np.concatenate(parts, axis=1)
    tensors = {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(mtp_config("qwen2") | config | _MIMO_NAMES))
    return folder


def hidden_of_goldens(variant: str, logits: np.ndarray) -> np.ndarray:
    """The hidden states that transformers made its logits of."""
    head = weights(variant)["lm_head.weight"].astype(np.float64)
    found, *_ = np.linalg.lstsq(head, logits.astype(np.float64).T, rcond=None)
    return found.T


def oracle(variant: str, hidden: np.ndarray, tokens) -> tuple[np.ndarray, np.ndarray]:
    """Logits and hidden states of the module, by its definition (DeepSeek-V3, section 2.2).

    Args:
      hidden: of each token of a text, ``[tokens, hidden]``.
      tokens: the one after each.
    """
    config = hf_config(variant)
    every = {n: t.astype(np.float64) for n, t in (weights(variant) | mtp_weights(variant)).items()}
    first, names = f"model.layers.{config['num_hidden_layers']}.", DEEPSEEK
    if variant == "qwen2":
        first, names = "model.mtp_layers.0.", MIMO
    enorm, hnorm, projection, last = names
    own = {name.removeprefix(first): t for name, t in every.items() if name.startswith(first)}
    eps = config["rms_norm_eps"]

    def norm(x, name, eps=eps):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * own[f"{name}.weight"]

    def linear(x, name):
        return x @ own[f"{name}.weight"].T + own.get(f"{name}.bias", 0)

    def mlp(x, name):
        gate = linear(x, f"{name}.gate_proj")
        made = gate / (1 + np.exp(-gate)) * linear(x, f"{name}.up_proj")
        return linear(made, f"{name}.down_proj")

    embedded = every["model.embed_tokens.weight"][np.asarray(tokens)]
    both = [norm(embedded, enorm), norm(hidden, hnorm)]
    x = linear(np.concatenate(both[::-1] if variant == "qwen2" else both, axis=-1), projection)
    queries, keys, values = _PROJECTIONS[config["model_type"]](
        config, norm(x, "input_layernorm"), norm, linear
    )
    scores = np.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hqk,khd->qhd", exponents / exponents.sum(-1, keepdims=True), values)
    x = x + linear(mixed.reshape(len(x), -1), "self_attn.o_proj")
    given = norm(x, "post_attention_layernorm")
    if "mlp.gate.weight" in own:
        fed = mlp(given, "mlp.shared_experts")
        chosen = _routing(
            config, linear(given, "mlp.gate"), own["mlp.gate.e_score_correction_bias"]
        )
        for token, (expert_weights, vector) in enumerate(zip(chosen, given, strict=True)):
            for expert, weight in expert_weights.items():
                fed[token] += weight * mlp(vector, f"mlp.experts.{expert}")
    else:
        fed = mlp(given, "mlp")
    found = norm(x + fed, last)
    return found @ every["lm_head.weight"].T, found


# Its modules beside the layer.
DEEPSEEK = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
MIMO = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")


def _turned(vectors, pairs, theta=10000.0):
    """Each pair of numbers of vectors ``[tokens, heads, dim]``, turned by its position."""
    count = len(pairs[0])
    angles = np.arange(len(vectors))[:, None] * theta ** (-np.arange(count) / count)
    turned = vectors[..., pairs[0]] + 1j * vectors[..., pairs[1]]
    turned = turned * np.exp(1j * angles)[:, None]
    result = vectors.copy()
    result[..., pairs[0]], result[..., pairs[1]] = turned.real, turned.imag
    return result


def _grouped(config, x, norm, linear):
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])

    def heads(name):
        return linear(x, f"self_attn.{name}_proj").reshape(len(x), -1, head_dim)

    half = int(head_dim * config.get("partial_rotary_factor", 1)) // 2
    pairs = np.arange(half), np.arange(half, 2 * half)
    queries, keys = heads("q"), heads("k")
    if config.get("use_qk_norm"):
        queries, keys = norm(queries, "self_attn.q_norm"), norm(keys, "self_attn.k_norm")
    queries, keys = _turned(queries, pairs), _turned(keys, pairs)
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    return queries, keys.repeat(groups, axis=1), heads("v").repeat(groups, axis=1)


def _of_deepseek_v3(config, x, norm, linear):
    plain, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank, count = config["kv_lora_rank"], config["num_attention_heads"]
    pairs = np.arange(0, rope, 2), np.arange(1, rope, 2)
    latents = norm(linear(x, "self_attn.q_a_proj"), "self_attn.q_a_layernorm", 1e-6)
    queries = linear(latents, "self_attn.q_b_proj").reshape(len(x), count, plain + rope)
    both = linear(x, "self_attn.kv_a_proj_with_mqa")
    latents = norm(both[:, :rank], "self_attn.kv_a_layernorm", 1e-6)
    made = linear(latents, "self_attn.kv_b_proj").reshape(len(x), count, -1)
    shared = _turned(both[:, None, rank:], pairs).repeat(count, axis=1)
    queries = np.concatenate([queries[..., :plain], _turned(queries[..., plain:], pairs)], -1)
    return queries, np.concatenate([made[..., :plain], shared], -1), made[..., plain:]


_PROJECTIONS = {"glm4_moe": _grouped, "qwen2": _grouped, "deepseek_v3": _of_deepseek_v3}


def _routing(config, logits, bias):
    """For each token, its experts and their weights (DeepSeek-V3, section 2.1.2)."""
    groups, size = config["n_group"], config["n_routed_experts"] // config["n_group"]
    for row in 1 / (1 + np.exp(-logits)):
        wanted = (row + bias).reshape(groups, size)
        best = np.argsort(-np.sort(wanted, axis=1)[:, -2:].sum(1))[: config["topk_group"]]
        allowed = np.full((groups, size), -np.inf)
        allowed[best] = wanted[best]
        chosen = np.argsort(-allowed.reshape(-1))[: config["num_experts_per_tok"]]
        share = row[chosen] / row[chosen].sum() * config["routed_scaling_factor"]
        yield dict(zip(chosen.tolist(), share.tolist(), strict=True))
