"""Answer prompts with a base model and with a trained adapter, through the engine that training used.

python -m grpo_rollout.programs.generate --model MODEL --adapter runs/RUN/adapter --prompt "What is 3 + 4?"
python -m grpo_rollout.programs.generate --model MODEL --prompt "..." --samples 4 --temperature 1
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import tyro
from torch import nn

from grpo.policy.models import encode_chat, load_policy, load_tokenizer, stop_ids
from grpo.runs.cli import user_errors
from grpo_rollout.engine import Engine, Sampling
from grpo_rollout.make import make_engine


@dataclass
class Args:
    model: str
    """a transformers folder, a hub name or a .gguf file"""
    prompt: list[str] = field(default_factory=list)
    """questions; each is asked as a user's turn"""
    system: str | None = None
    """a system turn before each question"""
    adapter: str | None = None
    """a trained adapter's folder; its answers are shown beside the base model's"""
    samples: int = 1
    """answers to each question"""
    temperature: float = 0.0
    """0 takes the likeliest token each time"""
    max_completion_tokens: int = 256
    """of an answer"""
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """vLLM where there is a GPU and it is installed, else torch"""
    load_in_4bit: bool = True
    """NF4 weights, as in training"""
    seed: int = 0
    """of the samples"""


def answers(
    engine: Engine, tokenizer: Any, prompts: list[list[int]], samples: int, sampling: Sampling, seed: int
) -> list[list[str]]:
    """`samples` texts for each prompt, special tokens left out."""
    completions = engine.generate(prompts, samples, sampling, seed=seed)
    texts = tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def without_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """Zero every B of the policy's adapter, which makes it the base model; returns what they were."""
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B.default" in n}
    with torch.no_grad():
        for name in kept:
            model.get_parameter(name).zero_()
    return kept


def main(args: Args) -> None:
    if not args.prompt:
        raise ValueError("--prompt is empty: give one question or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(args.model)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    prompts = [encode_chat(tokenizer, [*system, {"role": "user", "content": p}]) for p in args.prompt]
    model = load_policy(
        args.model, lora_rank=1, adapter=args.adapter, load_in_4bit=args.load_in_4bit, device=device, seed=args.seed
    )
    trained = without_adapter(model)
    engine = make_engine(
        args.engine, model, eos_ids=stop_ids(args.model, tokenizer), pad_id=tokenizer.pad_token_id,
        max_prompt_tokens=max(map(len, prompts)), max_completion_tokens=args.max_completion_tokens,
        sequences=min(64, len(prompts) * args.samples),
    )  # fmt: skip
    sampling = Sampling(temperature=args.temperature, max_tokens=args.max_completion_tokens)
    shown = {"base": answers(engine, tokenizer, prompts, args.samples, sampling, args.seed)}
    if args.adapter:
        with torch.no_grad():
            for name, value in trained.items():
                model.get_parameter(name).copy_(value)
        engine.sync(model)
        shown["trained"] = answers(engine, tokenizer, prompts, args.samples, sampling, args.seed)
    for i, question in enumerate(args.prompt):
        print(f"=== {question}")
        for kind, texts in shown.items():
            for text in texts[i]:
                print(f"--- {kind}\n{text}")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args))
