"""The rules of the house that a machine can check."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from grpo.losses import LOSSES

ROOT = Path(__file__).parent.parent
SOURCES = {  # importable name -> file
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
    for base, package in ((ROOT, "grpo"), (ROOT / "kernels", "grpo_kernels"), (ROOT / "rollout", "grpo_rollout"))
    for path in sorted((base / package).rglob("*.py"))
}
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FLOORS = ["grpo_kernels", "grpo", "grpo.policy", "grpo.tasks", "grpo.runs", "grpo_rollout"]
ARROWS = {  # who may import whom, beside itself
    "grpo_kernels": set(),
    "grpo": {"grpo_kernels"},
    "grpo.policy": {"grpo", "grpo_kernels"},
    "grpo.tasks": {"grpo", "grpo.policy"},
    "grpo.runs": {"grpo"},
    "grpo_rollout": {*FLOORS},
}


def nodes(path: Path, inside_functions: bool):
    """The syntax nodes of a file, `if TYPE_CHECKING:` left out."""
    todo: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
            continue
        yield node
        todo.extend(ast.iter_child_nodes(node))


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """The modules that a file imports: what `from module import name` takes the name from, or name itself."""
    found: set[str] = set()
    for node in nodes(path, inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else str(node.module) for name in modules}
    return found


def floor(module: str) -> str | None:
    """The floor or wing that a module of ours belongs to."""
    return max((name for name in FLOORS if module == name or module.startswith(name + ".")), key=len, default=None)


def test_no_init_in_the_outer_folders():
    """Hugging Face's package `kernels` has our folder's name: with an __init__.py ours would shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "rollout" / "__init__.py").exists()


def test_transformers_works_from_the_repository_root():
    """What an __init__.py in kernels/ would break: AutoModel, as soon as the root is on sys.path."""
    code = "from transformers import AutoModel, LlamaConfig; import grpo_kernels; AutoModel.from_config(LlamaConfig(\
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)); print('fine')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "fine\n", result.stderr


@pytest.mark.parametrize("name", FLOORS)
def test_arrows_run_one_way(name):
    for module, path in SOURCES.items():
        if floor(module) == name:
            reached = {floor(found) for found in imports(path)} - {None, name}
            assert reached <= ARROWS[name], f"{module} imports {reached - ARROWS[name]}"
            assert "jax" not in {found.split(".")[0] for found in imports(path)}


def test_recipes_import_no_other_recipe():
    names = {path.stem for path in RECIPES} | {"recipes"}
    for path in RECIPES:
        assert not {found.split(".")[0] for found in imports(path)} & names


def test_imports_have_no_circle():
    """Counting what functions import when they are called, too."""
    graph = {module: imports(path) & SOURCES.keys() - {module} for module, path in SOURCES.items()}
    state: dict[str, str] = defaultdict(str)

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state[module] != "open", " -> ".join([*way, module])
        if state[module] == "done":
            return
        state[module] = "open"
        for found in graph[module]:
            visit(found, (*way, module))
        state[module] = "done"

    for module in graph:
        visit(module, ())


def test_grpo_does_not_name_the_floor_above_and_kernels_know_no_loss():
    for path in (ROOT / "grpo").rglob("*.py"):
        assert "grpo_rollout" not in path.read_text(), path
    words = {*LOSSES, "advantage", "advantages", "surrogate"} - {"grpo"}
    for path in (ROOT / "kernels").rglob("*.py"):
        names = {node.id for node in nodes(path, True) if isinstance(node, ast.Name)}
        names |= {node.name for node in nodes(path, True) if isinstance(node, ast.FunctionDef)}
        assert not names & words, path


def test_the_algorithm_is_importable_without_transformers():
    code = """
import sys
from grpo import Objective, completion_logps, group_advantages, policy_loss
import grpo
assert set(grpo.__all__) <= set(dir(grpo))
assert all(getattr(grpo, name) is not None for name in grpo.__all__)
assert group_advantages([1.0, 0.0], 2).tolist()[0] > 0
print(sorted({"transformers", "peft", "bitsandbytes"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("words", ["--help", "--lerning-rate 1"])
def test_flags_are_answered_before_anything_slow_is_imported(words):
    """Importing torch alone takes longer than a user should wait for --help."""
    code = f"""
import runpy, sys
sys.argv = [{str(RECIPES[0])!r}, *{words.split()!r}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code, sorted({{"torch", "transformers", "peft", "bitsandbytes", "triton", "vllm"}} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == ("0 []" if words == "--help" else "2 []"), result.stderr
