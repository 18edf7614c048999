"""A stub of a recipe over the real run directory and checkpoints: a linear model, noise from every generator.

Run as a program, it is killed and resumed by its parent process, see test_resume.py."""

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from grpo.distributed import World
from grpo.runs.run import Run, start_run


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
    lora_alpha: int = 32


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


def killed_often(begin: Callable[[list[str]], None], directory: Path, kills: int, seed: int, start: float) -> None:
    """Run `begin` in child processes, SIGKILL each at a random moment, and resume; at last in this one, to the end.

    begin: given ["--run-dir", directory] or ["--resume", directory], runs to the end. Children are forked, so that
    each is at work at once; each takes the run's lock, files and generators anew. A moment is a number of lines logged
    and some milliseconds after it; before the first line, anywhere in the first `start` seconds. A child stops by
    itself one line later: however fast the machine, none comes to the end of the run before it is killed."""
    moments = random.Random(seed)
    left = []
    for _ in range(kills):
        count = moments.randint(0, 7)
        lines, logged = os.pipe()
        child = os.fork()
        if child == 0:
            announce_lines(logged, stop_after=count + 1)
            begin(["--resume" if directory.exists() else "--run-dir", str(directory)])
            os._exit(0)
        os.close(logged)  # so that a child that fails is not waited for
        for _ in range(count):
            os.read(lines, 1)
        time.sleep(moments.uniform(0.0, 0.04 if count else start))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(lines)
        assert os.WIFSIGNALED(status), f"the child ended before it was killed: {status}"
        saved = sorted(directory.glob("checkpoints/step-*"))
        left.append(int(saved[-1].name[-6:]) if saved else 0)
    assert len(set(left)) > kills // 4, f"the run did not get on: checkpoints of steps {left}"
    begin(["--resume", str(directory)])
    print(f"killed {kills} times, leaving checkpoints of steps {left}")


def announce_lines(pipe: int, stop_after: int) -> None:
    """Have each `Run.log` of this process write a byte to the pipe when it is done, and the last wait for the kill."""
    genuine = Run.log
    count = itertools.count(1)

    def log(run: Run, step: int, metrics: dict) -> None:
        genuine(run, step, metrics)
        os.write(pipe, b".")
        while next(count) >= stop_after:
            signal.pause()

    Run.log = log  # type: ignore[method-assign]


def stub(directory: list[str]) -> None:
    train(tyro.cli(Args, args=["--steps", "150", "--save-every", "3", *directory]), pause=0.02)


def recipe(directory: list[str]) -> None:
    """quickstart_grpo.py on a random model that lies beside the run, with a reward that such a model can get."""
    import quickstart_grpo

    quickstart_grpo.correct = lambda completions, ground_truths: [float(len(c) % 2) for c in completions]
    flags = {
        "model": Path(directory[1]).with_name("model"), "steps": 40, "save-every": 2, "eval-every": 5,
        "eval-questions": 2, "prompts-per-step": 2, "group-size": 2, "max-completion-tokens": 6, "lora-rank": 2,
        "engine": "torch",
    }  # fmt: skip
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    quickstart_grpo.main(tyro.cli(quickstart_grpo.Args, args=[*argv, *directory]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = {"stub": stub, "recipe": recipe}[sys.argv[1]]
    directory, kills, seed = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if run is recipe:
        sys.path.insert(0, str(RECIPE.parent.parent / "recipes"))
        import quickstart_grpo  # noqa: F401
    if kills:
        # What is imported late is so once, not in each child: the kills would hit nothing else.
        train(Args(run_dir=directory.with_name("warm-up"), steps=2))
        killed_often(run, directory, kills, seed, start=0.3 if run is stub else 2.0)
    else:
        run(["--run-dir", str(directory)])
