"""A checkpoint with the shapes of a real model and random NF4 weights: speed and memory do not depend on the values.

    python benchmarks/random_model.py llama31_8b FOLDER               # on a GPU; on a CPU it takes minutes
    python benchmarks/random_model.py llama33_70b FOLDER --layers 8   # the first layers only

Its tokens are bytes, so that any text is a prompt. Ids above the bytes decode to nothing.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import bitsandbytes.functional as bnb
import torch
import tyro
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES = {
    "llama31_8b": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
    "phi4": Phi3Config(
        vocab_size=100_352, hidden_size=5120, intermediate_size=17_920, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=10, max_position_embeddings=16_384, original_max_position_embeddings=16_384,
        rms_norm_eps=1e-5, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 250_000.0}),
    "mistral_7b": MistralConfig(
        vocab_size=32_768, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32_768, rms_norm_eps=1e-5, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen25_7b": Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen25_1_5b": Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen25_3b": Qwen2Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama33_70b": LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
}  # fmt: skip
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<end>": 3}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SHARD_BYTES = 4 << 30


def byte_tokenizer(answers: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Ids 0 to 3 are <pad>, <s>, </s>, <end>; then the 256 bytes; then each of `answers` (distinct texts)."""
    alphabet = {c: i + len(SPECIAL) for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=SPECIAL | alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(answer, normalized=False) for answer in answers])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<end>"],
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def resized(config: PreTrainedConfig, **sizes: int) -> PreTrainedConfig:
    """A copy of the config with other sizes."""
    settings = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    return type(config)(**(settings | sizes))


def write_random(config: PreTrainedConfig, folder: Path, device: str = "cuda") -> None:
    """Write a checkpoint as bitsandbytes saves it: linear layers in NF4 with double quantization; embeddings, head and
    norms in bf16. device: where the weights are quantized."""
    config = copy.deepcopy(config)
    folder.mkdir(parents=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    head = skeleton.get_output_embeddings()
    quantized = {f"{n}.weight" for n, m in skeleton.named_modules() if isinstance(m, nn.Linear) and m is not head}
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, meta in skeleton.named_parameters():
        if name.endswith("norm.weight"):
            shard[name] = torch.ones(meta.shape, dtype=torch.bfloat16)
        elif name.endswith("bias"):
            shard[name] = torch.zeros(meta.shape, dtype=torch.bfloat16)
        else:
            weight = torch.randn(meta.shape, device=device, dtype=torch.bfloat16) * 0.02
            if name in quantized:
                weight, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
                shard |= {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
            shard[name] = weight.cpu()
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()  # fmt: skip
    config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16"})
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@dataclass
class Args:
    name: Annotated[str, tyro.conf.Positional]
    """model whose shapes the checkpoint has: llama31_8b, phi4, ... (SHAPES)"""
    folder: Annotated[Path, tyro.conf.Positional]
    """folder to write, which must not exist"""
    layers: int | None = None
    """number of layers, the first ones; None: all"""
    device: str = "cuda"
    """device on which the weights are quantized"""


def main(args: Args) -> None:
    if args.name not in SHAPES:
        raise ValueError(f"{args.name}: there are no such shapes; choose one of {', '.join(SHAPES)}")
    config = SHAPES[args.name]
    write_random(resized(config, num_hidden_layers=args.layers) if args.layers else config, args.folder, args.device)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
