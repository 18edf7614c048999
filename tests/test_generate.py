"""The generate command: base and trained model through one engine."""

import pytest
import torch

from grpo.policy.models import load_policy
from grpo_rollout.make import make_engine
from grpo_rollout.programs.generate import Args, main, without_adapter


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """An adapter that matters."""
    model = load_policy(model_folder(), lora_rank=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return str(folder)


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


def test_without_adapter_is_the_base_model_and_can_be_undone(model_folder, trained):
    model = load_policy(model_folder(), lora_rank=1, adapter=trained, load_in_4bit=False)
    ids = torch.tensor([[1, 9, 10]])
    with torch.no_grad():
        policy = model(ids).logits
        kept = without_adapter(model)
        with model.disable_adapter():
            base = model(ids).logits
        assert torch.equal(model(ids).logits, base)
        for name, value in kept.items():
            model.get_parameter(name).copy_(value)
        assert torch.equal(model(ids).logits, policy)
        assert not torch.equal(policy, base)


def test_samples_of_each_question(model_folder, capsys):
    out = shown(capsys, model=model_folder(), prompt=["w9"], samples=3, temperature=1.0)
    assert out.count("--- base") == 3


def test_nothing_to_ask_is_refused(model_folder):
    with pytest.raises(ValueError, match="--prompt"):
        main(Args(model=model_folder()))


def test_engine_names(model_folder):
    model = load_policy(model_folder(), lora_rank=1, load_in_4bit=False)
    with pytest.raises(ValueError, match="--engine nonsense"):
        make_engine("nonsense", model, eos_ids=[2], pad_id=0)
    with pytest.raises(ValueError, match="--engine vllm"):
        make_engine("vllm", model, eos_ids=[2], pad_id=0)  # not installed, or no lengths
    lengths = {"max_prompt_tokens": 8, "max_completion_tokens": 8}
    settings = {"sequences": 4, "gpu_memory_gib": 15.0, "kv_cache_dtype": "fp8"}  # VLLMEngine's
    for kind in ("auto", "torch"):
        engine = make_engine(kind, model, eos_ids=[2], pad_id=0, **lengths, **settings)
        assert type(engine).__name__ == "TorchEngine"  # on the CPU
    with pytest.raises(TypeError, match=r"no setting sequence$"):  # found here, not on the GPU
        make_engine("torch", model, eos_ids=[2], pad_id=0, **lengths, sequence=4)
