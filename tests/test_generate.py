"""The command `grpo`; and its program generate: base and trained model through one engine."""

import subprocess
import sys

import pytest
import torch

from grpo.errors import UserError
from grpo.policy.models import Policy, load_policy
from grpo_rollout.programs.__main__ import PROGRAMS
from grpo_rollout.programs.__main__ import main as grpo
from grpo_rollout.programs.generate import Args, main, switch_adapter_off, switch_adapter_on


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """An adapter that matters."""
    model = load_policy(Policy(model_folder(), lora_rank=4, lora_alpha=4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def shown(capsys, **arguments) -> str:
    main(Args(engine="torch", max_completion_tokens=8, load_in_4bit=False, **arguments))
    return capsys.readouterr().out


def test_before_and_after(model_folder, trained, capsys):
    both = shown(capsys, model=model_folder(), adapter=trained, prompt=["w9 w10", "w11"])
    base = shown(capsys, model=model_folder(), prompt=["w9 w10", "w11"])
    blocks = both.split("--- ")
    assert [b.split("\n")[0] for b in blocks[1:]] == ["base", "trained", "base", "trained"]
    answers = [b.split("\n")[1] for b in blocks[1:]]
    assert answers[0] != answers[1]
    assert [answers[0], answers[2]] == [b.split("\n")[1] for b in base.split("--- ")[1:]]  # the untouched base model
    assert shown(capsys, model=model_folder(), prompt=["w9 w10"], system="w8") != base  # the system message is read


def test_an_adapter_that_is_switched_off_is_the_base_model(model_folder, trained):
    model = load_policy(Policy(model_folder(), adapter=trained, load_in_4bit=False))
    ids = torch.tensor([[1, 9, 10]])
    with torch.no_grad():
        policy = model(ids).logits
        before = switch_adapter_off(model)
        with model.disable_adapter():
            base = model(ids).logits
        assert torch.equal(model(ids).logits, base)
        switch_adapter_on(model, before)
        assert torch.equal(model(ids).logits, policy)
        assert not torch.equal(policy, base)


def test_samples_of_each_question(model_folder, capsys):
    out = shown(capsys, model=model_folder(), prompt=["w9", "w10"], samples=3, temperature=1.0)
    assert [block.count("--- base") for block in out.split("=== ")[1:]] == [3, 3]


def test_nothing_to_ask_is_refused(model_folder):
    with pytest.raises(UserError, match="--prompt"):
        main(Args(model=model_folder()))


# ------------------------------------------------------------------------------------------------- the command `grpo`


def test_the_command_lists_its_programs(capsys):
    for argv in ([], ["--help"]):
        grpo(argv)
        out = capsys.readouterr().out
        assert all(f"grpo {name}" in out and sentence in out for name, sentence in PROGRAMS.items())
    with pytest.raises(UserError, match="grpo nonsense: there is no such program; choose one of evaluate, generate"):
        grpo(["nonsense"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_answers_before_anything_slow_is_imported(name):
    """`--help` shows the docstring's example, and a mistyped flag is refused."""
    code = f"""
import sys
from grpo_rollout.programs.__main__ import main
for flag in ("--help", "--hepl"):
    try:
        main([{name!r}, flag])
    except SystemExit as end:
        print(end.code, sorted({{"torch", "transformers", "peft", "bitsandbytes", "triton", "datasets", "matplotlib"}}
                               & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"grpo {name} " in result.stdout.split("options")[0]
    assert [line for line in result.stdout.splitlines() if line.endswith("[]")] == ["0 []", "2 []"], result.stderr


def test_a_program_runs_as_a_module_and_shows_an_error_as_one_line(tmp_path):
    words = ["-m", "grpo_rollout.programs.report", str(tmp_path)]
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path} holds no run")
    assert result.stderr.count("\n") == 1
