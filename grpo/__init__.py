"""GRPO as pure functions: sample, score, compare with the group, reinforce.

The public functions of the algorithm are importable from here, each loaded with its module at its first use:

    from grpo import Objective, completion_logps, group_advantages, policy_loss

`grpo.policy` (model, adapter, tokenizer), `grpo.tasks` (data, rewards) and `grpo.runs` (record, checkpoints) are wings.
"""

import importlib
from typing import Any

_HOMES = {
    "advantages": "Advantage Scores group_advantages group_rewards per_sample reward_baseline reward_scale sample_mask "
    "zero_variance_groups",
    "batch": "MicroBatch StepBatch StepTotals make_batch micro_batches step_counts",
    "distributed": "World all_means init_distributed sum_gradients",
    "errors": "UserError",
    "logprobs": "completion_logps",
    "losses": "LOSSES LossParameters Tokens kl_terms",
    "objective": "Objective average entropy_bonus kl_penalty log_ratio merge_metrics old_policy_logps policy_loss "
    "sampler_weights step_entropy_threshold surrogate token_filter token_metrics",
    "sampler": "Completion Engine Question Rollout Samples Sampling sample step_questions",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'grpo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"grpo.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
