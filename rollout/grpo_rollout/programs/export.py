"""Merge a run's adapter into 16-bit weights, measure what that changes, and write a model folder with its card.

    grpo export runs/quickstart_grpo-2026-11-24-0 --out my-model
    grpo export RUN --out my-model --checkpoint best --weights dequantized

docs/runs.md explains the figures that it prints.
"""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from grpo.errors import UserError
from grpo.lazy import torch
from grpo.policy.chat import load_tokenizer, stop_ids
from grpo.policy.models import set_compute_dtype
from grpo.policy.sources import resolve_model
from grpo.runs.checkpoint import best_checkpoint, checkpoint_name, list_checkpoints, verify_checkpoint
from grpo.runs.record import last_values, read_metrics, read_run
from grpo.runs.report import read_completions
from grpo_rollout.programs import run_program
from grpo_rollout.programs.compare import Behaviour, Difference, behaviour, describe, difference, weight_changes

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from peft import PeftModel

ROUNDING_NATS = 0.25
"""largest margin between two greedy tokens that rounding may decide; above it the merged model is another one"""
PROMPTS = ["What is 7 + 5?", "Tom has 3 apples and buys 4 more. How many has he?", "Name a prime above 20."]
"""prompts to compare on where a run has kept none"""


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """run directory, or folder of a PEFT adapter"""
    out: Path | None = None
    """folder for the merged model, which must not exist; None: RUN/merged"""
    checkpoint: str = "final"
    """weights to merge: final (adapter/), best, or the step of a checkpoint"""
    base: str | None = None
    """base model's folder or name on the hub; None: the one that the adapter names"""
    weights: Literal["auto", "16bit", "dequantized"] = "auto"
    """weights to merge into: the base's own, or its NF4 weights dequantized; auto: 16bit if there are any"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """type of the merged weights; auto: float16 if the base is, otherwise bfloat16"""
    device: str = "auto"
    """device to merge and compare on; auto: the GPU if there is one, otherwise the CPU"""
    prompts: int = 8
    """number of the run's sample prompts to compare on"""
    max_tokens: int = 64
    """greedy tokens per prompt"""


def main(args: Args) -> None:
    """Export; exit with an error where the merged model differs from adapter and weights by more than rounding."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    merged = export(args)["merged"]
    if merged.margin > ROUNDING_NATS:
        raise SystemExit(
            f"the merged model is another one: completions part by {merged.margin:.2f} nats, more than rounding"
        )


def export(args: Args) -> dict[str, Difference]:
    """Merge, compare, and write the model's folder. Returns the comparisons with the merged model: "merged" (adapter
    beside the same weights) and "trained" (the policy as it was trained, on NF4 weights).

    Raises UserError, naming the flag, before anything is loaded where that is possible."""
    adapter = find_adapter(args.run, args.checkpoint)
    out = args.out or args.run / "merged"
    if out.exists():
        raise UserError(f"--out {out} exists, and is never overwritten: choose another folder")
    base = find_base(adapter, args)
    record = read_run(args.run) if adapter != args.run else {}  # nothing is known of a bare adapter
    tokenizer = load_tokenizer(base.folder, chat_template=False)
    prompts = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in sample_prompts(args.run, args.prompts)]
    ask = functools.partial(
        behaviour, prompts=prompts, max_tokens=args.max_tokens, eos_ids=stop_ids(base.folder, tokenizer)
    )
    in_4bit = base.quantized or record.get("args", {}).get("load_in_4bit", True)
    merged, found, checks = merge_and_compare(base, adapter, ask, trained_in_4bit=in_4bit)
    source = "dequantized NF4" if base.dequantize else f"{8 * base.dtype.itemsize}-bit"
    dtype = str(base.dtype).removeprefix("torch.")
    how = f"A LoRA adapter merged into the base model's {source} weights, {dtype}."

    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    results = results_of(args.run, adapter)
    if results and (args.run / "rewards.png").is_file():
        shutil.copy(args.run / "rewards.png", temporary)
    model_card(base.name, record, results, how, checks).save(temporary / "README.md")
    temporary.rename(out)
    for line in (how, *checks, f"written: {out}"):
        print(line)
    return found


def merge_and_compare(
    base: Base, adapter: Path, ask: Callable[..., Behaviour], *, trained_in_4bit: bool
) -> tuple[Any, dict[str, Difference], list[str]]:
    """(merged model, comparisons of `export`, what they say in words). One model at a time is in memory.

    ask: model -> its `behaviour`."""
    trained: Behaviour | None = None
    if trained_in_4bit:
        trained = ask(with_adapter(base.load(four_bit=True), adapter))
    weights = base.load(four_bit=base.dequantize)
    if base.dequantize:
        weights = weights.dequantize(dtype=base.dtype)
    model = with_adapter(weights, adapter)
    beside = ask(model)
    by_adapter, by_nf4 = weight_changes(model)
    nf4 = "" if base.dequantize else f", NF4 by {by_nf4:.3%}"
    checks = [f"weights: the adapter moves them by {by_adapter:.3%} of their norm{nf4}"]
    merged = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    found = {"merged": difference(beside, ask(merged, along=beside.completions))}
    checks.append(describe("adapter against merged", found["merged"]))
    if trained is not None:
        found["trained"] = difference(trained, ask(merged, along=trained.completions))
        checks.append(describe("policy as trained, on NF4 weights, against merged", found["trained"]))
    return merged, found, checks


def with_adapter(model: Any, adapter: Path) -> PeftModel:
    """The model with the adapter beside its weights, for inference."""
    from peft import PeftModel

    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 for an attribute by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return PeftModel.from_pretrained(model, str(adapter)).eval()


def find_adapter(run: Path, checkpoint: str) -> Path:
    """The adapter's folder that `--checkpoint` means.

    Raises UserError where there is none. A checkpoint is checked against its checksums."""
    if (run / "adapter_config.json").is_file():
        if checkpoint != "final":
            raise UserError(f"--checkpoint {checkpoint}: {run} is an adapter, not a run; leave it out")
        return run
    record = read_run(run)
    folder = run / "checkpoints"
    if checkpoint == "final":
        # A resumed run may have an adapter/, but until it has finished that is the one of its earlier end.
        if "finished" not in record:
            raise UserError(
                f"--checkpoint final: {run}: the run has not finished; give --checkpoint best or a step, or go on with "
                f"--resume {run}"
            )
        if not (run / "adapter" / "adapter_config.json").is_file():
            raise UserError(f"--checkpoint final: {run} has no adapter/; give --checkpoint best or a step")
        return run / "adapter"
    if checkpoint == "best":
        path = best_checkpoint(folder)
        if path is None:
            raise UserError(f"--checkpoint best: no checkpoint in {folder} was evaluated; give a step or final")
    else:
        path = folder / checkpoint_name(int(checkpoint)) if checkpoint.isdigit() else None
        if path is None or not path.is_dir():
            steps = ", ".join(str(int(p.name.removeprefix("step-"))) for p in list_checkpoints(folder)) or "none"
            raise UserError(f"--checkpoint {checkpoint}: final, best or a step; there are: {steps}")
    return verify_checkpoint(path).path / "adapter"


class Base(NamedTuple):
    """The base model, and how its weights are to be loaded."""

    name: str
    """name or folder of the base model, as it was given or as the adapter names it"""
    folder: str
    """transformers folder, or name on the hub"""
    quantized: bool
    """whether the checkpoint itself is quantized"""
    dequantize: bool
    """whether to merge into dequantized NF4 weights rather than into the base's own"""
    dtype: torch.dtype
    """type of the merged weights"""
    device: str

    def load(self, *, four_bit: bool) -> Any:
        """The base model in `dtype`, or with NF4 weights as in training."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        settings: dict[str, Any] = {"dtype": self.dtype, "device_map": {"": self.device}}
        if four_bit and not self.quantized:
            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
            )
        model = AutoModelForCausalLM.from_pretrained(self.folder, **settings)
        set_compute_dtype(model, self.dtype)
        return model.eval()


def find_base(adapter: Path, args: Args) -> Base:
    """The base model that the flags and the adapter name. Raises UserError where there is none that fits them."""
    from transformers import AutoConfig

    name = args.base or json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not name:
        raise UserError(f"--base: {adapter}/adapter_config.json names no base model; name it")
    folder = resolve_model(name)
    config = AutoConfig.from_pretrained(folder)
    quantized = getattr(config, "quantization_config", None) is not None
    if args.weights == "16bit" and quantized:
        raise UserError(f"--weights 16bit: {name} is quantized; give its 16-bit original as --base, or dequantized")
    own = torch.float16 if getattr(config, "dtype", None) is torch.float16 else torch.bfloat16
    dtype = own if args.dtype == "auto" else getattr(torch, args.dtype)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return Base(name, folder, quantized, quantized or args.weights == "dequantized", dtype, device)


def sample_prompts(run: Path, count: int) -> list[str]:
    """Prompts of the completions that the run kept last (held-out ones, if there are any), each once."""
    files = sorted((run / "completions").glob("eval-*.jsonl")) or sorted((run / "completions").glob("train-*.jsonl"))
    kept = [record["prompt"] for record in read_completions(files[-1])] if files else PROMPTS
    return list(dict.fromkeys(kept))[:count]


def results_of(run: Path, adapter: Path) -> dict[str, Any]:
    """The last value of every metric, and `step`, at the time when the weights in `adapter` were saved: at the step of
    the checkpoint, or at the end of the run. Empty for a bare adapter."""
    if adapter == run:
        return {}
    metrics = run / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    if adapter.parent != run:
        step = int(adapter.parent.name.removeprefix("step-"))
        lines = [line for line in lines if line["step"] <= step]
    return last_values(lines)


def model_card(
    base: str, record: Mapping[str, Any], results: Mapping[str, Any], how: str, checks: Sequence[str]
) -> ModelCard:
    """The merged model's card: where it comes from, the command, the results, and what merging changed."""
    from huggingface_hub import ModelCard, ModelCardData

    name = Path(base).name if Path(base).is_absolute() else base  # a path of this machine says nothing elsewhere
    data = ModelCardData(
        base_model=name if "/" in name else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["grpo", "lora"],
    )
    rows = [f"| {metric} | {value:.6g} |" for metric, value in results.items() if metric not in ("schema", "step")]
    table = [
        f"The weights are those after step {results.get('step')}. Last values of the metrics up to it:",
        "\n".join(["| metric | value |", "| --- | --- |", *rows]),
        "The whole run:",
        "![curves](rewards.png)",
    ]
    versions = ", ".join(f"{package} {version}" for package, version in record.get("versions", {}).items())
    commit = (record.get("git") or {}).get("commit", "unknown")
    paragraphs = [
        f"# {name}, trained with GRPO",
        f"{how} Trained with `{record.get('recipe', 'an unknown recipe')}`, seed {record.get('seed', 'unknown')}:",
        f"```\n{record.get('command', 'unknown')}\n```",
        *(table if rows else []),
        "What merging changed, on sample prompts of the run:",
        "\n".join(f"- {check}" for check in checks),
        f"Code: commit {commit}. Versions: {versions}. Device: {record.get('device', 'unknown')}.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(paragraphs) + "\n")


if __name__ == "__main__":
    run_program(Args, main)
