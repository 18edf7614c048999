"""Answer questions with the base model and with a trained adapter, through the engine that training used.

grpo generate --model MODEL --adapter runs/RUN/adapter --prompt "What is 3 + 4?"
grpo generate --model MODEL --prompt "What is 3 + 4?" "What is 5 + 8?" --samples 4 --temperature 1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo.errors import UserError
from grpo.lazy import torch
from grpo.policy.chat import encode_chat, load_tokenizer
from grpo.policy.models import Policy, load_policy
from grpo.sampler import Engine, Question, Rollout, sample
from grpo_rollout.fit.plan import Card
from grpo_rollout.make import make_engine
from grpo_rollout.programs import run_program

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Args:
    model: str
    """name on the Hugging Face hub, transformers folder, or .gguf file"""
    prompt: list[str] = field(default_factory=list)
    """questions; each is asked as one user message"""
    system: str | None = None
    """system message before each question, such as the recipe's"""
    adapter: Path | None = None
    """folder of a trained adapter, whose answers are shown beside the base model's"""
    samples: int = 1
    """number of answers to each question"""
    temperature: float = 0.0
    """sampling temperature; 0 takes the most likely token every time"""
    max_completion_tokens: int = 256
    """maximum number of tokens in an answer"""
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """engine that samples; auto: vLLM on a GPU where it is installed, else PyTorch"""
    load_in_4bit: bool = True
    """whether to quantize the weights to NF4, as in training"""
    seed: int = 0
    """random seed for the samples"""


def main(args: Args) -> None:
    """Print the answers to each question, the base model's first. Raises UserError, naming the flag, for bad input."""
    if not args.prompt:
        raise UserError("--prompt is empty: give one question or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(args.model)
    questions = [Question(text, "", encode_chat(tokenizer, text, system=args.system)) for text in args.prompt]
    policy = Policy(args.model, lora_rank=1, adapter=args.adapter, load_in_4bit=args.load_in_4bit)
    model = load_policy(policy, device=device, seed=args.seed)
    rollout = Rollout(
        temperature=args.temperature,
        max_prompt_tokens=max(len(question.prompt) for question in questions),
        max_completion_tokens=args.max_completion_tokens,
    )
    trained = switch_adapter_off(model)
    at_a_time = min(64, len(questions) * args.samples)
    engine = make_engine(model, tokenizer, rollout, Card(engine=args.engine), sequences=at_a_time)
    answers = {"base": answer(engine, tokenizer, questions, rollout, args)}
    if args.adapter:
        switch_adapter_on(model, trained)
        engine.sync(model)
        answers["trained"] = answer(engine, tokenizer, questions, rollout, args)
    for i, question in enumerate(args.prompt):
        print(f"=== {question}")
        for kind, texts in answers.items():
            for text in texts[i * args.samples : (i + 1) * args.samples]:
                print(f"--- {kind}\n{text}")


def answer(engine: Engine, tokenizer: Any, questions: list[Question], rollout: Rollout, args: Args) -> list[str]:
    """[questions * samples] texts without special tokens."""
    return sample(engine, tokenizer, questions, args.samples, rollout.sampling, seed=args.seed).texts


def switch_adapter_off(model: nn.Module) -> dict[str, Tensor]:
    """Make the policy its base model by zeroing every B of the adapter. Returns what they were, by name.

    Unlike PEFT's `disable_adapter`, it is also seen by an engine that copies the adapter's tensors."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B.default" in n}
    with torch.no_grad():
        for name in before:
            model.get_parameter(name).zero_()
    return before


def switch_adapter_on(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Undo `switch_adapter_off`, with what it returned."""
    with torch.no_grad():
        for name, value in before.items():
            model.get_parameter(name).copy_(value)


if __name__ == "__main__":
    run_program(Args, main)
