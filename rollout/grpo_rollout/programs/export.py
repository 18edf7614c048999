"""Merge a run's adapter into 16-bit weights, measure what that changes, and write a model folder with its card.

python -m grpo_rollout.programs.export runs/quickstart_grpo-2026-11-24-0 --out my-model        docs/runs.md
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from grpo.policy.models import load_tokenizer, multiply_in, resolve_model, stop_ids
from grpo.runs.checkpoint import best_checkpoint, checkpoint_name, list_checkpoints, verify_checkpoint
from grpo.runs.cli import user_errors
from grpo.runs.report import read_completions
from grpo.runs.run import last_values, read_metrics, read_run


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """a run directory, or a PEFT adapter's folder"""
    out: Path | None = None
    """where the merged model goes; default RUN/merged"""
    checkpoint: str = "final"
    """which weights: final (adapter/), best, or a checkpoint's step"""
    base: str | None = None
    """the base model's folder or hub name; default: what the adapter names"""
    weights: Literal["auto", "16bit", "dequantized"] = "auto"
    """merge into the base's own 16-bit weights, or into its NF4 weights dequantized; auto: 16bit if there are any"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """of the merged weights; auto: the base's own, bfloat16 if that is float32"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where to merge and compare"""
    prompts: int = 8
    """how many sample prompts of the run to compare on"""
    max_tokens: int = 64
    """greedy tokens a prompt"""


class Difference(NamedTuple):
    """Two models on the same prompts: the first's greedy completions, and how the second sees them."""

    equal: int
    """prompts whose greedy completions are the same"""
    prompts: int
    mean: float
    """mean |difference| of the log-probabilities of the first's tokens, nats"""
    largest: float
    """largest one, nats"""
    margin: float
    """where greedy completions part: how much likelier the first held its own token than the second's, nats; the
    largest over prompts, 0 if none parts. A small one is a tie that rounding decides."""


def find_adapter(run: Path, checkpoint: str) -> Path:
    """The adapter's folder that `--checkpoint` means.

    Raises ValueError, naming the flag, where there is none; a checkpoint is checked against its checksums."""
    if (run / "adapter_config.json").is_file():
        if checkpoint != "final":
            raise ValueError(f"--checkpoint {checkpoint}: {run} is an adapter, not a run; leave it out")
        return run
    record = read_run(run)
    folder = run / "checkpoints"
    if checkpoint == "final":
        # Of a run that was resumed adapter/ may be there, but is that of the earlier end.
        if "finished" not in record:
            raise ValueError(
                f"--checkpoint final: {run}: the run has not finished; give --checkpoint best or a step, or go on with "
                f"--resume {run}"
            )
        if not (run / "adapter" / "adapter_config.json").is_file():
            raise ValueError(f"--checkpoint final: {run} has no adapter/; give --checkpoint best or a step")
        return run / "adapter"
    if checkpoint == "best":
        path = best_checkpoint(folder)
        if path is None:
            raise ValueError(f"--checkpoint best: no checkpoint in {folder} was evaluated; give a step or final")
    else:
        path = folder / checkpoint_name(int(checkpoint)) if checkpoint.isdigit() else None
        if path is None or not path.is_dir():
            steps = ", ".join(str(int(p.name.removeprefix("step-"))) for p in list_checkpoints(folder)) or "none"
            raise ValueError(f"--checkpoint {checkpoint}: final, best or a step; there are: {steps}")
    return verify_checkpoint(path).path / "adapter"


def load_base(folder: str, *, four_bit: bool, dtype: torch.dtype, device: str) -> nn.Module:
    """The base model, in `dtype`, or with NF4 weights as in training."""
    quantization = None
    if four_bit and getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is None:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )
    multiply_in(model, dtype)
    return model.eval()


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, eos_ids: Sequence[int]) -> list[list[int]]:
    """The greedy completion of each prompt, one by one, so that no padding takes part."""
    completions = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=list(eos_ids),
            pad_token_id=eos_ids[0],
        )
        completions.append(out[0, len(prompt) :].tolist())
    return completions


@torch.no_grad()
def token_logps(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of every token at each place of a completion: [time, vocabulary] float32, nats, on the CPU."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).cpu()


class Behaviour(NamedTuple):
    """What a model does on some prompts, kept so that it can leave memory before the next one is loaded."""

    completions: list[list[int]]
    logps: list[torch.Tensor]
    """one [time, vocabulary] a prompt, of the model at the places of `judged`"""


def behaviour(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    eos_ids: Sequence[int],
    judged: Sequence[Sequence[int]] | None = None,
) -> Behaviour:
    """A model's greedy completions, and its log-probabilities along `judged` (None: along those)."""
    completions = greedy(model, prompts, max_tokens, eos_ids)
    along = completions if judged is None else judged
    return Behaviour(completions, [token_logps(model, p, c) for p, c in zip(prompts, along)])


def difference(first: Behaviour, second: Behaviour) -> Difference:
    """Compare two models; `second` must have been judged along the first's completions."""
    gaps, margins = [], [0.0]
    for a, b, logps_a, logps_b in zip(first.completions, second.completions, first.logps, second.logps):
        index = torch.tensor(a)[:, None]
        gaps.append((logps_a.gather(1, index) - logps_b.gather(1, index)).abs().flatten())
        for t, (x, y) in enumerate(zip(a, b)):
            if x != y:
                margins.append(float(logps_a[t, x] - logps_a[t, y]))
                break
    gap = torch.cat(gaps)
    equal = sum(a == b for a, b in zip(first.completions, second.completions))
    return Difference(equal, len(gaps), float(gap.mean()), float(gap.max()), max(margins))


def weight_changes(model: PeftModel) -> tuple[float, float]:
    """How far the adapted weight matrices are moved, relative to their norm: by the adapter; by NF4.

    Computed before merging, on 16- or 32-bit weights. Frobenius norms over all adapted matrices together."""
    total = by_adapter = by_nf4 = 0.0
    for module in model.modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        weight = module.get_base_layer().weight.detach()  # type: ignore[operator]
        total += float(weight.float().square().sum())
        by_adapter += float(module.get_delta_weight("default").float().square().sum())  # type: ignore[operator]
        packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        by_nf4 += float((dequantize_4bit(packed, state).to(weight.dtype) - weight).float().square().sum())
    return (by_adapter / total) ** 0.5, (by_nf4 / total) ** 0.5


def sample_prompts(run: Path, count: int) -> list[str]:
    """Prompts of the run's latest kept completions (held-out ones if there are any), each once."""
    files = sorted((run / "completions").glob("eval-*.jsonl")) or sorted((run / "completions").glob("train-*.jsonl"))
    if not files:
        return ["What is 7 + 5?", "Tom has 3 apples and buys 4 more. How many has he?", "Name a prime above 20."][
            :count
        ]
    return list(dict.fromkeys(record["prompt"] for record in read_completions(files[-1])))[:count]


def results_of(run: Path, adapter: Path) -> dict[str, Any]:
    """The last value of every metric when the weights in `adapter` were saved, `step` among them: of a checkpoint's
    that is its step, else the end of the run. Empty for a bare adapter."""
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
) -> str:
    """README.md of the merged model: where it comes from, the command, the results, what merging changed."""
    rows = [f"| {name} | {value:.6g} |" for name, value in results.items() if name not in ("schema", "step")]
    table = []
    if rows:
        table = [
            f"The weights are those after step {results['step']}. Last values of the metrics up to it:",
            "",
            "| metric | value |\n| --- | --- |",
            *rows,
            "",
            "The whole run:",
            "",
            "![curves](rewards.png)",
            "",
        ]
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    commit = (record.get("git") or {}).get("commit", "unknown")
    # Of a base that is a folder of this machine only the name says anything elsewhere.
    name = Path(base).name if Path(base).is_absolute() else base
    return "\n".join(
        [
            "---",
            *([f"base_model: {name}"] if "/" in name else []),
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [grpo, lora]",
            "---",
            f"# {name}, trained with GRPO",
            "",
            f"{how} Trained with `{record.get('recipe', 'an unknown recipe')}`, seed {record.get('seed', 'unknown')}:",
            "",
            f"```\n{record.get('command', 'unknown')}\n```",
            "",
            *table,
            "What merging changed, on sample prompts of the run:",
            "",
            *(f"- {check}" for check in checks),
            "",
            f"Code: commit {commit}. Versions: {versions}. Device: {record.get('device', 'unknown')}.",
            "",
        ]
    )


def describe(what: str, d: Difference) -> str:
    """One line of a comparison."""
    ties = "" if d.equal == d.prompts else f" (where they part, by at most {d.margin:.4f} nats)"
    return (
        f"{what}: {d.equal} of {d.prompts} greedy completions equal{ties}; log-probabilities differ by "
        f"{d.mean:.5f} nats a token on average, {d.largest:.5f} at most"
    )


def export(args: Args) -> dict[str, Difference]:
    """Merge, compare, write. Returns the comparisons: "merged" (adapter beside the same weights against merged),
    "trained" (the policy as trained, on NF4 weights, against merged).

    Raises ValueError, naming the flag, before anything is loaded where that is possible."""
    adapter = find_adapter(args.run, args.checkpoint)
    out = args.out or args.run / "merged"
    if out.exists():
        raise ValueError(f"--out {out} exists, and is never overwritten: choose another folder")
    base = args.base or json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not base:
        raise ValueError(f"--base: {adapter}/adapter_config.json names no base model; name it")
    folder = resolve_model(base)
    config = AutoConfig.from_pretrained(folder)
    quantized = getattr(config, "quantization_config", None) is not None
    if args.weights == "16bit" and quantized:
        raise ValueError(f"--weights 16bit: {base} is quantized; give its 16-bit original as --base, or dequantized")
    dequantize = args.weights == "dequantized" or quantized
    own = getattr(config, "dtype", None)
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else own if own is torch.float16 else torch.bfloat16
    record = read_run(args.run) if adapter != args.run else {}  # of a bare adapter nothing is known
    tokenizer = load_tokenizer(folder, chat_template=False)
    prompts = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in sample_prompts(args.run, args.prompts)]
    eos_ids = stop_ids(folder, tokenizer)
    checks: list[str] = []
    found: dict[str, Difference] = {}

    trained: Behaviour | None = None
    model: Any
    if quantized or record.get("args", {}).get("load_in_4bit", True):
        model = PeftModel.from_pretrained(load_base(folder, four_bit=True, dtype=dtype, device=args.device), adapter)
        trained = behaviour(model, prompts, args.max_tokens, eos_ids)
        del model
    weights: Any = load_base(folder, four_bit=dequantize, dtype=dtype, device=args.device)
    if dequantize:
        weights = weights.dequantize(dtype=dtype)
    model = PeftModel.from_pretrained(weights, adapter).eval()
    beside = behaviour(model, prompts, args.max_tokens, eos_ids)
    by_adapter, by_nf4 = weight_changes(model)
    nf4 = "" if dequantize else f", NF4 by {by_nf4:.3%}"
    checks.append(f"weights: the adapter moves them by {by_adapter:.3%} of their norm{nf4}")
    merged = model.merge_and_unload(safe_merge=True)
    found["merged"] = difference(beside, behaviour(merged, prompts, args.max_tokens, eos_ids, beside.completions))
    checks.append(describe("adapter against merged", found["merged"]))
    if trained is not None:
        found["trained"] = difference(
            trained, behaviour(merged, prompts, args.max_tokens, eos_ids, trained.completions)
        )
        checks.append(describe("policy as trained, on NF4 weights, against merged", found["trained"]))

    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    source = "dequantized NF4 weights" if dequantize else "16-bit weights" if dtype.itemsize == 2 else "32-bit weights"
    how = f"A LoRA adapter merged into the base model's {source}, {str(dtype).removeprefix('torch.')}."
    results = results_of(args.run, adapter)
    if results and (args.run / "rewards.png").is_file():
        shutil.copy(args.run / "rewards.png", temporary)
    (temporary / "README.md").write_text(model_card(base, record, results, how, checks), encoding="utf-8")
    temporary.rename(out)
    for line in (how, *checks, f"written: {out}"):
        print(line)
    return found


if __name__ == "__main__":
    disable_progress_bar()
    with user_errors():
        merged = export(tyro.cli(Args, description=__doc__))["merged"]
    if merged.margin > 0.25:
        sys.exit(f"the merged model is another one: completions part by {merged.margin:.2f} nats, more than rounding")
