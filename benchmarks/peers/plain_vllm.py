"""Time plain vLLM on 16-bit weights, without an adapter: what a user with a large card might take. Needs a GPU.

    python benchmarks/peers/plain_vllm.py llama31_8b                   # 8, 64 and 256 completions of 256 + 256 tokens
    python benchmarks/peers/plain_vllm.py qwen25_1_5b --completions 64

The weights are vLLM's dummy weights of the true shapes; vLLM compiles the model and captures its graphs, as by default.
Each completion has a seed of its own and brings the log-probabilities of its tokens, as in GRPO.
"""

import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_model import SHAPES


@dataclass
class Args:
    name: Annotated[str, tyro.conf.Positional]
    """name of the model whose shapes the weights have: llama31_8b, phi4, mistral_7b, qwen25_7b, qwen25_1_5b"""
    completions: tuple[int, ...] = (8, 64, 256)
    """completions of one prompt, one measurement per number"""
    prompt_tokens: int = 256
    """tokens of the prompt"""
    completion_tokens: int = 256
    """tokens of each completion"""
    repeats: int = 3
    """timed calls per number of completions"""
    gpu_memory_utilization: float = 0.5
    """share of the card that vLLM may take"""


def main(args: Args) -> None:
    if args.name not in SHAPES:
        raise SystemExit(f"{args.name}: no such shapes; choose one of {', '.join(SHAPES)}")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    import vllm

    config = SHAPES[args.name]
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        llm = vllm.LLM(
            folder,
            load_format="dummy",
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=args.prompt_tokens + args.completion_tokens,
            max_num_seqs=max(args.completions),
            gpu_memory_utilization=args.gpu_memory_utilization,
        )
    rng = random.Random(0)
    prompt = {"prompt_token_ids": [rng.randrange(10, 5000) for _ in range(args.prompt_tokens)]}
    for number in args.completions:
        sampling = [
            vllm.SamplingParams(
                temperature=1.0,
                max_tokens=args.completion_tokens,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                seed=seed,
            )
            for seed in range(number)
        ]
        for _ in range(args.repeats):
            llm.reset_prefix_cache()
            start = time.perf_counter()
            llm.generate([prompt] * number, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            rate = number * args.completion_tokens / seconds
            print(f"{number} completions: {seconds:.2f} s, {rate:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
