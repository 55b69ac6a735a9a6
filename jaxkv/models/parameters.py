"""How large the weights of a model are: of public ones by name, of others by their config.json."""

import os
from pathlib import Path

import jax.numpy as jnp

from jaxkv.counts import ceil_div
from jaxkv.errors import CheckpointError
from jaxkv.models.known import known_name

# Numbers in the checkpoints on the Hugging Face hub; of Gemma 3 and Llama 4 in the text decoder.
PARAMETERS: dict[str, int] = {
    "DeepSeek-V2": 235_741_434_880,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200,  # without the layer that guesses ahead
    "DeepSeek-R1": 671_026_419_200,
    "Kimi-K2": 1_026_408_232_448,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-2-27B": 27_227_128_320,
    "Gemma-3-270M": 268_098_176,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": 3_880_263_168,
    "Gemma-3-12B": 11_766_034_176,
    "Gemma-3-27B": 27_009_346_304,
    "Gemma-3n-E2B": 4_456_156_768,
    "Gemma-3n-E4B": 6_866_696_688,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.3-70B": 70_553_706_496,
    "Llama-4-Scout-17B-16E": 107_769_861_120,
    "Llama-4-Maverick-17B-128E": 400_711_848_960,
    "Mistral-7B": 7_241_732_096,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama-1.1B": 1_100_048_384,
}


def weight_bytes(
    model: str | os.PathLike[str], *, dtype: str = "bfloat16", devices: int = 1
) -> int | None:
    """Bytes of a model's weights on one of the devices that share its KV heads.

    Of a file or folder to the byte; of a public model, by name, as if all were shared alike.

    Args:
      model: a config.json, a folder that holds one, a GGUF file, or a public model's name.
      dtype: of the weights.
      devices: how many share them, as ``axes.heads`` of `jaxkv.models.load`.

    Returns:
      None for a model that `jaxkv.models.load` does not load.

    Raises:
      ConfigError: not in the table.

    >>> weight_bytes("Llama-3-70B", devices=8)
    17638426624
    """
    size = jnp.dtype(dtype).itemsize
    if not os.path.exists(model):
        return ceil_div(PARAMETERS[known_name(os.fspath(model))] * size, devices)
    from jaxkv.models.loading import num_parameters

    path = Path(model)
    try:
        return num_parameters(path.parent if path.name == "config.json" else path, devices) * size
    except (CheckpointError, ImportError):
        return None
