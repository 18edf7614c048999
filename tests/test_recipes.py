"""What the recipes share is the same word for word; each big recipe as a user starts it, on a tiny random model of its
architecture; its plan; its page in the docs."""

import difflib
import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import load_recipe, recipe_args, write_byte_model
from safetensors.torch import load_file

from grpo.runs.record import read_metrics, read_run

ROOT = Path(__file__).parent.parent
MATH = ["\\frac{1}{2}", "7", "3", "x+1", "48", "\\sqrt{12}"]
TAGGED = [f"<reasoning>so</reasoning><answer>{n}</answer>" for n in range(200)]
BOXED = [f"{n} times so \\boxed{{{ground_truth}}}" for n in range(30) for ground_truth in MATH]
THOUGHT = [f"let me check {n}</think><answer>1+2</answer>" for n in range(200)]


class Recipe(NamedTuple):
    architecture: str
    answers: list[str]
    """tokens of the model's vocabulary: whole answers, so that a random model earns rewards, and not all alike"""
    data: str | None
    flags: str = ""


RECIPES = {
    "llama31_8b": Recipe("llama", TAGGED, "gsm8k"),
    "phi4": Recipe("phi3", BOXED, "math"),
    "mistral_7b": Recipe("mistral", TAGGED, "gsm8k"),
    "qwen25_7b": Recipe("qwen2", BOXED, "math", "--overlong-buffer 1"),
    "qwen25_1_5b": Recipe("qwen2", TAGGED, "gsm8k"),
    "llama33_70b": Recipe("llama", BOXED, "math"),
    "countdown_zero": Recipe("qwen2", THOUGHT, None, "--train-puzzles 30"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of a few questions in GSM8K's and in MATH's form."""
    folder = tmp_path_factory.mktemp("data")
    gsm8k = (ROOT / "tests" / "data" / "gsm8k_form.jsonl").read_text().splitlines()
    math = [json.dumps({"question": f"What is [{g}]?", "answer": f"It is \\boxed{{{g}}}."}) for g in MATH]
    for name, lines in {"gsm8k": gsm8k, "math": math}.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("\n".join(lines[:-2]))
        (folder / name / "test.jsonl").write_text("\n".join(lines[-2:]))
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_its_page_explains_what_it_logs(name, data, tmp_path):
    recipe = RECIPES[name]
    model = write_byte_model(tmp_path / "model", recipe.architecture, recipe.answers)
    path = ROOT / "recipes" / f"{name}_grpo.py"
    words = f"--model {model} --run-dir {tmp_path / 'run'} --steps 2 --prompts-per-step 2 --group-size 8 \
        --max-prompt-tokens 900 --max-completion-tokens 1 --eval-questions 2 --warmup-steps 0 --learning-rate 1e-2 \
        {'--data ' + str(data / recipe.data) if recipe.data else ''} {recipe.flags}"
    result = subprocess.run(
        [sys.executable, str(path), *words.split()], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [("eval/pass_at_1" in line) for line in lines] == [True, False, True]
    assert all(line["mismatch_mean"] < 1e-4 for line in lines[1:])  # sampler and trainer are one policy
    assert any(line["zero_variance"] < 1 and line["grad_norm"] > 0 for line in lines[1:])
    assert read_run(tmp_path / "run")["inputs"].keys() == {"model", "adapter", "train", "held_out"}
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = [n for n, t in adapter.items() if "lora_B" in n and torch.count_nonzero(t)]
    assert len(moved) == len(adapter) / 2  # B begins at zero: every adapted layer has learnt something
    if recipe.architecture == "phi3":
        assert {n.split(".")[-3] for n in moved} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}

    metrics = (ROOT / "docs" / "metrics.md").read_text()
    page = (ROOT / "docs" / "recipes" / f"{name}.md").read_text()
    logged = [key for key in lines[-1] if key not in ("schema", "step", "times")]
    assert not [key for key in logged if f"`{key}`" not in metrics + page]
    assert f"docs/recipes/{name}.md" in path.read_text()
    assert f"docs/recipes/{name}.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_prints_the_plan_and_touches_nothing(name, data, tmp_path, capsys):
    recipe = load_recipe(ROOT / "recipes" / f"{name}_grpo.py")
    model = str(write_byte_model(tmp_path / "model", RECIPES[name].architecture, []))
    recipe.main(recipe_args(recipe, model=model, run_dir=tmp_path / "run", gpu_memory_gib=15, dry_run=True))
    printed = capsys.readouterr().out
    assert "limit 15.00" in printed
    defaults = recipe.Args()
    rollout = defaults.rollout
    tokens = defaults.prompts_per_step * rollout.group_size * (256 + rollout.max_completion_tokens)
    assert f"{tokens:,} tokens per step at most" in printed
    with pytest.raises(ValueError, match="raise --gpu-memory-gib"):
        recipe.main(recipe_args(recipe, model=model, run_dir=tmp_path / "run", gpu_memory_gib=0.5))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_the_samplers_flags_reach_the_engine(name, data, tmp_path):
    recipe = load_recipe(ROOT / "recipes" / f"{name}_grpo.py")
    model = str(write_byte_model(tmp_path / "model", RECIPES[name].architecture, []))
    handed = []

    class Seen(Exception):
        pass

    def make_engine(*arguments):
        handed.extend(arguments)
        raise Seen

    recipe.make_engine = make_engine
    flags = {"run_dir": tmp_path / "run", "engine": "torch", "kv_cache_dtype": "fp8", "fused_nf4": False}
    flags |= {"max_prompt_tokens": 900, "max_completion_tokens": 200, "gpu_memory_gib": 15}
    flags |= {"data": str(data / RECIPES[name].data)} if RECIPES[name].data else {"train_puzzles": 30}
    with pytest.raises(Seen):
        recipe.main(recipe_args(recipe, model=model, **flags))
    _, _, rollout, card, plan = handed
    assert (rollout.max_prompt_tokens, rollout.max_completion_tokens) == (900, 200)
    assert (card.engine, card.kv_cache_dtype, card.fused_nf4) == ("torch", "fp8", False)
    assert 0 < plan.engine_gib < 15  # the limit, less what the optimizer will take


def blocks(path: Path) -> dict[str, str]:
    """Title -> text of each block of a recipe: what stands behind "# --- title", without indentation, and what the
    title's own comment says. A block ends where the next begins, or where the function does."""
    found: dict[str, list[str]] = {}
    title = "imports"
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("# --- "):
            title = line.split("---")[1].split(":")[0].split(".")[0].strip()
        elif line.startswith("    if run.start_step"):
            title = "loop"
        elif line.startswith("    def evaluate"):
            title = "evaluate"
        elif line.startswith("if __name__"):
            title = "end"
        found.setdefault(title, []).append(line)
    return {name: textwrap.dedent("\n".join(lines)) for name, lines in found.items()}


def without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


ALL = sorted(path.stem.removesuffix("_grpo") for path in (ROOT / "recipes").glob("*.py"))
ITERATED = {"qwen25_7b", "smollm2"}
"""recipes that take several optimizer steps on a batch"""
SHARED = {  # block -> the recipes in which it is another one, for the idea that they are about
    "policy, engine, optimizer": set(),
    "evaluate": {"countdown_zero", "quickstart"},
    "loop": set(),
    "sample": {"countdown_zero"},
    "score": set(),
    "advantage": set(),
    "update": ITERATED,
    "what happened": {"countdown_zero"},
    "end": set(),
}


@pytest.mark.parametrize("title", SHARED)
def test_shared_blocks_are_identical(title):
    """Word for word. Only the comment that states the formula differs, where the formula does."""
    texts = {name: without_comments(blocks(ROOT / "recipes" / f"{name}_grpo.py")[title]) for name in ALL}
    same = set(ALL) - SHARED[title]
    assert len({texts[name] for name in same}) == 1
    assert len(texts["phi4"].splitlines()) > 1
    if title == "update":
        assert len({texts[name] for name in ITERATED}) == 1
        # Within the loop over micro-batches, only where pi_old comes from differs.
        plain, several = (
            [line.strip() for line in texts[name].splitlines() if "parts.append" not in line]
            for name in ("phi4", "qwen25_7b")
        )
        missing = [line for line in plain if line not in several]
        assert len(missing) == 2
        assert missing[0].startswith("for micro in batch.micros")
        assert missing[1].startswith("old_logps = logps.detach()")


def test_recipes_differ_by_what_they_are_about():
    """Five of the recipes for GPUs differ by prompt, data, defaults and rewards alone."""
    bodies = {}
    for name in ("llama31_8b", "phi4", "llama33_70b", "mistral_7b", "qwen25_1_5b"):
        text = (ROOT / "recipes" / f"{name}_grpo.py").read_text()
        bodies[name] = text.split('"""', 2)[2].splitlines()
    for one, other in itertools.combinations(bodies.values(), 2):
        changed = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
        assert len(changed) <= 60


def test_self_checks_are_looked_for_in_the_reasoning_alone():
    recipe = load_recipe(ROOT / "recipes" / "countdown_zero_grpo.py")
    texts = {
        "<think>3 * 4 = 12. Wait, that uses 4 twice.</think>": 1,
        "<think>50 is too high, so\ntry another.</think><answer>1</answer>": 1,
        "<think>Let me re-check: 3 + 4 = 7.</think>": 1,
        "<think>That doesn’t work.</think>": 1,
        "<think>It is 3 + 4.</think><answer>wait</answer>": 0,
        "<think>The waiter adds 3 and 4.</think>": 0,
        "<think>verified</think>": 0,
    }
    assert recipe.self_checks(list(texts)) == list(texts.values())


def test_one_box_is_paid_and_several_are_not():
    for name in ("phi4", "llama33_70b"):
        recipe = load_recipe(ROOT / "recipes" / f"{name}_grpo.py")
        assert recipe.one_box(["so \\boxed{3}", "\\boxed{3} or \\boxed{4}", "3"], [""] * 3) == [1, 0, 0]


def test_says_a_number():
    recipe = load_recipe(ROOT / "recipes" / "qwen25_1_5b_grpo.py")
    texts = ["<answer>-1,000</answer>", "<answer>\n2.5\n</answer>", "<answer>many</answer>", "7", ""]
    assert recipe.says_a_number(texts, [""] * 5) == [1, 1, 0, 0, 0]
