"""An engine in plain PyTorch, which runs anywhere. It samples from the trainer's own model, so nothing is synced."""

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

from grpo.errors import UserError
from grpo.logprobs import causal_lm
from grpo.sampler import Completion, Sampling
from grpo_rollout.torch.kv_cache import decoding, growing_cache


class TorchEngine:
    """Samples from `model` itself (a causal LM of transformers, with or without a PEFT adapter).

    eos_ids: token ids that end a completion. pad_id: token id that fills the left of short prompts; any id will do.
    max_tokens_in_flight: maximum number of prompt and completion tokens in one decoding batch, which bounds the KV
    cache; requests are sorted by prompt length, the longest first, and split into such batches.
    dequantize: decode with a 16 or 32-bit copy of the 4-bit weights: the same values (bitsandbytes dequantizes for
    every product anyway) and the same adapter, faster, for 4 to 8 times the memory of the weights."""

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int = 0,
        max_tokens_in_flight: int = 65_536,
        dequantize: bool = False,
    ) -> None:
        self.model = model
        self.sampler = dense_copy(model) if dequantize else model
        self.eos_ids = sorted_eos_ids(eos_ids)
        self.pad_id = pad_id
        self.max_tokens_in_flight = max_tokens_in_flight
        # transformers 5.24 renamed the argument that takes the cache, and warns of the old name.
        known = inspect.signature(causal_lm(model).forward).parameters
        self.cache_argument = "cache" if "cache" in known else "past_key_values"

    def sync(self, model: nn.Module) -> None:
        """See `Engine.sync`. Raises ValueError for another model than the engine's."""
        if model is not self.model:
            raise ValueError("the torch engine samples from the model it was made with; make a new engine for another")

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, *, seed: int
    ) -> list[Completion]:
        """See `Engine.generate`. Raises UserError as `check_requests` does."""
        check_requests(prompts, sampling)
        device = next(self.model.parameters()).device
        # Requests of similar prompt lengths share a batch, so little of it is padding. The longest come first.
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
        """Decode one batch to the end. Neighbours with the same prompt share its prefill."""
        device = generator.device
        distinct: list[Sequence[int]] = []
        row_of: list[int] = []
        for prompt in prompts:
            if not distinct or prompt is not distinct[-1]:
                distinct.append(prompt)
            row_of.append(len(distinct) - 1)
        width = max(len(p) for p in distinct)
        # Padded on the left, so that the last column holds every prompt's last token. Padding is masked, and positions
        # start after it.
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
            if len(going) <= len(alive) * 3 // 4:  # finished rows are dropped rarely, since that copies the cache
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
        """[rows, vocab] float32 logits of the last column. The cache grows by the columns of `ids`."""
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


def dense_copy(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters, except that the 4-bit linear layers are replaced by dense copies
    in their compute dtype. The adapter is shared, not copied: training it changes both."""
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


def sorted_eos_ids(eos_ids: Sequence[int]) -> list[int]:
    """The distinct ids in ascending order. Raises ValueError where there are none."""
    if not eos_ids:
        raise ValueError("eos_ids is empty: without an EOS id every completion would run to max_tokens")
    return sorted(set(eos_ids))


def check_requests(prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raise UserError for an empty prompt, or a sampling setting that has no meaning; the message names it."""
    if sampling.temperature < 0:
        raise UserError(f"temperature {sampling.temperature} is negative; 0 is greedy, 1 the model's own distribution")
    if sampling.max_tokens < 1:
        raise UserError(f"max_tokens {sampling.max_tokens} must be at least 1")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p {sampling.top_p} must lie in (0, 1]; 1 turns it off")
    if sampling.top_k < 0:
        raise UserError(f"top_k {sampling.top_k} is negative; 0 turns it off")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: a prompt needs at least one token id")


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row, and its log-probability under the distribution that it was sampled from.

    logits: [rows, vocab] float32. Returns (token [rows] int64, logp [rows] float32, nats). Temperature 0 takes the most
    likely token and returns its log-probability at temperature 1. top_k, then top_p, cut the distribution at the
    sampling temperature and renormalize what is left."""
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
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    logps = logits.log_softmax(-1)
    token = torch.multinomial(logps.exp(), 1, generator=generator)
    return token[:, 0], logps.gather(1, token)[:, 0]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which the model is in evaluation mode: in training, activation checkpointing refuses a KV cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
