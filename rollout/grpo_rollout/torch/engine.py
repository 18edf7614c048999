"""An engine in plain PyTorch that runs anywhere, on the trainer's own model: nothing to copy, nothing to sync."""

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.cache_utils import Cache

from grpo.logprobs import causal_lm
from grpo_rollout.engine import Completion, Sampling
from grpo_rollout.torch.kv_cache import decoding, growing_cache


class TorchEngine:
    """Samples from `model` itself (a causal LM of transformers, with or without a PEFT adapter).

    eos_ids: any of them ends a completion. pad_id: fills the left of short prompts; any id will do.
    max_tokens_in_flight: prompt and completion tokens of one decoding batch at most, which bounds the KV cache;
    requests are taken longest prompt first and split into such batches.
    dequantize: decode with a 16 or 32-bit copy of the 4-bit weights: the same values (bitsandbytes dequantizes
    at every product anyway) and the same adapter, faster, for 4 to 8 times the memory of the weights."""

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int = 0,
        max_tokens_in_flight: int = 65_536,
        dequantize: bool = False,
    ) -> None:
        if not eos_ids:
            raise ValueError("eos_ids is empty: without an EOS id every completion would run to max_tokens")
        self.model = model
        self.sampler = dequantized(model) if dequantize else model
        self.eos_ids = sorted(set(eos_ids))
        self.pad_id = pad_id
        self.max_tokens_in_flight = max_tokens_in_flight
        # transformers has a new name for it since 5.24, and warns of the old one.
        known = inspect.signature(causal_lm(model).forward).parameters
        self.cache_argument = "cache" if "cache" in known else "past_key_values"

    def sync(self, model: nn.Module) -> None:
        if model is not self.model:
            raise ValueError("the torch engine samples from the model it was made with; make a new engine for another")

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, *, seed: int
    ) -> list[Completion]:
        """See `Engine.generate`. Raises ValueError for an empty prompt or a sampling setting out of range."""
        check_sampling(sampling)
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty: a prompt needs at least one token id")
        device = next(self.model.parameters()).device
        # Neighbours in prompt length share a batch, so little of it is padding; and the longest come first.
        order = sorted((i // group_size for i in range(len(prompts) * group_size)), key=lambda p: -len(prompts[p]))
        out: list[Completion | None] = [None] * len(order)
        placed = [0] * len(prompts)
        generator = torch.Generator(device).manual_seed(seed)
        with _evaluating(self.sampler), decoding(self.sampler), torch.inference_mode():
            start = 0
            while start < len(order):
                rows = max(1, self.max_tokens_in_flight // (len(prompts[order[start]]) + sampling.max_tokens))
                batch = order[start : start + rows]
                for p, completion in zip(batch, self._decode([prompts[p] for p in batch], sampling, generator)):
                    out[p * group_size + placed[p]] = completion
                    placed[p] += 1
                start += rows
        return [c for c in out if c is not None]

    def _decode(self, prompts: list[Sequence[int]], sampling: Sampling, generator: torch.Generator) -> list[Completion]:
        """One batch, to the end. Neighbours with the same prompt share its prefill."""
        device = generator.device
        distinct: list[Sequence[int]] = []
        row_of: list[int] = []
        for prompt in prompts:
            if not distinct or prompt is not distinct[-1]:
                distinct.append(prompt)
            row_of.append(len(distinct) - 1)
        width = max(len(p) for p in distinct)
        # Left padding: the last column is every prompt's last token. Padding is masked and positions start after it.
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in distinct], device=device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        eos = torch.tensor(self.eos_ids, device=device)
        cache = growing_cache(width + sampling.max_tokens)
        logits = self._next_logits(ids, attention, positions, cache)

        rows = torch.tensor(row_of, device=device)
        logits, attention = logits[rows], attention[rows]
        cache.batch_select_indices(rows)
        position = attention.sum(1, keepdim=True)
        alive = list(range(len(prompts)))  # row in the batch -> completion
        tokens: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        stopped = [False] * len(prompts)
        for step in range(sampling.max_tokens):
            token, logp = sample(logits, sampling, generator)
            ended = torch.isin(token, eos)
            for i, t, lp, e in zip(alive, token.tolist(), logp.tolist(), ended.tolist()):
                if not stopped[i]:
                    tokens[i].append(t)
                    logps[i].append(lp)
                    stopped[i] = e
            going = [r for r, i in enumerate(alive) if not stopped[i]]
            if not going or step + 1 == sampling.max_tokens:
                break
            if len(going) <= len(alive) * 3 // 4:  # drop finished rows, not at every step: it copies the cache
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                token, attention, position = token[keep], attention[keep], position[keep]
                alive = [alive[r] for r in going]
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], dim=1)
            logits = self._next_logits(token[:, None], attention, position, cache)
            position = position + 1
        return [Completion(t, lp, not s) for t, lp, s in zip(tokens, logps, stopped)]

    def _next_logits(
        self, ids: torch.Tensor, attention: torch.Tensor, positions: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """[rows, vocab] float32 logits after the last column; the cache grows by the columns of ids."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            output: Any = self.sampler(
                input_ids=ids,
                attention_mask=attention,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_argument: cache},
            )
        return output.logits[:, -1].float()


def dequantized(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters, but for the 4-bit linear layers, which become dense copies in
    their compute dtype. The adapter is shared, not copied: training it changes both."""
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                packed: Any = child.weight
                weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
                linear = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(weight.to(child.compute_dtype or weight.dtype), requires_grad=False)
                linear.bias = child.bias
                setattr(module, name, linear)
    return twin


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError, naming the field, for a setting that has no meaning."""
    if sampling.temperature < 0:
        raise ValueError(f"temperature {sampling.temperature} is negative; 0 is greedy, 1 the model's own distribution")
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens {sampling.max_tokens} must be at least 1")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p {sampling.top_p} must lie in (0, 1]; 1 turns it off")
    if sampling.top_k < 0:
        raise ValueError(f"top_k {sampling.top_k} is negative; 0 turns it off")


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row and its log-probability under the distribution sampled from.

    logits: [rows, vocab] float32. Returns (token [rows] int64, logp [rows] float32, nats). temperature 0 takes
    the most likely token and gives its log-probability at temperature 1. top_k, then top_p, cut the distribution
    at the sampling temperature and renormalise what is left."""
    if sampling.temperature == 0:
        logps = logits.log_softmax(-1)
        logp, token = logps.max(-1)
        return token, logp
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # the mass of the more likely tokens
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    logps = logits.log_softmax(-1)
    token = torch.multinomial(logps.exp(), 1, generator=generator)
    return token[:, 0], logps.gather(1, token)[:, 0]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, for as long as it lasts: in training mode gradient checkpointing refuses a KV cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
