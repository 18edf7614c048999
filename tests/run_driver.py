"""A stub of a recipe over the real run directory and checkpoints: a linear model, noise from every generator.

Run as a program, it is killed and resumed by its parent process, see test_resume.py."""

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from grpo.distributed import World
from grpo.run import Run, start_run


@dataclass
class Args:
    """What `start_run` reads of a recipe's arguments."""

    steps: int = 6
    seed: int = 0
    run_dir: Path | None = None
    resume: Path | None = None
    save_every: int = 2
    track: str = "none"
    learning_rate: float = 0.1


RECIPE = Path(__file__)


def parts(args: Args) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return model, optimizer, scheduler


def train(args: Args, *, world: World | None = None, pause: float = 0.0, at_step=None, **options) -> Run:
    """The loop of a recipe. at_step: called with (run, step) in the middle of each step."""
    run = start_run(args, recipe=RECIPE, world=world, **options)
    model, optimizer, scheduler = parts(args)
    run.restore(model, optimizer, scheduler)
    if run.start_step == 0:
        run.log(0, {"eval/pass_at_1": 0.0})
    for step in run.steps(args.steps):
        with run.phase("generate"):
            x = torch.randn(8, 4) + random.random() + np.random.rand()
            time.sleep(pause)
        loss = (model(x) - x[:, :2]).square().mean()
        loss.backward()
        if run.guard_finite(step, loss, 1.0, (x,)):
            optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if at_step:
            at_step(run, step)
        run.log(step, {"reward": -loss, "tokens": 8, "lr": scheduler.get_last_lr()[0]})
        run.save_completions(step, ["p"], [f"answer {step}"], {"correct": [1.0]}, [0.0])
        if run.due(step):
            run.save(step, model, optimizer, scheduler)
    run.finish(model)
    return run


def killed_often(directory: Path, kills: int, seed: int) -> None:
    """Run the loop in child processes, SIGKILL each at a random moment, resume, and let the last one end.

    Children are forked, so that each is at work at once; each takes the run's lock, files and generators anew. A
    moment is a number of steps and some milliseconds after it; after no step it may fall into the start, too."""
    moments = random.Random(seed)
    resumed_from = []
    train(Args(run_dir=directory.with_name("warm-up"), steps=2))  # what is imported late is so once, not in each child
    for attempt in range(kills + 1):
        begun, begin = os.pipe()
        child = os.fork()
        if child == 0:
            fresh = not directory.exists()
            args = Args(steps=150, save_every=3, **({"run_dir": directory} if fresh else {"resume": directory}))
            run = train(args, pause=0.02, at_step=lambda run, step, pipe=begin: os.write(pipe, b"."))
            os.write(1, f"finished after resuming from {run.start_step}\n".encode())
            os._exit(0)
        if attempt < kills:
            steps = moments.randint(0, 6)
            for _ in range(steps):
                os.read(begun, 1)
            time.sleep(moments.uniform(0.0, 0.04 if steps else 0.3))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(begun)
        os.close(begin)
        if attempt < kills:
            assert os.WIFSIGNALED(status), "the child ended before it was killed"
            saved = sorted(directory.glob("checkpoints/step-*"))
            resumed_from.append(int(saved[-1].name[-6:]) if saved else 0)
        else:
            assert status == 0, status
    assert len(set(resumed_from)) > 5, resumed_from
    print(f"killed {kills} times, leaving checkpoints of steps {resumed_from}")


if __name__ == "__main__":
    killed_often(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
