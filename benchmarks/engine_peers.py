"""The peer of the engine benchmark: transformers' continuous batching, on torch's CPU backend."""

import importlib.util
import time

from benchmarks.decode_peers import Transformers
from jaxkv.models import Decoder

NAME = "transformers, generate_batch"
_PAGE, _NUM_PAGES = 32, 128  # 4,096 tokens


def missing_batching() -> str | None:
    """Why there is no continuous batching to compare with, or None."""
    name = "transformers.generation.continuous_batching"
    return None if importlib.util.find_spec(name) else "this transformers has no generate_batch"


class ContinuousBatching:
    """`generate_batch` of a `LlamaForCausalLM` with the weights of a jaxkv model."""

    def __init__(self, model: Decoder):
        import transformers

        transformers.logging.set_verbosity_error()  # it warns of every request without an end token
        self.model = Transformers(model).model

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds, and greedy answers in the order of the prompts."""
        from transformers import ContinuousBatchingConfig

        # By itself it would take most of the machine's memory for pages.
        config = ContinuousBatchingConfig(
            page_size=_PAGE, num_blocks=_NUM_PAGES, max_batch_tokens=256
        )
        started = time.perf_counter()
        answers = self.model.generate_batch(
            inputs=prompts,
            generation_config=self._greedy(new_tokens),
            continuous_batching_config=config,
            warmup=False,
        )
        seconds = time.perf_counter() - started
        in_order = sorted(answers.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        return seconds, [list(answer.generated_tokens) for _, answer in in_order]

    def _greedy(self, new_tokens: int):
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
