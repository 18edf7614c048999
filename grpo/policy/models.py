"""Loading a language model in 4 bits with a LoRA adapter, its tokenizer, and the reference policy beside it."""

import contextlib
import fnmatch
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.errors import looks_like_path
from grpo.policy.layers import fuse_layers
from grpo.policy.recompute import recompute_layers

REFERENCE = "reference"
"""the name of the frozen second adapter that a continued run measures its KL against"""


def resolve_model(model: str) -> str:
    """A transformers folder or a hub name for what --model says: itself, or for a GGUF file (or a folder that
    holds one and no config.json) a transformers folder made from it once and kept in the cache.

    Raises ValueError, naming the flag, for a path that is no model."""
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_file():
        raise ValueError(f"--model {model}: no such file; give a folder, a .gguf file or a hub name")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"--model {model}: of single files only .gguf can be read; give the model's folder")
        return str(_gguf_folder(path))
    if path.is_dir():
        if (path / "config.json").is_file():
            return model
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return str(_gguf_folder(ggufs[0]))
        found = "no config.json and no .gguf file" if not ggufs else "several .gguf files: name one of them"
        raise ValueError(f"--model {model}: the folder has {found}")
    if looks_like_path(model):
        raise ValueError(f"--model {model}: no such folder; give a folder, a .gguf file or a hub name")
    return model


def model_source(model: str) -> Path | list[str]:
    """What stands for the model in a run's record: its folder, whose files are hashed, or the hub's name."""
    folder = Path(resolve_model(model))
    return folder if folder.is_dir() else [model]


def cache_dir() -> Path:
    """Where models that the project itself makes are kept: $XDG_CACHE_HOME (or ~/.cache) / grpo-recipes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo-recipes"


@contextlib.contextmanager
def whole_or_not_at_all(folder: Path) -> Iterator[str]:
    """A temporary folder beside `folder` to write into, which becomes `folder` when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        yield temporary
        with contextlib.suppress(OSError):  # another process was first: its folder is as good
            os.rename(temporary, folder)
            os.mkdir(temporary)  # what TemporaryDirectory is about to remove


def _gguf_folder(path: Path) -> Path:
    """The GGUF file dequantized to a bf16 transformers folder.

    transformers refuses to save a model loaded from GGUF, hence the fresh model that takes over its weights."""
    stat = path.stat()
    folder = cache_dir() / f"gguf-{path.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"--model {path}: reading GGUF needs the package gguf: pip install -e '.[gguf]'")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    fresh: Any = type(loaded)(type(loaded.config)(**settings))
    fresh.load_state_dict(loaded.state_dict(), strict=True)
    fresh.tie_weights()
    with whole_or_not_at_all(folder) as temporary:
        fresh.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _from_hub(what: str, model: str, load: Any) -> Any:
    """Run a transformers loader; turn its many errors for a name it cannot find into one line."""
    try:
        return load()
    except OSError as error:
        raise ValueError(
            f"--model {model}: could not load the {what}: neither a local folder nor a name the hub answers for "
            f"({str(error).splitlines()[0]}); give a folder with config.json, a .gguf file or a hub name"
        ) from error


def load_tokenizer(model: str, *, chat_template: bool = True) -> Any:
    """The model's tokenizer, with a pad token (the EOS where it has none: masks here come from lengths).

    Raises ValueError where it cannot be had, or, if `chat_template`, where it has no chat template."""
    folder = resolve_model(model)
    tokenizer = _from_hub("tokenizer", model, lambda: AutoTokenizer.from_pretrained(folder))
    if chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"--model {model}: the tokenizer has no chat template, so there is no telling how to ask it a question; "
            "take the model's instruct version, or put a chat_template.jinja into its folder"
        )
    tokenizer.clean_up_tokenization_spaces = False  # a reward must see what was said, spaces before stops included
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_chat(tokenizer: Any, messages: list[dict[str, str]], *, prefill: str = "") -> list[int]:
    """The token ids of a chat up to where the assistant's answer begins, by the model's own template: it places
    the one BOS itself. prefill: the first words of the answer, already said."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + prefill, add_special_tokens=False)["input_ids"]


def check_prompt_lengths(prompts: Sequence[Sequence[int]], max_prompt_tokens: int) -> None:
    """Raise ValueError, naming the flag, if a prompt is longer than the limit."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) > max_prompt_tokens:
        over = sum(len(p) > max_prompt_tokens for p in prompts)
        raise ValueError(
            f"{over} of {len(prompts)} prompts are longer than --max-prompt-tokens {max_prompt_tokens} (prompt "
            f"{longest} has {len(prompts[longest])} tokens); raise the limit to that, or filter the data by length"
        )


def check_context(config: Any, max_prompt_tokens: int, max_completion_tokens: int) -> None:
    """Raise ValueError, naming the flags, where a longest sequence has more tokens than the model was made for."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_prompt_tokens + max_completion_tokens > context:
        raise ValueError(
            f"--max-prompt-tokens {max_prompt_tokens} and --max-completion-tokens {max_completion_tokens} are more "
            f"than the {context} tokens the model was made for (max_position_embeddings); lower them"
        )


def stop_ids(model: str, tokenizer: Any) -> list[int]:
    """Every token id that ends a completion: those of generation_config, the tokenizer's EOS, and the token with
    which the chat template closes an assistant's turn. Models have up to three, and a file's metadata can name
    the wrong one; a missing one makes every answer look truncated."""
    ids: set[int] = set()
    with contextlib.suppress(OSError):  # not every model has one
        eos = GenerationConfig.from_pretrained(resolve_model(model)).eos_token_id
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False)["input_ids"]
        if after and after[0] in tokenizer.all_special_ids:
            ids.add(after[0])
    return sorted(ids)


def load_policy(
    model: str,
    *,
    lora_rank: int,
    lora_alpha: int | None = None,
    lora_targets: str = "all-linear",
    adapter: str | Path | None = None,
    load_in_4bit: bool = True,
    gradient_checkpointing: bool = False,
    kept_layers: int = 0,
    fused: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PeftModel:
    """The model to train: frozen NF4 weights (or 16/32-bit ones), a trainable LoRA adapter in fp32.

    Products run in bf16 on CUDA (autocast; the adapter's master weights stay fp32, since an update of 1e-5 is
    lost in bf16) and in fp32 on the CPU. A checkpoint that is already quantized is loaded as it is.

    lora_alpha: scaling is alpha / rank; None is alpha = rank. lora_targets: "all-linear" (all but the head), or
    module names separated by commas, wildcards allowed ("q_proj,v_proj", "*.mlp.*"). Dropout is 0: the ratio
    of new to old policy must not be noise. adapter: a trained adapter's folder, trained further; a frozen copy
    of it then is the reference policy (its rank, alpha and targets count).
    kept_layers: under gradient checkpointing, how many layers (the last ones, whose memory is free again first) keep
    their activations nevertheless, which saves their second forward pass (`grpo_rollout.fit.memory.kept_bytes` each).
    fused: take over norms, gated MLPs and adapted 4-bit layers in fewer passes over memory (`grpo.policy.layers`), and
    checkpointed layers' second forward pass (`grpo.policy.recompute`).
    seed: of the adapter's initial A (B is 0, so the policy starts as the base model).
    Raises ValueError, before weights are read, for a model, target or adapter that does not exist."""
    folder, config, modules = check_policy(model, lora_rank=lora_rank, lora_targets=lora_targets, adapter=adapter)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    quantized = {}  # absent, not None: None would override what a quantized checkpoint says of itself
    if load_in_4bit and getattr(config, "quantization_config", None) is None:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = _from_hub(
        "weights",
        model,
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **quantized),
    )
    # A quantized checkpoint may ask for other types than this device's, and transformers 5.23 heeds it over `dtype`.
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    multiply_in(base, dtype)
    if gradient_checkpointing:
        # The second is the first's name before transformers 5.2x, and warns since.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        # The reentrant way has no hooks around each saved tensor, and nothing in a layer is random: a seventh less work
        # for the host, which is what bounds small micro-batches. It wants an input that asks for a gradient.
        enable({"use_reentrant": True, "preserve_rng_state": False})
        base.enable_input_require_grads()
        layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers[max(0, len(layers) - kept_layers) :]:
            layer.gradient_checkpointing = False
    base.requires_grad_(False)
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 for an attribute by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        if adapter:
            policy = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
            policy.load_adapter(str(adapter), adapter_name=REFERENCE, is_trainable=False)
            policy.set_adapter("default")
        else:
            torch.manual_seed(seed)
            policy = get_peft_model(
                base,
                LoraConfig(
                    r=lora_rank,
                    lora_alpha=lora_rank if lora_alpha is None else lora_alpha,
                    target_modules=modules,
                    lora_dropout=0.0,
                    bias="none",
                    task_type="CAUSAL_LM",
                ),
            )
    for module in policy.modules():  # an adapter from elsewhere, or a base model, may ask for some
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if fused:
        fuse_layers(policy)
        recompute_layers(policy)
    policy.train()
    return policy


def multiply_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the 4-bit layers multiply in dtype, with and without gradients: a checkpoint may ask for another, and without
    gradients bitsandbytes repacks weights for bf16 where a CPU has AVX512-BF16."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            cast(Any, module.weight).quant_state.dtype = dtype
            module.support_avx512bf16_for_cpu = False


def check_policy(
    model: str, *, lora_rank: int, lora_targets: str = "all-linear", adapter: str | Path | None = None
) -> tuple[str, Any, list[str]]:
    """(folder or hub name, config, names of the adapted modules), without reading a weight: what `load_policy` checks
    first, for a recipe to check before it makes its run directory. Raises ValueError as `load_policy` does."""
    folder = resolve_model(model)
    config = _from_hub("config", model, lambda: AutoConfig.from_pretrained(folder))
    if lora_rank < 1:
        raise ValueError(f"--lora-rank {lora_rank} must be at least 1")
    modules = target_modules(config, lora_targets)
    if adapter:
        _check_adapter(Path(adapter), config)
    return folder, config, modules


def _check_adapter(adapter: Path, config: Any) -> None:
    """Raise ValueError, naming the flag and the layer, where an adapter's folder is none, or is another model's."""
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"--adapter {adapter}: no adapter_config.json in there; give a PEFT adapter's folder")
    shapes = {name: m.weight.shape for name, m in weightless(config).named_modules() if isinstance(m, nn.Linear)}
    for key, shape in adapter_shapes(adapter).items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        side = 1 if part == "A.weight" else 0
        layer = shapes.get(name)
        if layer is None or layer[side] != shape[side]:
            here = "has no such layer" if layer is None else f"has {list(layer)} there"
            raise ValueError(f"--adapter {adapter}: {key} does not fit: --model {here}; give the adapter's own model")


def adapter_shapes(adapter: str | Path) -> dict[str, list[int]]:
    """Tensor name -> shape of a PEFT adapter's folder, from the file's header. Empty for an old one, saved as .bin: it
    is not opened here, since that is unpickling."""
    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        return {}
    with safe_open(weights, "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no mapping)


def weightless(config: Any) -> Any:
    """The causal LM of a config, its parameters without memory (on the meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Full name -> linear layer, all but the head: those that are quantized and adapted."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def target_modules(config: Any, targets: str) -> list[str]:
    """The full names of the linear modules that `targets` means, found on a model without weights.

    Raises ValueError, naming the flag, the pattern that matches nothing and the names there are."""
    linear = list(linear_layers(weightless(config)))
    if targets.strip() == "all-linear":
        return linear
    chosen: set[str] = set()
    for pattern in (p.strip() for p in targets.split(",")):
        matched = [n for n in linear if n.split(".")[-1] == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not matched:
            kinds = ", ".join(sorted({n.split(".")[-1] for n in linear}))
            raise ValueError(f"--lora-targets: {pattern!r} matches no linear module of this model; it has {kinds}")
        chosen.update(matched)
    return [n for n in linear if n in chosen]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer gets. Raises ValueError where nothing is trainable: such a run would do nothing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter: load it with load_policy, which adds an adapter")
    return parameters


@contextlib.contextmanager
def reference_policy(model: PeftModel) -> Iterator[None]:
    """Within it, and without gradients, the model is the reference: the base model, or for a continued adapter
    the frozen copy of it that training started from."""
    with torch.no_grad():
        if REFERENCE not in model.peft_config:
            with model.disable_adapter():
                yield
            return
        model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter("default")  # which also makes it trainable again
