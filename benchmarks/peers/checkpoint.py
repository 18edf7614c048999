"""Write a random checkpoint that the peers can load, with the shapes of a real model.

    python benchmarks/peers/checkpoint.py llama31_8b FOLDER             # NF4, for Unsloth and for TRL without vLLM
    python benchmarks/peers/checkpoint.py phi4 FOLDER
    python benchmarks/peers/checkpoint.py llama31_8b FOLDER --bits 16   # bfloat16, for TRL with vLLM

The NF4 checkpoints are those of benchmarks/random_model.py, except that Phi-4 gets split projections: Unsloth trains
Phi-4 in Llama's form (q_proj, k_proj, v_proj, gate_proj, up_proj), with the same number of weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_model import SHAPES, byte_tokenizer, write_random


def peer_config(name: str) -> PreTrainedConfig:
    """The shapes of a model in the form in which the peers train it."""
    config = SHAPES[name]
    if config.model_type != "phi3":
        return config
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters")  # fmt: skip
    return LlamaConfig(**{key: getattr(config, key) for key in kept})


def write_16_bit(config: PreTrainedConfig, folder: Path, device: str = "cuda") -> None:
    """The model with transformers' own initial weights in bfloat16, and the byte tokenizer of random_model.py."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@dataclass
class Args:
    name: Annotated[str, tyro.conf.Positional]
    """name of the model whose shapes the checkpoint has: llama31_8b, phi4, mistral_7b, qwen25_7b, qwen25_1_5b"""
    folder: Annotated[Path, tyro.conf.Positional]
    """folder to write, which must not exist yet"""
    bits: Literal[4, 16] = 4
    """4 for NF4 with double quantization, 16 for bfloat16"""
    device: str = "cuda"
    """device on which the weights are made"""


def main(args: Args) -> None:
    if args.name not in SHAPES:
        raise SystemExit(f"{args.name}: no such shapes; choose one of {', '.join(SHAPES)}")
    write = write_random if args.bits == 4 else write_16_bit
    write(peer_config(args.name), args.folder, args.device)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
