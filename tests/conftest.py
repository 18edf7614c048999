"""Tiny random models of the supported architectures, with a word-level tokenizer and a chat template."""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Triton decides at import whether kernels are compiled or interpreted: without a GPU they are interpreted.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

try:
    from hypothesis import settings
except ImportError:  # the environments of vLLM and of a GPU do without
    settings = None

ROOT = Path(__file__).parent.parent
FUZZ_EXAMPLES = int(os.environ.get("GRPO_FUZZ_EXAMPLES", "0"))
"""of each property that sets no number of its own; above 0 all are drawn anew at each run, else always the same"""
if settings is not None:
    settings.register_profile("grpo", deadline=None, derandomize=not FUZZ_EXAMPLES, max_examples=FUZZ_EXAMPLES or 100)
    settings.load_profile("grpo")
ARCHITECTURES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} <end>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def write_model(folder, architecture: str = "llama", *, seed: int = 0, **settings):
    """A random model of the architecture as a transformers folder: hidden 64, 2 layers, 64 words, fp32."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # peaked enough that a wrong position or mask shows
    }
    config = ARCHITECTURES[architecture](**(defaults | settings))
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<end>": 3, "<unk>": 4, "system": 5, "user": 6, "assistant": 7}
    vocabulary |= {f"w{i}": i for i in range(8, 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<end>"],
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def write_byte_model(folder, architecture: str, answers: Sequence[str], **settings):
    """A random model whose tokens are bytes, and these answers: any text can be a prompt, and what it says earns
    rewards now and then. Its chat template closes a turn with <end>."""
    tokenizer = load_recipe(ROOT / "benchmarks" / "random_model.py").byte_tokenizer(answers)
    size = 64 * -(-len(tokenizer) // 64)
    write_model(folder, architecture, vocab_size=size, max_position_embeddings=2048, **settings)
    tokenizer.save_pretrained(folder)
    return folder


def load_recipe(path: Path):
    """A recipe or benchmark as a module: its folder is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def recipe_args(recipe, **settings):
    """A recipe's Args with these flags set, each in the group that has it."""
    args = recipe.Args()
    groups = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    groups = {name: group for name, group in groups.items() if dataclasses.is_dataclass(group)}
    for name, group in groups.items():
        own = {f.name for f in dataclasses.fields(group)} & settings.keys()
        setattr(args, name, dataclasses.replace(group, **{field: settings.pop(field) for field in own}))
    return dataclasses.replace(args, **settings)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A function from architecture to the folder of its tiny model, made once a session."""
    made = {}

    def folder(architecture: str = "llama") -> str:
        if architecture not in made:
            made[architecture] = str(write_model(tmp_path_factory.mktemp(architecture), architecture))
        return made[architecture]

    return folder
