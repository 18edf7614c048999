"""The engine protocol: prompt token ids in; completion token ids and their log-probabilities out."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import nn


class Sampling(NamedTuple):
    """How completions are drawn. Only temperature keeps the sampler's distribution equal to the trainer's:
    top_p below 1 or top_k above 0 renormalises the kept mass, and every ratio to the trainer is biased by it."""

    temperature: float = 1.0
    """divides the logits; 0 is greedy decoding, its log-probabilities then at temperature 1"""
    max_tokens: int = 256
    """completion tokens at most, the EOS included"""
    top_p: float = 1.0
    """nucleus mass kept; 1 is off"""
    top_k: int = 0
    """tokens kept; 0 is off"""


class Completion(NamedTuple):
    token_ids: list[int]
    """as sampled, the EOS included when one was sampled"""
    logps: list[float]
    """nats, one a token, of the distribution that was sampled from (after temperature)"""
    truncated: bool
    """ended by max_tokens, not by an EOS id"""


class Engine(Protocol):
    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, *, seed: int
    ) -> list[Completion]:
        """Draw `group_size` completions of each prompt; completion i belongs to prompt i // group_size.

        The same prompts, adapter and seed give the same completions."""

    def sync(self, model: nn.Module) -> None:
        """Take over the adapter of the trainer's model; the next `generate` samples from it."""
