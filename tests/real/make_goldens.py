"""What transformers makes of the real checkpoint, in float32: `python -m tests.real.make_goldens`.

Writes ``smollm2.json`` beside this file. Needs the extra ``peers``.
"""

import json
from pathlib import Path

import numpy as np

from tests.real.checkpoint import smollm2

GOLDENS = Path(__file__).parent / "smollm2.json"
NUM_ANSWERS, LONGEST = 10, 60
# The first ten whose answers end within so many tokens are kept.
QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Italy?",
    "What is the capital of Japan?",
    "What is the capital of Germany?",
    "What is the capital of Spain?",
    "What is the chemical symbol for water?",
    "How many days are there in a week?",
    "What is the freezing point of water in Celsius?",
    "In which continent is Egypt?",
    "What is the currency of Japan?",
    "What is the largest planet in the solar system?",
    "What is the capital of Egypt?",
    "What is the chemical symbol for gold?",
    "What is the currency of India?",
]
# Texts whose ids do not depend on how digits beside spaces are cut, which transformers (5.2) does
# not read of a GGUF file.
TEXTS = [
    "Hello world",
    "The year 2024, 3.14159 and 1,000",
    "  two  spaces\n\n\ttabs ",
    "don't we'll I'M",
    "größe 日本語 🙂 é",
    "<|im_start|>user\nWhat is 12+34?<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n    return x**2  # c\n",
    "https://a.b/c?d=e&f=1",
]
NUM_TOKENS, EVERY_POSITION, EVERY_TOKEN = 256, 17, 769


def main() -> None:
    import torch
    import transformers

    file = smollm2()
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    answers = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LONGEST)
        answer = whole[0, len(prompt) :].tolist()
        print(repr(tokenizer.decode(answer)), flush=True)
        if answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>"):
            answers.append({"question": question, "prompt": prompt, "answer": answer})
        if len(answers) == NUM_ANSWERS:
            break
    else:
        raise SystemExit(f"only {len(answers)} answers end; ask more")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, NUM_TOKENS)
    with torch.inference_mode():
        logits = model(torch.tensor(ids[None])).logits[0, ::EVERY_POSITION]
    goldens = {
        "made by": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "answers": answers,
        "texts": {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS},
        "logits": logits[:, ::EVERY_TOKEN].double().numpy().round(6).tolist(),
        "logsumexp": logits.double().logsumexp(-1).numpy().round(6).tolist(),
    }
    GOLDENS.write_text(json.dumps(goldens, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
