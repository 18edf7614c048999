"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_no_init_in_the_outer_folders():
    """Hugging Face's package `kernels` has our folder's name: with an __init__.py ours would shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "rollout" / "__init__.py").exists()


def test_transformers_works_from_the_repository_root():
    """What an __init__.py in kernels/ breaks: AutoModel, as soon as the root is on sys.path."""
    code = "from transformers import AutoModel, LlamaConfig; import grpo_kernels; AutoModel.from_config(LlamaConfig(\
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)); print('fine')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "fine\n", result.stderr


def imports(path: Path) -> set[str]:
    """Top-level packages a file imports when it is imported (what a function imports when called is not)."""
    names: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            names.update(a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or ".").split(".")[0])
        todo.extend(ast.iter_child_nodes(node))
    return names


OURS = {"grpo", "grpo_kernels", "grpo_rollout", "recipes"}


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("kernels/grpo_kernels", {"grpo_kernels"}),
        ("grpo", {"grpo", "grpo_kernels"}),
        ("rollout/grpo_rollout", {"grpo_rollout", "grpo_kernels", "grpo"}),
        ("recipes", {"grpo", "grpo_kernels", "grpo_rollout"}),
    ],
)
def test_who_imports_whom(folder, allowed):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        found = imports(path)
        assert found & OURS <= allowed, f"{path} imports {found & OURS - allowed}"
        assert "jax" not in found
