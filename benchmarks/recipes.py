"""The big recipes as they are, on random weights of the true shapes: seconds by phase, and whether they keep within
their card, as nvidia-smi shows it. Needs a GPU.

    python benchmarks/recipes.py                                 # every row of the table
    python benchmarks/recipes.py --only phi4-15 llama31_8b-10    # some rows
    python benchmarks/recipes.py --only llama33_70b-48 --layers 8
    python benchmarks/recipes.py --only llama31_8b-24 --sampled-tokens 1024   # the memory of 20,224, in less time

The values of the weights do not matter for speed and memory, but three things do that depend on them, and those are
replaced. The reward for a right answer is a coin (a hash of the answer), because the head's gradient is computed only
where the rewards of a group differ. Prompts are filled up to 256 tokens. Evaluations, which are no part of a step, take
one token.
"""

import functools
import hashlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from grpo.errors import UserError
from grpo.runs.args import flatten, with_values
from grpo.runs.cli import show_one_line_errors
from grpo_rollout.fit.memory import GIB

ROOT = Path(__file__).parent.parent
GB = 1e9
MARK = "[mark]"
PARTS = {"load_policy": "load", "make_engine": "engine", "fit_test": "fit test"}
"""function that a recipe calls before its first step -> name of the time until it has returned"""


class Row(NamedTuple):
    """A recipe on a card."""

    recipe: str
    """file in recipes/, without _grpo.py"""
    shapes: str
    """name of the model's shapes in benchmarks/random_model.py"""
    group_size: int
    completion_tokens: int
    limit_gb: float
    """memory of the card in units of 1e9 bytes, the smaller reading of a card's GB"""
    flags: dict[str, Any] = {}  # noqa: RUF012, never written to
    """further flags of the recipe"""


ROWS = {
    "phi4-15": Row("phi4", "phi4", 6, 256, 15),
    "phi4-16": Row("phi4", "phi4", 8, 1024, 16),
    "llama31_8b-10": Row("llama31_8b", "llama31_8b", 8, 768, 10),
    "mistral_7b-10": Row("mistral_7b", "mistral_7b", 8, 768, 10),
    "qwen25_7b-10": Row("qwen25_7b", "qwen25_7b", 8, 768, 10),
    "qwen25_1_5b-5": Row("qwen25_1_5b", "qwen25_1_5b", 8, 512, 5),
    "llama31_8b-24": Row("llama31_8b", "llama31_8b", 8, 20_224, 24),
    "countdown_zero-8": Row("countdown_zero", "qwen25_3b", 8, 1024, 8, {"train_puzzles": 50}),
    "llama33_70b-48": Row("llama33_70b", "llama33_70b", 8, 768, 48),
}


@dataclass
class Args:
    only: tuple[str, ...] = tuple(ROWS)
    """rows to run"""
    steps: int = 3
    """number of optimizer steps per row"""
    folder: Path = Path("/tmp/random-models")
    """folder for checkpoints, which are kept for the next time, and for runs"""
    layers: int | None = None
    """number of layers, the first ones; None: all"""
    limit: bool = True
    """whether to give the row's limit as --gpu-memory-gib, rather than the whole card"""
    sampled_tokens: int | None = None
    """tokens after which completions end; KV cache and fit test stay those of the row's length"""
    extra: dict[str, str] = field(default_factory=dict)
    """further flags of the recipe by their fields' names, such as kv_cache_dtype fp8"""


class Smi(threading.Thread):
    """What nvidia-smi shows in use within a block, asked every 20 ms until the file `metrics` has `lines` lines. Asking
    slows the trainer's launches down, so the last step is timed without it."""

    def __init__(self, metrics: Path, lines: int) -> None:
        super().__init__()
        self.metrics, self.lines = metrics, lines

    def __enter__(self) -> "Smi":
        card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = f"nvidia-smi --id={card} --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=20"
        self.process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, text=True)
        self.seen: list[tuple[float, float]] = []
        """seconds since the epoch, GB"""
        self.start()
        return self

    def run(self) -> None:
        for line in self.process.stdout:
            self.seen.append((time.time(), int(line.split()[0]) * 2**20 / GB))
            if self.metrics.exists() and self.metrics.read_bytes().count(b"\n") >= self.lines:
                self.process.kill()

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.join()

    def most(self, begin: float, end: float) -> float:
        """GB at most between two times; 0 if nothing was seen."""
        return max((used for seen, used in self.seen if begin <= seen <= end), default=0.0)


def marked(name: str, function: Any) -> Any:
    """The function, which also prints the time at which it ends."""

    def run(*args: Any, **settings: Any) -> Any:
        result = function(*args, **settings)
        print(MARK, name, time.time(), flush=True)
        return result

    return run


def coin(completions: list[str], ground_truths: list[str], **_: Any) -> list[float]:
    """0 or 1 by a hash of the answer."""
    return [float(hashlib.sha256(text.encode()).digest()[0] & 1) for text in completions]


def write_data(folder: Path) -> Path:
    """Write a few questions in both splits."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, first in (("train", 1000), ("test", 5000)):
        rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(first, first + 64)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def filled(encode_chat: Any, length: int, *args: Any, **settings: Any) -> list[int]:
    """A prompt of `length` tokens: its second token is repeated."""
    ids = encode_chat(*args, **settings)
    return ids[:1] + ids[1:2] * (length - len(ids)) + ids[1:]


def engine_of_short_answers(make_engine: Any, most: int | None, *args: Any) -> Any:
    """An engine whose completions have at most `most` tokens (None: as many as asked for), and those of an evaluation
    one."""
    # Random weights amplify the rounding of bf16 (docs/performance.md), so sampler and trainer differ by more.
    engine = make_engine(*args, tolerance=1.0)
    generate = engine.generate

    def shorter(prompts: Any, group_size: int, sampling: Any, *, seed: int) -> Any:
        tokens = 1 if group_size == 1 else min(most or sampling.max_tokens, sampling.max_tokens)
        return generate(prompts, group_size, sampling._replace(max_tokens=tokens), seed=seed)

    engine.generate = shorter
    return engine


def child(settings: dict[str, Any]) -> None:
    """Run one recipe, in a process of its own. settings: its flags, its name and the most tokens to sample."""
    sys.path.insert(0, str(ROOT / "recipes"))
    recipe = importlib.import_module(f"{settings.pop('recipe')}_grpo")
    most = settings.pop("sampled_tokens")
    replace_parts(recipe, most)
    recipe.main(recipe_args(recipe, settings))


def recipe_args(recipe: Any, flags: dict[str, Any]) -> Any:
    """The recipe's arguments with these flags, given by the names of their fields. Raises UserError for one that the
    recipe does not have."""
    unknown = flags.keys() - flatten(recipe.Args()).keys()
    if unknown:
        raise UserError(f"--extra {sorted(unknown)[0]}: {recipe.__name__} has no such field")
    return with_values(recipe.Args(), flags)


def replace_parts(recipe: Any, most: int | None) -> None:
    """Put the coin, the short answers, the filled prompts and the marks where the recipe has imported the real ones."""
    setattr(recipe, "countdown" if hasattr(recipe, "countdown") else "correctness", coin)
    recipe.make_engine = functools.partial(engine_of_short_answers, recipe.make_engine, most)
    for function, part in PARTS.items():
        setattr(recipe, function, marked(part, getattr(recipe, function)))
    if hasattr(recipe, "encode_chat"):
        length = recipe.Args().rollout.max_prompt_tokens
        recipe.encode_chat = functools.partial(filled, recipe.encode_chat, length)


def flags(args: Args, row: Row, model: Path, run_dir: Path, data: Path) -> dict[str, Any]:
    """The recipe's flags for a row, by the names of their fields."""
    own: dict[str, Any] = {"data": str(data)}
    if row.recipe == "countdown_zero":
        own = {"max_prompt_tokens": 512}  # the byte tokenizer makes its instructions long
    if args.limit:
        own["gpu_memory_gib"] = row.limit_gb * GB / GIB
    return {
        "model": str(model), "run_dir": str(run_dir), "steps": args.steps, "prompts_per_step": 1,
        "group_size": row.group_size, "max_completion_tokens": row.completion_tokens,
        "eval_questions": 1, "eval_every": 0, "save_every": 0,
        **own, **row.flags, **args.extra,
    }  # fmt: skip


def main(args: Args) -> None:
    unknown = set(args.only) - set(ROWS)
    if unknown:
        raise UserError(f"--only {sorted(unknown)[0]}: there is no such row; choose of {', '.join(ROWS)}")
    data = write_data(args.folder / "data")
    print(f"{'row':18}{'G x tokens':>12}{'limit GB':>10}{'peak GB':>9}{'before':>8}  seconds by phase, each step")
    for name in args.only:
        row = ROWS[name]
        model = args.folder / (row.shapes + (f"-{args.layers}" if args.layers else ""))
        if not model.exists():
            layers = ["--layers", str(args.layers)] if args.layers else []
            writer = ROOT / "benchmarks" / "random_model.py"
            subprocess.run([sys.executable, str(writer), row.shapes, str(model), *layers], check=True)
        run_dir = args.folder / f"run-{name}-{time.time():.0f}"
        settings = flags(args, row, model, run_dir, data)
        settings |= {"recipe": row.recipe, "sampled_tokens": args.sampled_tokens}
        begin = time.time()
        with Smi(run_dir / "metrics.jsonl", args.steps) as smi:  # one of these lines is the first evaluation's
            result = subprocess.run(
                [sys.executable, __file__, "--child", json.dumps(settings)], capture_output=True, text=True, check=False
            )
        report(name, row, args.limit, smi, begin, time.time(), result, run_dir)


def report(
    name: str, row: Row, limited: bool, smi: Smi, begin: float, end: float,
    result: subprocess.CompletedProcess[str], run_dir: Path,
) -> None:  # fmt: skip
    """Print what one row took. begin, end: of its process, in seconds since the epoch."""
    peak, before = smi.most(begin, end), smi.seen[0][1] if smi.seen else 0.0
    size = f"{row.group_size} x {row.completion_tokens}"
    verdict = "" if peak <= row.limit_gb or not limited else "  OVER THE LIMIT"
    print(f"{name:18}{size:>12}{row.limit_gb:10.0f}{peak:9.2f}{before:8.2f}{verdict}", flush=True)
    # A part's name may hold spaces; the time is the last word.
    marks = [line.removeprefix(MARK).strip().rsplit(" ", 1) for line in result.stdout.splitlines()
             if line.startswith(MARK)]  # fmt: skip
    moments = [begin, *(float(when) for _, when in marks), end]
    parts = zip([*(part for part, _ in marks), "steps"], itertools.pairwise(moments))
    print("    peak GB:", ", ".join(f"{part} {smi.most(*span):.2f}" for part, span in parts), end="; ")
    print("ended after s:", ", ".join(f"{part} {float(when) - begin:.0f}" for part, when in marks), flush=True)
    for line in result.stderr.splitlines():
        if "slower than" in line:  # a kernel that fell back to torch
            print("   ", line, flush=True)
    if result.returncode:
        print(f"    FAILED ({result.returncode})\n{result.stderr[-3000:]}", flush=True)
        return
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        times = line["times"]
        phases = ", ".join(f"{key.split('/')[1]} {times[key]:.2f}" for key in times if key.startswith("seconds/"))
        print(
            f"    step {line['step']}: {times['seconds']:.2f} s ({phases}); {line['tokens']} tokens, gap "
            f"{line['mismatch_mean']:.1e} nats, zero variance {line['zero_variance']:.2f}", flush=True,
        )  # fmt: skip
    print(f"    {end - begin:.0f} s from the process's start to its end", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        show_one_line_errors()
        main(tyro.cli(Args, description=__doc__))
