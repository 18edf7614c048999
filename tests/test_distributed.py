"""Two gloo processes against one: the same counts, the same summed gradient, the same advantages."""

import os
import socket

import torch
import torch.multiprocessing as mp
from torch import nn
from transformers import AutoModelForCausalLM

from grpo.advantages import Advantage, Scores, group_rewards, per_sample, reward_baseline, reward_scale
from grpo.batch import StepBatch, StepTotals, micro_batches, step_counts
from grpo.distributed import World, all_sum, init_distributed, sum_gradients
from grpo.logprobs import completion_logps
from grpo.objective import Objective, policy_loss, step_entropy_threshold

PROMPTS = [[1, 9], [1, 10, 11], [1, 12], [1, 13, 14, 15], [1, 20], [1, 21]]
COMPLETIONS = [[20, 2], [30, 31, 32, 2], [40], [41, 42, 2], [50, 51, 52], [53, 2]]
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
REWARDS = {"correct": [1.0, 0.0, None, 1.0, 0.0, 0.0, 1.0, 0.0], "short": [0.3, -2.0, 5.0, None, None, 9.0, 1.0, 1.5]}
WEIGHTS = {"correct": 1.0, "short": 0.5}
FLAGS = [
    Advantage(),
    Advantage(scale="batch"),
    Advantage(scale="batch", baseline="rloo"),
    Advantage(aggregate="gdpo"),
]
ENTROPIES = torch.tensor([[0.1, 0.9, 0.3], [2.0, 0.2, 0.8], [0.7, 0.6, 0.4]])


def gradient(world: World, folder: str, loss: str) -> tuple[torch.Tensor, tuple[int, int]]:
    mine = range(world.rank, len(PROMPTS), world.size)
    prompts, completions = [PROMPTS[i] for i in mine], [COMPLETIONS[i] for i in mine]
    logps = [[-1.0] * len(c) for c in completions]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens, sequences = step_counts(completions, world)
    step = StepTotals(tokens, sequences, None)
    for micro in micro_batches(prompts, completions, logps, ADVANTAGES[list(mine)], max_tokens=12, step=step):
        new, _ = completion_logps(model, micro)
        value, _ = policy_loss(
            new,
            new.detach() - 0.1,
            micro.advantages,
            micro.mask,
            Objective(loss=loss),
            token_count=tokens,
            sequence_count=sequences,
        )
        value.backward()
    parameters = list(model.model.parameters())
    sum_gradients(parameters, world)
    return torch.cat([p.grad.flatten() for p in parameters]), (tokens, sequences)


def advantages(world: World, groups: range) -> list[torch.Tensor]:
    """Of groups of two, whose rewards are this rank's."""
    mine = slice(2 * groups.start, 2 * groups.stop)
    by_function = {name: values[mine] for name, values in REWARDS.items()}
    found = []
    for flags in FLAGS:
        rewards = group_rewards(Scores(by_function["short"], by_function, WEIGHTS, []), 2, flags)
        centred = rewards - reward_baseline(rewards, flags, world)
        found.append(per_sample(centred / reward_scale(rewards, flags, world)))
    return found


def micros_of_ones():
    """Three micro-batches of one sequence of three tokens each."""
    ones = [[1, 1, 1]] * 3
    return micro_batches(ones, ones, ones, torch.ones(3), max_tokens=1, step=StepTotals(9, 3, None))


def worker(rank: int, port: int, folder: str, out: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = init_distributed()
    assert (world.rank, world.size) == (rank, 2)
    assert all_sum(torch.tensor([rank, 5]), world).tolist() == [1, 10]
    idle = nn.Parameter(torch.zeros(2))  # a rank without work takes part with zeros
    if rank == 0:
        idle.grad = torch.tensor([1.0, 2.0])
    sum_gradients([idle], world)
    assert idle.grad.tolist() == [1.0, 2.0]
    micros = [micro for micro in micros_of_ones() if micro.sequences[0] in [[0, 2], [1]][rank]]
    threshold = step_entropy_threshold(
        lambda micro: (None, ENTROPIES[micro.sequences]),
        StepBatch(micros, 9),
        Objective(top_entropy_quantile=0.4),
        world,
    )
    assert threshold == torch.quantile(ENTROPIES, 0.6)
    torch.save(
        {
            "gradients": [gradient(world, folder, loss) for loss in ("grpo", "dapo")],
            "advantages": advantages(world, [range(3), range(3, 4)][rank]),
        },
        f"{out}/{rank}.pt",
    )


def test_two_ranks_make_the_gradient_of_one(model_folder, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = model_folder("llama")
    mp.spawn(worker, args=(port, folder, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for i, loss in enumerate(("grpo", "dapo")):
        alone, counts = gradient(World(), folder, loss)
        assert counts == (15, 6)
        for rank in ranks:
            assert rank["gradients"][i][1] == counts
            assert (rank["gradients"][i][0] - alone).norm() <= 1e-6 * alone.norm()
    # a batch's deviation is that of all ranks' rewards; three of the four groups are on rank 0
    for a, b, alone in zip(ranks[0]["advantages"], ranks[1]["advantages"], advantages(World(), range(4))):
        assert (len(a), len(b)) == (6, 2)
        torch.testing.assert_close(torch.cat([a, b]), alone, rtol=1e-6, atol=0)


def test_alone_is_the_identity():
    world = World()
    assert all_sum(torch.tensor([3]), world).tolist() == [3]
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    sum_gradients([p], world)
    assert p.grad.item() == 1.0
    idle = nn.Parameter(torch.ones(2))  # as on several ranks: Adam's moments fade the same
    sum_gradients([idle], world)
    assert idle.grad.tolist() == [0.0, 0.0]
