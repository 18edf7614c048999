"""Checkpoints: the same bits back, whole or absent, refused by name when damaged."""

import errno
import io
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo.errors import UserError
from grpo.runs.checkpoint import (
    best_checkpoint,
    list_checkpoints,
    load_adapter,
    newest_checkpoint,
    prune_checkpoints,
    restore_checkpoint,
    rng_state,
    save_adapter,
    save_checkpoint,
    serialize,
    set_rng_state,
    verify_checkpoint,
)

CPU = torch.device("cpu")


def parts(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return model, optimizer, scheduler


def update(model, optimizer, scheduler, steps: int) -> list[float]:
    """Optimizer steps on noise; what was drawn from the three generators."""
    drawn = []
    for _ in range(steps):
        x = torch.randn(4, 3)
        drawn += [x.sum().item(), random.random(), float(np.random.rand())]
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return drawn


def save(folder, step=1, seed=0, score=None, **changed):
    model, optimizer, scheduler = parts(seed)
    update(model, optimizer, scheduler, 2)
    given = {"rng": [rng_state(CPU)], "state": {"metrics_bytes": 7}, "score": score, **changed}
    return save_checkpoint(folder, step, model, optimizer, scheduler, **given)


# ---------------------------------------------------------------------------------------------------- whole states


def test_training_goes_on_to_the_bit(tmp_path):
    random.seed(1)
    np.random.seed(2)
    model, optimizer, scheduler = parts()
    update(model, optimizer, scheduler, 3)
    path = save_checkpoint(tmp_path, 3, model, optimizer, scheduler, rng=[rng_state(CPU)], state={"a": 1}, score=0.5)
    drawn = update(model, optimizer, scheduler, 3)

    other, other_optimizer, other_scheduler = parts(seed=9)
    held = [id(p) for p in other.parameters()]
    restore_checkpoint(path, other, other_optimizer, other_scheduler, rank=0, device=CPU)
    assert update(other, other_optimizer, other_scheduler, 3) == drawn
    assert [id(p) for p in other.parameters()] == held  # in place
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], other_optimizer.state[q]["exp_avg_sq"])
        assert torch.equal(optimizer.state[p]["step"], other_optimizer.state[q]["step"])
    assert other_scheduler.get_last_lr() == scheduler.get_last_lr()
    assert other_optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    checkpoint = verify_checkpoint(path)
    assert (checkpoint.step, checkpoint.score, checkpoint.state) == (3, 0.5, {"a": 1})


def test_each_rank_has_its_own_generators_and_a_new_rank_keeps_what_it_has(tmp_path):
    model, optimizer, _ = parts()
    states, expected = [], []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(rng_state(CPU))
        expected.append(torch.rand(1))
    path = save_checkpoint(tmp_path, 1, model, optimizer, None, rng=states, state={})
    for rank in (1, 0):
        restore_checkpoint(path, model, optimizer, None, rank=rank, device=CPU)
        assert torch.equal(torch.rand(1), expected[rank])
    torch.manual_seed(7)
    restore_checkpoint(path, model, optimizer, None, rank=2, device=CPU)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), drawn)


def test_generators_restore_a_pending_gaussian():
    np.random.seed(0)
    np.random.randn()  # NumPy draws two and keeps one
    random.gauss(0, 1)
    state = io.BytesIO(serialize(rng_state(CPU)))
    expected = (np.random.randn(), random.gauss(0, 1))
    set_rng_state(torch.load(state, weights_only=True), CPU)
    assert (np.random.randn(), random.gauss(0, 1)) == expected


class Scheduler:
    """Its state holds an object that only unpickling could make."""

    def state_dict(self):
        return {"rate": np.float64(0.5)}


def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(tmp_path):
    model, optimizer, _ = parts()
    with pytest.raises(TypeError, match="refuses this state; store numbers, text and tensors"):
        save_checkpoint(tmp_path, 1, model, optimizer, Scheduler(), rng=[], state={})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr("grpo.runs.checkpoint.SCHEMA", 3)
    with pytest.raises(UserError, match="its schema is 2, and this version reads 3"):
        newest_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def policy(model_folder):
    def build(seed: int, rank: int = 4):
        base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
        torch.manual_seed(seed)
        targets = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        return model.eval()

    return build


def test_an_adapter_loads_in_peft_and_transformers(policy, model_folder, tmp_path):
    model = policy(1)
    save_adapter(model, tmp_path / "adapter")
    ids = torch.arange(8, 20)[None]
    expected = model(ids).logits
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    assert not torch.allclose(base(ids).logits, expected, atol=1e-2)
    in_peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(in_peft(ids).logits, expected)
    in_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()  # finds the base by itself
    assert torch.equal(in_transformers(ids).logits, expected)
    # peft's own writer gives the same tensors under the same names.
    model.save_pretrained(tmp_path / "peft")
    ours, peft = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "peft"))
    assert ours.keys() == peft.keys()
    assert all(torch.equal(ours[name], peft[name]) for name in ours)
    assert model.peft_config["default"].inference_mode is False  # the live model is untouched


def test_two_saves_give_the_same_bytes(policy, tmp_path):
    for name in "ab":
        save_adapter(policy(1), tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_frozen_reference_adapter_is_neither_written_nor_overwritten(policy, tmp_path):
    save_adapter(policy(1), tmp_path / "first")
    model = policy(2)
    model.load_adapter(str(tmp_path / "first"), adapter_name="reference", is_trainable=False)
    model.set_adapter("default")
    save_adapter(model, tmp_path / "both")
    save_adapter(policy(2), tmp_path / "alone")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "both" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
    load_adapter(model, tmp_path / "first")
    state = model.state_dict()
    for name in state:
        if ".default." in name:
            assert torch.equal(state[name], state[name.replace(".default.", ".reference.")])


def test_another_rank_or_other_targets_are_refused_by_name(policy, tmp_path):
    save_adapter(policy(1), tmp_path)
    with pytest.raises(
        UserError, match=r"lora_A\.weight is \[4, 64\], the model's is \[2, 64\]; take the model, LoRA rank"
    ):
        load_adapter(policy(1, rank=2), tmp_path)
    with pytest.raises(UserError, match=r"lora_A\.weight: the model has no such trainable parameter"):
        load_adapter(torch.nn.Linear(2, 2), tmp_path)
    os.remove(tmp_path / "adapter_model.safetensors")
    save_adapter(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(UserError, match=r"the file lacks it|no such trainable"):
        load_adapter(policy(1), tmp_path)


# ------------------------------------------------------------------------------------------- torn, corrupt, no room

FILES = ["manifest.json", "training.pt", "adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["torn", "flipped", "missing", "empty"])
def test_damage_is_refused_by_name_and_the_one_before_is_used(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    data = (path / file).read_bytes()
    middle = len(data) // 2
    if damage == "missing":
        (path / file).unlink()
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        (path / file).write_bytes({"torn": data[:-1], "flipped": flipped, "empty": b""}[damage])
    checkpoint, refused = newest_checkpoint(tmp_path)
    assert checkpoint.step == 1
    assert len(refused) == 1
    assert refused[0].startswith(f"checkpoint {path} is torn or corrupt: {file}: ")
    assert [p.name for p in tmp_path.iterdir() if p != checkpoint.path] == ["corrupt-step-000002"]
    assert newest_checkpoint(tmp_path) == (checkpoint, [])


def test_when_every_checkpoint_is_refused_the_error_names_each(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    for step in (1, 2):
        (save(tmp_path, step) / "training.pt").unlink()
    with pytest.raises(UserError, match=r"(?s)no checkpoint of the run is whole.*step-000002.*step-000001"):
        newest_checkpoint(tmp_path)
    assert len(list_checkpoints(tmp_path)) == 2  # nothing was moved


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_wherever_writing_ends_the_checkpoint_is_whole_or_absent(tmp_path, monkeypatch, call):
    """An error at the n-th system call, for every n there is."""
    first = save(tmp_path, 1)
    genuine = getattr(os, call)
    budget = 0

    def failing(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, "Input/output error")
        return genuine(*args, **kwargs)

    while True:
        left = budget
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                save(tmp_path, 2)
            except OSError:
                pass
            else:
                break
        assert not list(tmp_path.glob(".tmp-*"))
        checkpoint, refused = newest_checkpoint(tmp_path)
        assert not refused
        assert checkpoint.step in (1, 2)
        verify_checkpoint(first)
        budget += 1
    assert budget >= {"fsync": 5, "rename": 1, "replace": 1, "mkdir": 2}[call]
    assert newest_checkpoint(tmp_path)[0].step == 2


def test_a_full_disk_is_an_oserror_and_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        save(tmp_path, 2)
    assert error.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB, where the test may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    try:
        if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root and the right to mount")
    except FileNotFoundError:
        pytest.skip("no mount command")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    steps = 0

    def fill():
        nonlocal steps
        while True:
            save(small_disk, steps + 1)
            steps += 1

    with pytest.raises(OSError, match="No space left on device") as error:
        fill()
    assert steps >= 2
    assert error.value.errno == errno.ENOSPC
    assert newest_checkpoint(small_disk)[0].step == steps
    assert len(list(small_disk.iterdir())) == steps


# --------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([None] * 5, [4, 5], None),
        ([0.9, 0.1, 0.2, 0.3, 0.4], [1, 4, 5], 1),
        ([0.1, 0.2, 0.2, 0.1, 0.1], [3, 4, 5], 3),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [4, 5], 5),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, scores, kept, best):
    for step, score in enumerate(scores, 1):
        save(tmp_path, step, score=score)
        prune_checkpoints(tmp_path, 2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"step-{step:06d}" for step in kept]
    assert best_checkpoint(tmp_path) == (None if best is None else tmp_path / f"step-{best:06d}")


@pytest.mark.parametrize("scheduled", [True, False])
def test_a_resume_with_another_learning_rate_goes_by_it(tmp_path, scheduled):
    model, optimizer, scheduler = parts()
    update(model, optimizer, scheduler, 3)
    if not scheduled:
        for group in optimizer.param_groups:
            group.pop("initial_lr")
    path = save_checkpoint(
        tmp_path, 3, model, optimizer, scheduler if scheduled else None, rng=[rng_state(CPU)], state={}
    )
    model, _, _ = parts(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step) if scheduled else None
    restore_checkpoint(path, model, optimizer, scheduler, rank=0, device=CPU)
    if scheduler is None:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
        return
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]] == pytest.approx([0.02 * 0.9**3])
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]] == pytest.approx([0.02 * 0.9**4])
