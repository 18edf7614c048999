"""The quickstart recipe: repeatable, resumable, exact under accumulation, it learns, and it refuses bad input."""

import json
import sys
from pathlib import Path

import pytest
from conftest import load_recipe
from transformers import AutoTokenizer

from grpo.errors import UserError
from grpo.runs.cli import parse_args
from grpo.runs.record import strip_times
from grpo.tasks.tiny import Tiny, tiny_model

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart_grpo.py"
SMALL = "--prompts-per-step 2 --group-size 4 --max-completion-tokens 8 --eval-questions 5 --eval-every 1 --save-every 1"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model, hardly trained."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    made = tiny_model(Tiny(steps=20, batch_size=8))
    patch.undo()
    return made


@pytest.fixture
def quickstart(recipe, folder, monkeypatch):
    """Run the recipe with some arguments; returns the lines of its metrics.jsonl without times."""

    def run(directory: Path, *words: object, model: object = folder) -> list[dict]:
        where = [] if "--resume" in words else ["--run-dir", directory, "--model", model]
        argv = [str(w) for w in [*where, *words]]
        monkeypatch.setattr(sys, "argv", ["quickstart_grpo.py", *argv])
        recipe.main(parse_args(recipe.Args))
        return [strip_times(json.loads(line)) for line in (directory / "metrics.jsonl").read_text().splitlines()]

    return run


def adapter(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def some_digits(recipe, monkeypatch):
    """A reward that a model which cannot add gets, too: the fraction of digits among its characters."""
    monkeypatch.setattr(
        recipe, "correctness", lambda texts, ground_truths: [sum(map(str.isdigit, t)) / max(len(t), 1) for t in texts]
    )


@pytest.mark.usefixtures("some_digits")
def test_a_step_that_counts_nothing_moves_nothing(recipe, quickstart, tmp_path, monkeypatch):
    """AdamW's momentum would go on without data."""
    real, calls = recipe.sample_mask, []

    def mask(*arguments):
        calls.append(1)
        return real(*arguments) & (len(calls) <= 2)

    monkeypatch.setattr(recipe, "sample_mask", mask)
    quickstart(tmp_path / "two", *SMALL.split(), "--steps", 2)
    calls.clear()
    quickstart(tmp_path / "three", *SMALL.split(), "--steps", 3)
    assert len(calls) == 3
    assert adapter(tmp_path / "two") == adapter(tmp_path / "three")
    quickstart(tmp_path / "one", *SMALL.split(), "--steps", 1)
    assert adapter(tmp_path / "one") != adapter(tmp_path / "two")


@pytest.mark.usefixtures("some_digits")
def test_one_seed_one_run(quickstart, tmp_path):
    arguments = [*SMALL.split(), "--steps", 3]
    first = quickstart(tmp_path / "a", *arguments)
    assert [line["step"] for line in first] == [0, 1, 2, 3]
    assert any(line["grad_norm"] > 0 for line in first[1:])
    assert quickstart(tmp_path / "b", *arguments) == first
    assert adapter(tmp_path / "a") == adapter(tmp_path / "b")
    assert quickstart(tmp_path / "c", *arguments, "--seed", 1)[1:] != first[1:]
    for name in ("rewards.png", "report.html", "run.json", "adapter/adapter_config.json"):
        assert (tmp_path / "a" / name).stat().st_size > 0

    assert [line["reward/correct"] for line in first[1:]] == [line["pass_at_1"] for line in first[1:]]

    # Stopped after one step and resumed, it ends where the unbroken run does.
    quickstart(tmp_path / "d", *SMALL.split(), "--steps", 1)
    assert quickstart(tmp_path / "d", "--resume", tmp_path / "d", "--steps", 3) == first
    assert adapter(tmp_path / "d") == adapter(tmp_path / "a")


@pytest.mark.usefixtures("some_digits")
def test_micro_batches_add_up(quickstart, tmp_path):
    whole = quickstart(tmp_path / "a", *SMALL.split(), "--steps", 2)
    parts = quickstart(tmp_path / "b", *SMALL.split(), "--steps", 2, "--micro-batch-tokens", 1)
    for one, other in zip(whole, parts):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("some_digits")
def test_it_learns_what_is_rewarded(quickstart, tmp_path):
    arguments = "--steps 20 --group-size 8 --max-completion-tokens 8 --eval-questions 50 --learning-rate 1e-2"
    lines = quickstart(tmp_path / "a", "--prompts-per-step", 4, *arguments.split())
    assert lines[-1]["eval/pass_at_1"] > 3 * lines[0]["eval/pass_at_1"]  # 0.09 to 0.38; the best of eight tokens is 0.4
    assert lines[-1]["kl"] > 0.1 > lines[1]["kl"]


BAD = {
    "--steps 0": "--steps",
    "--group-size 1": "--group-size",
    "--max-prompt-tokens 5": "--max-prompt-tokens",
    "--lora-targets nothing": "--lora-targets",
    "--model ./nowhere": "--model",
    "--beta 0 --kl k1": "--kl",
    "--epsilon 0.1": "--epsilon",
    "--temperature 0": "--temperature",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(quickstart, tmp_path, words):
    with pytest.raises(UserError) as error:
        quickstart(tmp_path / "a", *words.split())
    assert BAD[words] in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_a_run_is_never_overwritten(quickstart, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    with pytest.raises(UserError, match="--run-dir"):
        quickstart(tmp_path / "a")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_model_without_chat_template(quickstart, folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="chat template"):
        quickstart(tmp_path / "a", model=tmp_path / "model")
    assert not (tmp_path / "a").exists()


def test_reward_of_the_wrong_count(quickstart, recipe, tmp_path, monkeypatch):
    """As many as held-out questions, not as many as samples."""
    monkeypatch.setattr(recipe, "correctness", lambda texts, ground_truths: [1.0] * 5)
    with pytest.raises(ValueError, match="returned 5 values for 8 completions"):
        quickstart(tmp_path / "a", *SMALL.split(), "--steps", 1)


@pytest.mark.usefixtures("some_digits")
def test_a_loss_of_ones_own_is_one_line(quickstart, tmp_path):
    """A fork of the recipe with its own function in the place of `surrogate`, here REINFORCE, trains as that loss does
    by its flag; and with a loss that pushes the other way the adapter ends elsewhere."""
    line = "losses = surrogate(logps, log_w, c, micro, objective)"
    source = RECIPE.read_text()
    assert source.count(line) == 1
    words = [*SMALL.split(), "--steps", 2, "--importance", "none"]
    quickstart(tmp_path / "flag", *words, "--loss", "reinforce", "--average", "token_mean")
    for name, sign in (("own", "-"), ("away", "")):
        own = "losses = my_loss(logps, micro.advantages[:, None], micro.mask)"
        function = f"def my_loss(logps, advantages, mask):\n    return {sign}advantages * logps * mask\n\n\ndef main("
        fork = tmp_path / f"fork_{name}.py"
        fork.write_text(source.replace(line, own).replace("def main(", function))
        module = load_recipe(fork)
        module.correctness = lambda texts, ground_truths: [sum(map(str.isdigit, t)) / max(len(t), 1) for t in texts]
        model = json.loads((tmp_path / "flag" / "run.json").read_text())["args"]["model"]
        argv = ["--run-dir", str(tmp_path / name), "--model", model, *map(str, words)]
        module.main(parse_args(module.Args, argv))
    assert adapter(tmp_path / "own") == adapter(tmp_path / "flag")
    assert adapter(tmp_path / "away") != adapter(tmp_path / "flag")
