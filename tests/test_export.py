"""Export: the merged weights, the comparisons, the folder that is taken home; and the report that is drawn again."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from run_driver import RECIPE, arguments, begin, make_samples
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.errors import UserError
from grpo.policy.models import Policy, load_policy
from grpo.runs.checkpoint import list_checkpoints, save_adapter
from grpo.runs.record import open_record
from grpo.runs.run import Run
from grpo_rollout.programs import export as module
from grpo_rollout.programs import report
from grpo_rollout.programs.compare import Behaviour, Difference, difference, weight_changes
from grpo_rollout.programs.export import export, find_adapter, sample_prompts

PROMPTS = ["<s> user w9 w10 <end> assistant", "<s> user w20 <end> assistant"]


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """A finished run of the tiny Llama with an adapter that matters, and checkpoints of steps 1 (the best), 2 and 3."""
    args = arguments(run_dir=tmp_path_factory.mktemp("runs") / "run", steps=3, save_every=1)
    model = load_policy(Policy(model_folder("llama"), lora_rank=4, lora_alpha=8, lora_targets="q_proj,down_proj"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    run = Run(open_record(args, recipe=RECIPE), model, optimizer)
    for step in run.steps(3):
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1 * step)
        run.log(step, {"reward": step / 10, "eval/pass_at_1": 0.9 if step == 1 else 0.5})
        run.save_completions(step, make_samples(PROMPTS, ["a", "b"]), {"correct": [0, 1]}, split="eval")
        run.save_completions(step, make_samples(["w1"], ["a"]), {"correct": [0]})
    return run.directory


def merged(run, out, **settings):
    given = {"run": run, "out": out, "dtype": "float32", "device": "cpu", "max_tokens": 12}
    return export(module.Args(**{**given, **settings}))


def test_merged_into_the_bases_own_weights(run, model_folder, tmp_path, capsys):
    found = merged(run, tmp_path / "out")
    out = capsys.readouterr().out
    assert found["merged"].equal == found["merged"].prompts == 2
    assert found["merged"].largest < 1e-4
    assert found["trained"].mean > 1e-3  # NF4 is another base
    assert "adapter against merged: 2 of 2 greedy completions equal; log-probabilities differ by" in out
    assert "policy as trained, on NF4 weights, against merged" in out

    base = load_file(f"{model_folder('llama')}/model.safetensors")
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    result = load_file(tmp_path / "out/model.safetensors")
    assert result.keys() == base.keys()
    for name, weight in base.items():
        a = adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_A.weight")
        expected = weight.double()
        if a is not None:
            b = adapter[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"]
            expected = expected + 8 / 4 * b.double() @ a.double()
        assert torch.allclose(result[name].double(), expected, atol=1e-6), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # without peft
    assert not isinstance(model, PeftModel)
    assert model.generation_config.eos_token_id == [2, 3]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_merged_into_dequantized_weights_is_the_policy_as_trained(run, tmp_path):
    found = merged(run, tmp_path / "out", weights="dequantized")
    for comparison in found.values():
        assert comparison.equal == comparison.prompts
        assert comparison.largest < 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert "dequantized NF4 weights, float32" in (tmp_path / "out/README.md").read_text()


def test_sixteen_bits_by_default(run, tmp_path):
    found = merged(run, tmp_path / "out", dtype="auto", prompts=1)
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert found["merged"].margin < 0.25
    assert found["merged"].prompts == 1


def test_the_card_names_command_results_and_what_merging_changed(run, tmp_path):
    merged(run, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    record = json.loads((run / "run.json").read_text())
    assert f"```\n{record['command']}\n```" in card
    assert "The weights are those after step 3." in card
    assert "| reward | 0.3 |" in card
    assert "| eval/pass_at_1 | 0.5 |" in card
    assert "adapter against merged: 2 of 2" in card
    assert f"torch {torch.__version__}" in card
    assert str(run) not in card.replace(record["command"], "")  # a path of this machine says nothing elsewhere
    assert "![curves](rewards.png)" in card
    assert (tmp_path / "out/rewards.png").read_bytes() == (run / "rewards.png").read_bytes()
    data = ModelCard.load(tmp_path / "out/README.md").data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["grpo", "lora"])
    assert data.base_model is None  # a folder of this machine
    assert module.model_card("owner/base", {}, {}, "", []).data.base_model == "owner/base"


@pytest.mark.parametrize(("checkpoint", "step", "score"), [("2", 2, 0.5), ("best", 1, 0.9)])
def test_the_card_of_a_checkpoint_gives_the_metrics_of_its_step(run, tmp_path, checkpoint, step, score):
    merged(run, tmp_path / "out", checkpoint=checkpoint, prompts=1, max_tokens=1)
    card = (tmp_path / "out/README.md").read_text()
    assert f"The weights are those after step {step}." in card
    assert f"| reward | {step / 10} |" in card
    assert f"| eval/pass_at_1 | {score} |" in card


def test_a_metric_that_ends_as_null_has_its_last_number_on_the_card(run, tmp_path):
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    with open(changed / "metrics.jsonl", "a") as file:
        file.write('{"schema": 1, "step": 4, "reward": null, "kl": null, "times": {}}\n')
    merged(changed, tmp_path / "out", prompts=1, max_tokens=1)
    card = (tmp_path / "out/README.md").read_text()
    assert "| reward | 0.3 |" in card
    assert "| kl |" not in card


def test_a_bare_adapter_s_card_gives_no_metrics(run, tmp_path):
    merged(run / "adapter", tmp_path / "out", prompts=1, max_tokens=1)
    card = (tmp_path / "out/README.md").read_text()
    assert "metric" not in card
    assert "adapter against merged" in card


def test_weight_changes_against_float64(run, model_folder):
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model = module.with_adapter(base, run / "adapter")
    weights, deltas = [], []
    for name, weight in load_file(f"{model_folder('llama')}/model.safetensors").items():
        if "q_proj" in name or "down_proj" in name:
            state = load_file(run / "adapter/adapter_model.safetensors")
            stem = f"base_model.model.{name.removesuffix('weight')}"
            weights.append(weight.double().flatten())
            deltas.append(
                (2 * state[f"{stem}lora_B.weight"].double() @ state[f"{stem}lora_A.weight"].double()).flatten()
            )
    expected = torch.cat(deltas).norm() / torch.cat(weights).norm()
    by_adapter, by_nf4 = weight_changes(model)
    assert by_adapter == pytest.approx(float(expected), rel=1e-4)
    assert 0.05 < by_nf4 < 0.15  # NF4's error on normal weights is near 9%


def test_differences_by_hand():
    log = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]]).log()
    first = Behaviour([[0, 1], [0, 1], [0, 1]], [log, log, log])
    moved = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.6, 0.3]]).log()
    second = Behaviour([[0, 1], [0, 2], [1, 1]], [log, log, moved])
    ln2 = torch.tensor(2.0).log().item()
    found = difference(first, second)
    assert (found.equal, found.prompts) == (1, 3)
    assert found.mean == pytest.approx(ln2 / 6)  # one token of six
    assert found.largest == pytest.approx(ln2)
    assert found.margin == pytest.approx(ln2)  # 0.6 against 0.3, and 0.5 against 0.25
    # One that ends earlier parts nowhere that both have a token.
    assert difference(first, Behaviour([[0], [0, 1], [0, 1]], first.logps)) == Difference(2, 3, 0.0, 0.0, 0.0)


def test_which_adapter(run, tmp_path):
    assert find_adapter(run, "final") == run / "adapter"
    assert find_adapter(run, "best") == run / "checkpoints/step-000001/adapter"
    assert find_adapter(run, "2") == run / "checkpoints/step-000002/adapter"
    assert find_adapter(run / "adapter", "final") == run / "adapter"
    with pytest.raises(UserError, match=r"--checkpoint 7: final, best or a step; there are: 1, 2, 3"):
        find_adapter(run, "7")
    with pytest.raises(UserError, match="--checkpoint last: final, best or a step"):
        find_adapter(run, "last")
    with pytest.raises(UserError, match="is an adapter, not a run"):
        find_adapter(run / "adapter", "best")
    with pytest.raises(UserError, match="holds no run"):
        find_adapter(tmp_path, "final")


def test_an_unfinished_run_and_a_torn_checkpoint_are_refused(tmp_path):
    run = begin(arguments(run_dir=tmp_path / "run", save_every=1))
    for step in run.steps(2):
        if step == 2:
            break
    with pytest.raises(UserError, match="the run has not finished; give --checkpoint best or a step"):
        find_adapter(run.directory, "final")
    (run.directory / "adapter").mkdir()
    (run.directory / "adapter" / "adapter_config.json").write_text("{}")  # of an earlier end, before a resume
    with pytest.raises(UserError, match=r"--checkpoint final: .* has not finished; .* go on with --resume"):
        find_adapter(run.directory, "final")
    with pytest.raises(UserError, match=r"no checkpoint in .* was evaluated"):
        find_adapter(run.directory, "best")
    [checkpoint] = list_checkpoints(run.directory / "checkpoints")
    [state] = [path for path in checkpoint.iterdir() if path.is_file() and path.suffix in (".pt", ".safetensors")]
    state.write_bytes(b"")
    with pytest.raises(UserError, match=rf"step-000001 is torn or corrupt: {state.name}"):
        find_adapter(run.directory, "1")


def test_nothing_is_overwritten_and_the_base_must_be_known(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"--out .*out exists, and is never overwritten"):
        merged(run, tmp_path / "out")
    folder = tmp_path / "adapter"
    save_adapter(torch.nn.Linear(2, 2), folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(UserError, match="names no base model; name it"):
        merged(folder, tmp_path / "new")
    with pytest.raises(UserError, match="no such folder"):
        merged(run, tmp_path / "new", base="./nowhere")


def test_sample_prompts_are_the_held_out_ones_each_once(run, tmp_path):
    assert sample_prompts(run, 8) == PROMPTS
    assert sample_prompts(run, 1) == PROMPTS[:1]
    assert len(sample_prompts(tmp_path, 2)) == 2


def test_a_merged_model_that_is_another_one_ends_in_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "export", lambda args: {"merged": Difference(1, 2, 0.1, 0.2, margin=0.3)})
    with pytest.raises(SystemExit, match=r"another one: completions part by 0\.30 nats"):
        module.main(module.Args(run))


def test_a_report_is_drawn_again_from_what_the_run_has_logged(run, tmp_path, capsys):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for name in ("report.html", "rewards.png"):
        (again / name).unlink()
    report.main(report.Args(again))
    assert (again / "report.html").read_text() == (run / "report.html").read_text()
    assert (again / "rewards.png").stat().st_size > 0
    assert capsys.readouterr().out == f"drawn: {again}/report.html, {again}/rewards.png\n"
    with pytest.raises(UserError, match="holds no run"):
        report.main(report.Args(tmp_path))
