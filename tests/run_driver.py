"""A stub of a recipe over the real run directory and checkpoints: a linear model, noise from every generator.

Run as a program, it is killed and resumed by its parent process, see test_resume.py."""

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from grpo.distributed import World
from grpo.runs.cli import parse_args
from grpo.runs.record import open_record
from grpo.runs.run import Run, RunFlags
from grpo.sampler import Completion, Question, Samples

RECIPE = Path(__file__)


@dataclass(frozen=True)
class Adapter:
    """Flags of the stub's adapter, which it does not have."""

    lora_alpha: int = 32
    """number that a resume cannot change"""


@dataclass
class Args:
    """A recipe's arguments, as few as a run needs."""

    steps: int = 6
    """optimizer steps"""
    learning_rate: float = 0.1
    """learning rate of the first step"""
    adapter: Adapter = Adapter()
    run: RunFlags = RunFlags(save_every=2)


def arguments(**values) -> Args:
    """`Args` by the names of its flags."""
    flags = {f.name: values.pop(f.name) for f in fields(RunFlags) if f.name in values}
    adapter = Adapter(values.pop("lora_alpha", 32))
    return Args(**values, adapter=adapter, run=RunFlags(**{"save_every": 2, **flags}))


def parts(args: Args) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return model, optimizer, scheduler


def begin(args: Args, *, world: World | None = None, inputs=None, **options) -> Run:
    """A run of the stub, made or resumed."""
    record = open_record(args, recipe=RECIPE, world=world, inputs=inputs)
    return Run(record, *parts(args), **options)


def make_samples(prompts: Sequence[str], texts: Sequence[str]) -> Samples:
    """Samples of a group of answers to each prompt."""
    questions = [Question(prompt, "", list(prompt.encode())) for prompt in prompts]
    completions = [Completion([1], [0.0], False) for _ in texts]
    return Samples(questions, len(texts) // len(prompts), completions, list(texts), 1)


def train(args: Args, *, pause: float = 0.0, at_step=None, **options) -> Run:
    """The loop of a recipe. at_step: called with (run, step) in the middle of each step."""
    run = begin(args, **options)
    if run.start_step == 0:
        run.log(0, {"eval/pass_at_1": 0.0})
    for step in run.steps(args.steps):
        with run.phase("generate"):
            x = torch.randn(8, 4) + random.random() + np.random.rand()
            time.sleep(pause)
        loss = (run.model(x) - x[:, :2]).square().mean()
        loss.backward()
        if run.guard_finite(step, loss, 1.0, (x,)):
            run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step()
        if at_step:
            at_step(run, step)
        run.log(step, {"reward": -loss, "tokens": 8, "lr": run.scheduler.get_last_lr()[0]})
        run.save_completions(step, make_samples(["p"], [f"answer {step}"]), {"correct": [1.0]}, torch.zeros(1, 1))
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


def killed_before_each_file_operation(directory: Path, every: int, first: int) -> None:
    """Kill the stub before its n-th operation on a file, for n = first, first + every, ..., and resume it, until a
    child comes to the end of its run. Each n has a directory of its own, `directory`/n."""
    from grpo.runs import run

    run.redraw = lambda directory: None  # the curves take longer than all the rest, and nothing depends on them
    for count in itertools.count(first, every):
        folder = directory / str(count)
        child = os.fork()
        if child == 0:
            kill_before_file_operation(directory, count)
            train(arguments(steps=3, save_every=1, run_dir=folder))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        begun = folder.exists()
        train(arguments(steps=3, save_every=1, **{"resume" if begun else "run_dir": folder}))
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            print(f"{count} operations at most")
            return


def kill_before_file_operation(directory: Path, count: int) -> None:
    """Have this process open, rename and remove files under `directory` `count` times, and die before the next time."""
    process, done = os.getpid(), itertools.count()

    def before_operation(event: str, operands: tuple) -> None:
        if os.getpid() == process and event.startswith(("open", "os.", "shutil.")):
            paths = [str(a) for a in operands if isinstance(a, (str, os.PathLike))]
            if any(str(directory) in path for path in paths) and next(done) == count:
                os.kill(process, signal.SIGKILL)

    sys.addaudithook(before_operation)


def stub(directory: list[str]) -> None:
    train(parse_args(Args, ["--steps", "90", "--save-every", "3", *directory]), pause=0.01)


def recipe(directory: list[str]) -> None:
    """quickstart_grpo.py on a random model that lies beside the run, with a reward that such a model can get."""
    import quickstart_grpo

    quickstart_grpo.correctness = lambda completions, ground_truths, **_: [float(len(c) % 2) for c in completions]
    flags = {
        "model": Path(directory[1]).with_name("model"), "steps": 24, "save-every": 2, "eval-every": 5,
        "eval-questions": 2, "prompts-per-step": 2, "group-size": 2, "max-completion-tokens": 6, "lora-rank": 2,
        "engine": "torch",
    }  # fmt: skip
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    quickstart_grpo.main(parse_args(quickstart_grpo.Args, [*argv, *directory]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, directory, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if what == "recipe":
        sys.path.insert(0, str(RECIPE.parent.parent / "recipes"))
        import quickstart_grpo  # noqa: F401
    program = {"stub": stub, "recipe": recipe}.get(what)
    if number:
        # What is imported late is so once, not in each child: the kills would hit nothing else.
        train(arguments(run_dir=directory.with_name("warm-up"), steps=2))
    if program is None:
        killed_before_each_file_operation(directory, every=number, first=int(sys.argv[4]))
    elif number:
        killed_often(program, directory, number, seed=5, start=0.3 if program is stub else 2.0)
    else:
        program(["--run-dir", str(directory)])
