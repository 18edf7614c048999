"""The SmolLM2 recipe on a tiny random Llama: both tasks, several iterations, a continued adapter, two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_recipe, recipe_args

from grpo.runs.record import read_metrics

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "smollm2_grpo.py"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPE)


@pytest.fixture
def small(recipe, model_folder, tmp_path, monkeypatch):
    """The recipe's Args for a run of two steps, with a reward that random text gets too."""
    monkeypatch.setattr(recipe, "correctness", lambda texts, ground_truths, **_: [float("w2" in t) for t in texts])

    def args(name="run", **settings):
        defaults = {"steps": 2, "prompts_per_step": 2, "group_size": 4, "eval_questions": 4, "max_completion_tokens": 8}
        return recipe_args(recipe, **({"model": model_folder(), "run_dir": tmp_path / name} | defaults | settings))

    return args


def gsm8k(folder: Path) -> Path:
    """A data folder of our own few questions of GSM8K's form."""
    lines = (ROOT / "tests" / "data" / "gsm8k_form.jsonl").read_text().splitlines()
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(lines[:-3]))
    (folder / "test.jsonl").write_text("\n".join(lines[-3:]))
    return folder


def test_gsm8k_from_a_local_folder(recipe, small, tmp_path):
    data = str(gsm8k(tmp_path / "data"))
    recipe.main(small(data=data, max_prompt_tokens=200))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [("eval/pass_at_1" in line) for line in lines] == [True, False, True]
    assert all(line["mismatch_mean"] < 1e-4 for line in lines[1:])  # sampler and trainer agree
    with pytest.raises(
        ValueError, match=r"all 3 questions are longer than 3 prompt tokens .*; raise --max-prompt-tokens"
    ):
        recipe.main(small("other", data=data, max_prompt_tokens=3))
    with pytest.raises(ValueError, match=r"--data .*nothing: no such file or folder"):
        recipe.main(small("other", data=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match=r"--max-prompt-tokens 1020 and --max-completion-tokens 8 .* the 1024 tokens"):
        recipe.main(small("other", data=data, max_prompt_tokens=1020))
    assert not (tmp_path / "other").exists()


def test_the_limit_of_an_answer_goes_by_the_data(recipe, small, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(recipe, "make_plan", lambda policy, rollout, *_, **__: limits.append(rollout) or 1 / 0)
    for data, limit in (("arithmetic", None), ("gsm8k", None), ("gsm8k", 7)):
        with pytest.raises(ZeroDivisionError):
            recipe.main(small(data=data, max_completion_tokens=limit))
    assert [rollout.max_completion_tokens for rollout in limits] == [24, 256, 7]


def test_several_iterations_leave_the_old_policy_and_move_the_kl(recipe, small, tmp_path):
    settings = {"num_iterations": 3, "learning_rate": 3e-2, "warmup_steps": 0, "prompts_per_step": 4, "group_size": 8}
    recipe.main(small(loss="grpo", beta=0.1, **settings))
    recipe.main(small("once", loss="grpo", beta=0.1, **(settings | {"num_iterations": 1})))
    several, once = (read_metrics(tmp_path / name / "metrics.jsonl")[1:] for name in ("run", "once"))
    assert [line["ratio_max"] for line in once] == [1.0, 1.0]
    assert all(line["ratio_max"] > 1.01 and line["approx_kl"] > 0 for line in several)
    assert once[0]["kl"] == pytest.approx(0, abs=1e-6)  # the adapter starts as the base model, the reference
    assert once[1]["kl"] > 1e-4


def test_micro_batches_change_no_metric_under_an_entropy_quantile(recipe, small, tmp_path):
    """The threshold is the whole step's, so memory alone depends on --micro-batch-tokens, as its help says."""
    for name, tokens in (("one", 10**6), ("many", 1)):
        recipe.main(small(name, top_entropy_quantile=0.2, micro_batch_tokens=tokens, steps=1))
    one, many = (read_metrics(tmp_path / name / "metrics.jsonl")[1] for name in ("one", "many"))
    assert 0.18 < one["high_entropy"] < 0.22
    assert many["high_entropy"] == pytest.approx(one["high_entropy"])
    assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert one["grad_norm"] > 1e-3


def test_a_continued_adapter_is_its_own_reference(recipe, small, tmp_path):
    recipe.main(small(learning_rate=3e-2, warmup_steps=0))
    recipe.main(small("continued", adapter=tmp_path / "run" / "adapter", beta=0.1))
    recipe.main(small("fresh", beta=0.1))
    kl = [read_metrics(tmp_path / name / "metrics.jsonl")[1]["kl"] for name in ("continued", "fresh")]
    assert kl == pytest.approx([0, 0], abs=1e-6)
    config = json.loads((tmp_path / "continued" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 16


def test_a_resume_with_another_reference_is_refused(recipe, small, tmp_path):
    recipe.main(small(steps=1, learning_rate=3e-2, warmup_steps=0))
    adapter = tmp_path / "run" / "adapter"
    recipe.main(small("continued", steps=1, adapter=adapter))
    resume = {"run_dir": None, "resume": tmp_path / "continued"}
    before = (tmp_path / "continued" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"adapter has changed since the run began .* none now"):
        recipe.main(small(**resume))
    recipe.main(small(steps=2, learning_rate=3e-2, warmup_steps=0, run_dir=None, resume=tmp_path / "run"))
    with pytest.raises(ValueError, match="adapter has changed since the run began"):
        recipe.main(small(adapter=adapter, **resume))
    assert (tmp_path / "continued" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("drop", [True, False])
def test_a_step_without_variance_changes_nothing(recipe, small, tmp_path, monkeypatch, drop):
    """No group counts, so there is no micro-batch at all, or none that has a gradient: the run goes on."""
    monkeypatch.setattr(recipe, "correctness", lambda texts, ground_truths, **_: [1.0 for _ in texts])
    recipe.main(small(drop_zero_variance=drop, warmup_steps=0))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [line["zero_variance"] for line in lines] == [1.0, 1.0]
    assert [line["grad_norm"] for line in lines] == [0.0, 0.0]
    assert [line["skipped_steps"] for line in lines] == [0, 0]


def test_two_processes_write_one_run(model_folder, tmp_path):
    """Under torchrun, over gloo: rank 0 writes, and the counts are those of both."""
    words = f"--steps 2 --prompts-per-step 4 --group-size 4 --eval-questions 4 --max-completion-tokens 6 \
        --model {model_folder()} --run-dir {tmp_path / 'run'}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(RECIPE)]
    result = subprocess.run([*command, *words.split()], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    kept = (tmp_path / "run" / "completions" / "train-000001.jsonl").read_text().splitlines()
    assert len(kept) == 8  # rank 0's half of the 16
    assert all(16 <= line["tokens"] <= 96 for line in lines[1:])
    assert lines[1]["length"] == pytest.approx(lines[1]["tokens"] / 16)
