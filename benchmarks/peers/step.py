"""Time the GRPO steps of a peer: seconds to generate and to train, and the memory in use. Needs a GPU.

    python benchmarks/peers/step.py unsloth MODEL                             # 8 completions of 256 + 256 tokens
    python benchmarks/peers/step.py unsloth MODEL --completion-tokens 768 --gpu-memory-utilization 0.13
    python benchmarks/peers/step.py trl MODEL
    python benchmarks/peers/step.py trl-vllm MODEL_16_BIT --group-size 64 --micro-batch-size 8

MODEL is a folder from benchmarks/peers/checkpoint.py. `unsloth` trains a LoRA adapter on 4-bit weights with vLLM in the
process. `trl` does so with transformers' generate, since TRL's QLoRA path has no vLLM. `trl-vllm` trains on 16-bit
weights with vLLM in the process. The adapter has rank 16 on all linear layers, beta is 0, the rewards are random
numbers, and a step is one group. The first step compiles: read the second and later ones. A step here ends before the
optimizer's step, which is not timed.
"""

import os
import random
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

GIB = 2**30
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM runs in this process, or the card's memory could not be read here
    "VLLM_LOGGING_LEVEL": "ERROR",
    "WANDB_DISABLED": "true",
}
# TRL's colocated vLLM asks for the variables that a launcher sets.
LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}


@dataclass
class Args:
    peer: Annotated[Literal["unsloth", "trl", "trl-vllm"], tyro.conf.Positional]
    """trainer to time"""
    model: Annotated[str, tyro.conf.Positional]
    """folder of the model: 4 bits for unsloth and trl, 16 bits for trl-vllm"""
    group_size: int = 8
    """completions of the one prompt of a step"""
    prompt_tokens: int = 256
    """tokens of the prompt"""
    completion_tokens: int = 256
    """tokens of each completion"""
    steps: int = 3
    """optimizer steps"""
    micro_batch_size: int | None = None
    """completions of a micro-batch; by default the whole group is one"""
    gpu_memory_utilization: float = 0.5
    """share of the card that vLLM may take"""
    standby: bool = False
    """Unsloth's standby mode, in which vLLM's KV cache is released while the trainer works"""
    output: str = "/tmp/peer-step"
    """folder that the trainer may write to"""


def in_use() -> float:
    """GiB of the card that are in use, by whatever program."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def random_rewards(completions: list[Any], **columns: Any) -> list[float]:
    """A random reward per completion, so that every group has a gradient."""
    return [random.random() for _ in completions]


def prompts(tokens: int) -> list[dict[str, str]]:
    """64 random prompts. The checkpoint's tokenizer has a token per byte, so a prompt has as many letters as tokens."""
    rng = random.Random(0)
    return [{"prompt": "".join(rng.choices(string.ascii_letters, k=tokens))} for _ in range(64)]


def load(args: Args) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and the LoraConfig that TRL is to apply.

    trl-vllm gets the model's folder in place of the model; Unsloth's model has its adapter already, so there the
    LoraConfig is None."""
    if args.peer == "unsloth":
        from unsloth import FastLanguageModel  # before transformers, which it patches

        model, tokenizer = FastLanguageModel.from_pretrained(
            args.model,
            max_seq_length=args.prompt_tokens + args.completion_tokens,
            load_in_4bit=True,
            fast_inference=True,
            max_lora_rank=RANK,
            gpu_memory_utilization=args.gpu_memory_utilization,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=RANK,
            target_modules=TARGETS,
            use_gradient_checkpointing="unsloth",
            random_state=0,
        )
        return model, tokenizer, None

    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    if args.peer == "trl-vllm":
        return args.model, tokenizer, lora
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map={"": 0}), tokenizer, lora


def make_trainer(args: Args) -> Any:
    """The peer's GRPOTrainer."""
    model, tokenizer, lora = load(args)

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    micro_batch_size = args.micro_batch_size or args.group_size
    settings: dict[str, Any] = {
        "output_dir": args.output,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": args.group_size // micro_batch_size,
        "num_generations": args.group_size,
        "max_completion_length": args.completion_tokens,
        "max_steps": args.steps,
        "learning_rate": 5e-6,
        "optim": "adamw_torch_fused" if args.peer == "trl-vllm" else "adamw_8bit",
        "bf16": True,
        "beta": 0.0,
        "loss_type": "grpo",
        "temperature": 1.0,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
    }
    if args.peer == "unsloth":
        settings["max_prompt_length"] = args.prompt_tokens
    if args.peer == "trl-vllm":
        settings |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": args.gpu_memory_utilization,
            "vllm_max_model_length": args.prompt_tokens + args.completion_tokens,
            "model_init_kwargs": {"dtype": "bfloat16"},
        }
    known = GRPOConfig.__dataclass_fields__
    left_out = [name for name in settings if name not in known]  # releases of TRL rename their settings
    print(f"settings that this release of TRL does not have: {left_out or 'none'}", flush=True)
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[random_rewards],
        args=GRPOConfig(**{name: value for name, value in settings.items() if name in known}),
        train_dataset=Dataset.from_list(prompts(args.prompt_tokens)),
        peft_config=lora,
    )


class Stopwatch:
    """Times a trainer's generation and its micro-batches, and prints a line per step.

    It replaces two methods of the trainer by timed ones: `_generate_and_score_completions`, which syncs the weights,
    samples and calls the rewards, and `training_step`, which calls it and then does the forward and backward pass.
    """

    def __init__(self, trainer: Any, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.done = 0
        self.generate = self.total = 0.0
        self.generated = trainer._generate_and_score_completions
        self.trained = trainer.training_step
        trainer._generate_and_score_completions = self.timed_generation
        trainer.training_step = self.timed_micro_batch

    def timed(self, function: Callable[..., Any], *args: Any, **settings: Any) -> tuple[Any, float]:
        """What the function returns, and the seconds until the card is done with it."""
        import torch

        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function(*args, **settings)
        torch.cuda.synchronize()
        return result, time.perf_counter() - start

    def timed_generation(self, *args: Any, **settings: Any) -> Any:
        result, seconds = self.timed(self.generated, *args, **settings)
        self.generate += seconds
        if "completion_mask" in result:
            print(f"tokens per completion: {result['completion_mask'].sum(1).float().mean().item():.1f}", flush=True)
        return result

    def timed_micro_batch(self, *args: Any, **settings: Any) -> Any:
        import torch

        if self.done % self.micro_batches == 0:
            torch.cuda.reset_peak_memory_stats()
        result, seconds = self.timed(self.trained, *args, **settings)
        self.total += seconds
        self.done += 1
        if self.done % self.micro_batches == 0:
            peak = torch.cuda.max_memory_allocated() / GIB
            print(
                f"step {self.done // self.micro_batches}: {self.total:.2f} s = generate {self.generate:.2f} + train "
                f"{self.total - self.generate:.2f}; GiB: {peak:.2f} allocated by PyTorch at most, "
                f"{in_use():.2f} of the card in use",
                flush=True,
            )
            self.generate = self.total = 0.0
        return result


def main(args: Args) -> None:
    os.environ.update(ENVIRONMENT)
    if args.peer == "trl-vllm":
        os.environ.update(LAUNCHER)
    if args.standby:
        os.environ["UNSLOTH_VLLM_STANDBY"] = "1"
    micro_batches, left = divmod(args.group_size, args.micro_batch_size or args.group_size)
    if left:
        raise SystemExit(f"--micro-batch-size {args.micro_batch_size} must divide --group-size {args.group_size}")
    trainer = make_trainer(args)
    print(f"loaded: {in_use():.2f} GiB of the card in use", flush=True)
    Stopwatch(trainer, micro_batches)
    trainer.train()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
