"""Train the small model that jaxkv ships: `python -m benchmarks.train_embedded --out FOLDER`.

A byte-level Llama of 3.8 million parameters on the sources of Python's standard library. Minutes on
one data-centre GPU. Needs optax.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import corpus
from jaxkv.models import Decoder, DecoderConfig, save

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": corpus.SEPARATOR,
    "eos_token_id": corpus.SEPARATOR,
    "torch_dtype": "bfloat16",
}
_STEPS_PER_DISPATCH = 50


def train(text: dict, *, steps: int, batch_size: int, window: int, seconds: float, report):
    """The model, of those met every 500 steps, that knows the validation text best."""
    graph, master = nnx.split(Decoder(DecoderConfig.from_hf(CONFIG), rngs=nnx.Rngs(0)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 40, steps, 3e-5)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=0.1,
            mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        ),
    )
    bytes_of = {part: jnp.asarray(part_bytes) for part, part_bytes in text.items()}

    def loss(parameters, tokens):
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
        logits, _ = nnx.merge(graph, narrow)(tokens[:, :-1], None)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def one_step(state, key):
        parameters, optimizer_state = state
        starts = jax.random.randint(key, (batch_size, 1), 0, len(bytes_of["train"]) - window - 1)
        tokens = bytes_of["train"][starts + jnp.arange(window + 1)].astype(jnp.int32)
        value, gradient = jax.value_and_grad(loss)(parameters, tokens)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters)
        return (optax.apply_updates(parameters, updates), optimizer_state), value

    many_steps = jax.jit(lambda state, keys: jax.lax.scan(one_step, state, keys), donate_argnums=0)
    validation = text["validation"]
    windows = validation[: len(validation) // 1024 * 1024].reshape(-1, 1024)[::4][:256]

    state, best = (master, optimizer.init(master)), (float("inf"), None)
    started = time.monotonic()
    keys = jax.random.split(jax.random.key(1), steps)
    for step in range(0, steps, _STEPS_PER_DISPATCH):
        state, losses = many_steps(state, keys[step : step + _STEPS_PER_DISPATCH])
        if step % 500 == 0 or step + _STEPS_PER_DISPATCH >= steps:
            bits = corpus.bits_per_byte(nnx.merge(graph, state[0]), windows)
            elapsed = time.monotonic() - started
            train_bits = float(losses.mean()) / np.log(2)
            report(
                f"step {step} train {train_bits:.3f} validation {bits:.3f} bits a byte, "
                f"{elapsed:.0f} s"
            )
            if bits < best[0]:
                best = bits, jax.tree.map(jnp.copy, state[0])
            if elapsed > seconds:
                break
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), best[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--sources", type=pathlib.Path, default=corpus.standard_library())
    parser.add_argument("--steps", type=int, default=3050)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=1e9)
    arguments = parser.parse_args()
    text = corpus.split(arguments.sources)
    print({part: len(part_bytes) for part, part_bytes in text.items()}, flush=True)
    model = train(
        text,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        window=arguments.window,
        seconds=arguments.seconds,
        report=lambda line: print(line, flush=True),
    )
    save(model, arguments.out)
    sample = corpus.held_out()
    record = {
        "held_out_bits_per_byte": {
            "all": round(corpus.bits_per_byte(model, sample), 4),
            "eighth": round(corpus.bits_per_byte(model, sample[::8]), 4),
        },
        "steps": arguments.steps,
        "tokens_per_step": arguments.batch_size * arguments.window,
        "device": jax.devices()[0].device_kind,
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()
