"""Sampling: which questions a step sees, a group of answers to each, and the names of what flows between the two.

Samples are prompt-major: sample i answers question i // group_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from grpo.advantages import Scores, zero_variance_groups
from grpo.distributed import World, all_means, all_sum
from grpo.errors import UserError
from grpo.lazy import torch

if TYPE_CHECKING:
    from torch import nn


class Sampling(NamedTuple):
    """How completions are drawn.

    Temperature alone keeps the sampler's distribution equal to the trainer's. top_p below 1 or top_k above 0
    renormalizes the probabilities that are kept, and every ratio of trainer to sampler is then biased by that mass."""

    temperature: float = 1.0
    """divisor of the logits; 0 is greedy decoding, whose log-probabilities are those at temperature 1"""
    max_tokens: int = 256
    """maximum number of completion tokens, the EOS included"""
    top_p: float = 1.0
    """probability mass that nucleus sampling keeps; 1 turns it off"""
    top_k: int = 0
    """number of most likely tokens to sample from; 0 means all"""


class Completion(NamedTuple):
    """One sampled answer."""

    token_ids: list[int]
    """tokens as sampled, the EOS included where one was sampled"""
    logps: list[float]
    """log-probability of each token, in nats, under the distribution that was sampled from (after temperature)"""
    truncated: bool
    """whether max_tokens ended the completion rather than an EOS"""


class Engine(Protocol):
    """What samples: prompt token ids in; completion token ids and their log-probabilities out."""

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, *, seed: int
    ) -> list[Completion]:
        """Draw `group_size` completions of each prompt; completion i belongs to prompt i // group_size.

        The same prompts, adapter and seed give the same completions."""

    def sync(self, model: nn.Module) -> None:
        """Take over the adapter of the trainer's model; the next `generate` samples from it."""


@dataclass(frozen=True)
class Rollout:
    """Flags of sampling."""

    group_size: int = 8
    """number of answers sampled to each question"""
    temperature: float = 1.0
    """sampling temperature; the trainer computes log-probabilities at the same temperature"""
    max_prompt_tokens: int = 256
    """maximum number of tokens in a prompt; questions with longer prompts are dropped"""
    max_completion_tokens: int = 1024
    """maximum number of tokens in an answer"""

    @property
    def sampling(self) -> Sampling:
        """How training samples are drawn."""
        return Sampling(temperature=self.temperature, max_tokens=self.max_completion_tokens)

    @property
    def greedy(self) -> Sampling:
        """The most likely token at every position, for evaluations."""
        return Sampling(temperature=0, max_tokens=self.max_completion_tokens)


class Question(NamedTuple):
    """A question, ready to be asked."""

    text: str
    ground_truth: str
    """the final answer alone, without its derivation"""
    prompt: list[int]
    """token ids of the whole prompt: chat template, system prompt and question"""


class Samples(NamedTuple):
    """The answers to some questions; sample i answers question i // group_size."""

    questions: list[Question]
    """[prompts]"""
    group_size: int
    completions: list[Completion]
    """[prompts * group_size]"""
    texts: list[str]
    """[prompts * group_size] the completions as text, without special tokens"""
    max_completion_tokens: int
    """the limit that a truncated completion ran into"""

    @property
    def prompts(self) -> list[list[int]]:
        """[prompts * group_size] token ids of the prompt of each sample."""
        return [question.prompt for question in self.questions for _ in range(self.group_size)]

    @property
    def ground_truths(self) -> list[str]:
        """[prompts * group_size] ground truth of each sample."""
        return [question.ground_truth for question in self.questions for _ in range(self.group_size)]

    @property
    def lengths(self) -> list[int]:
        """[prompts * group_size] number of completion tokens."""
        return [len(completion.token_ids) for completion in self.completions]

    @property
    def truncated(self) -> list[bool]:
        """[prompts * group_size] whether the limit cut the completion off."""
        return [completion.truncated for completion in self.completions]


def sample(
    engine: Engine,
    tokenizer: Any,
    questions: Sequence[Question],
    group_size: int,
    sampling: Sampling,
    *,
    seed: int,
    decode: Callable[[list[int]], str] | None = None,
) -> Samples:
    """Ask each question `group_size` times.

    decode: token ids of a completion -> the text that rewards read; None decodes without special tokens."""
    decode = decode or (lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    completions = engine.generate([q.prompt for q in questions], group_size, sampling, seed=seed)
    texts = [decode(completion.token_ids) for completion in completions]
    return Samples(list(questions), group_size, completions, texts, sampling.max_tokens)


def step_seed(seed: int, step: int, world: World) -> int:
    """The seed of this rank's samples at one step: the same after a resume, and another for every step and rank."""
    return (seed * 1_000_003 + step) * world.size + world.rank


def step_questions(
    train: Sequence[Question], prompts_per_step: int, *, seed: int, step: int, world: World
) -> list[Question]:
    """This rank's questions at optimizer step `step`, counted from 1. See `prompt_indices`."""
    indices = prompt_indices(seed, step - 1, prompts_per_step, len(train), rank=world.rank, world_size=world.size)
    return [train[i] for i in indices]


def prompt_indices(
    seed: int, step: int, prompts_per_step: int, dataset_size: int, *, rank: int = 0, world_size: int = 1
) -> list[int]:
    """The indices of this rank's questions at one step: a function of seed, step and rank, so that a resumed run sees
    the same ones.

    The data are shuffled anew in each epoch. Step `s` (from 0) takes the entries from `s * prompts_per_step` of the
    endless concatenation of the epochs, so every question is seen once before any is seen twice. Rank `r` takes every
    `world_size`-th of them, beginning at the `r`-th: together the ranks see what one process alone would see.

    seed, step: non-negative. prompts_per_step: number of questions over all ranks, a multiple of world_size.
    Returns prompts_per_step / world_size indices in [0, dataset_size).
    Raises UserError, naming the flag, where the numbers do not fit."""
    if dataset_size < 1:
        raise UserError("no training questions: the data set is empty after filtering; check --data and the lengths")
    check_prompts_per_step(prompts_per_step, world_size)
    positions = range(step * prompts_per_step + rank, (step + 1) * prompts_per_step, world_size)
    shuffles: dict[int, list[int]] = {}
    indices = []
    for position in positions:
        epoch, offset = divmod(position, dataset_size)
        if epoch not in shuffles:
            # Different (seed, epoch) must have different generators: seed 0 epoch 1 is not seed 1 epoch 0.
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF)
            shuffles[epoch] = torch.randperm(dataset_size, generator=generator).tolist()
        indices.append(shuffles[epoch][offset])
    return indices


def check_prompts_per_step(prompts_per_step: int, processes: int) -> None:
    """Raise UserError where the questions of a step cannot be shared among the processes."""
    if prompts_per_step < 1 or prompts_per_step % processes:
        raise UserError(
            f"--prompts-per-step {prompts_per_step} must be a multiple of the {processes} processes, and above 0"
        )


def sample_metrics(samples: Samples, scores: Scores, world: World, **columns: Sequence[float]) -> dict[str, float]:
    """What the step's samples say of themselves, as means over all ranks; docs/metrics.md explains each.

    columns: further values per sample whose means are logged under their names. Every rank must call it."""
    means: Mapping[str, Sequence[float | None]] = {
        "reward": scores.total,
        **({"pass_at_1": scores.by_function["correct"]} if "correct" in scores.by_function else {}),
        **{f"reward/{name}": values for name, values in scores.by_function.items()},
        "length": samples.lengths,
        "truncated": [float(truncated) for truncated in samples.truncated],
        "zero_variance": zero_variance_groups(scores.total, samples.group_size).float().tolist(),
        **columns,
    }
    tokens = all_sum(torch.tensor(sum(samples.lengths), device=world.device), world)
    return all_means(means, world) | {"tokens": int(tokens)}
