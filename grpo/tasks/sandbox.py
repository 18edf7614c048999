"""Worker processes with limits of time and memory, for functions that untrusted text may keep busy for ever.

A worker is a fresh interpreter that imports the function and then forks a child, which answers the calls. A child that
overruns is killed, and the worker forks the next one within milliseconds. (The training process itself must not fork:
it holds CUDA and threads.) Worker and parent exchange JSON, one message per line, so nothing that a worker says is ever
executed or unpickled here, as it would be by multiprocessing and the libraries built on it. Workers see no GPU and none
of the environment's secrets, and they never run the main module.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from grpo.errors import UserError

_START_S = 120.0
"""time limit in seconds for a worker's start, imports included: the disk may be cold, and a function's file large"""
_MAX_REPLY = 1 << 20
"""maximum size of a reply in bytes"""
_FINISHED = 77
"""exit status of a child that has no more requests to wait for"""
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_COMMAND = """
import json, sys
settings = json.loads(sys.argv[1])
sys.path[:] = settings.pop("path")
from grpo.tasks.sandbox import serve
serve(**settings)
"""


class Outcome(NamedTuple):
    """What became of one call."""

    value: Any
    """what the function returned"""
    error: str
    """empty if the call returned; else the reason, in its last line"""
    skipped: bool = False
    """whether the call was never run, because the time of the whole batch was used up"""


class Sandbox:
    """Pools of workers, one pool per function, started by the function's first `map`; `close`, the end of a `with`
    block or of the object ends them.

    workers: number of workers per pool, about 80 MB each for math-verify; None means half of the cores, at most 4.
    timeout_s: wall-clock limit of one call in seconds; with the kill, the default makes about a second. memory_mib:
    address space that a call may use beyond what the imports took, in MiB. budget_s: wall-clock limit of one `map` in
    seconds; calls that have not begun by then are skipped."""

    def __init__(
        self, workers: int | None = None, *, timeout_s: float = 0.9, memory_mib: int = 512, budget_s: float = 60.0
    ) -> None:
        if workers is None:
            workers = max(1, min(4, (os.cpu_count() or 2) // 2))
        if workers < 1 or timeout_s <= 0 or memory_mib < 1 or budget_s <= 0:
            raise UserError(f"Sandbox: {workers=}, {timeout_s=}, {memory_mib=}, {budget_s=} must all be positive")
        self.workers = workers
        self.timeout_s = timeout_s
        self.memory_mib = memory_mib
        self.budget_s = budget_s
        self._pools: dict[str, list[_Worker]] = {}
        # A plain function rather than a bound method, which would keep the object alive.
        self._finalizer = weakref.finalize(self, _kill_all, self._pools)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers. A later `map` starts new ones."""
        _kill_all(self._pools)

    def map(self, function: str, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """Call the function once for each list of arguments; returns the outcomes in the order of `calls`.

        function: "module:name" or "path/to/file.py:name". Arguments and results must be JSON. A running interval timer
        (the time limit of `grpo.tasks.scoring.score`) is paused meanwhile, since workers have limits of their own.

        Raises RuntimeError, with the worker's traceback, if the function cannot be imported."""
        if not calls:
            return []
        with _timer_paused():
            try:
                return self._map(function, calls)
            except BaseException:
                self.close()  # a worker that is still busy would answer the next map's calls with its old result
                raise

    def _map(self, function: str, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        end: float | None = None  # set with the first call, so that starting workers does not use up the budget
        pool = self._pools.setdefault(function, [])
        while len(pool) < self.workers:
            pool.append(_Worker(function, self.memory_mib))
        while waiting or any(worker.task is not None for worker in pool):
            for worker in pool:
                if waiting and worker.idle:
                    end = end or time.monotonic() + self.budget_s
                    worker.call(waiting[0], calls[waiting.popleft()], self.timeout_s)
            for worker in _wait(pool):
                task = worker.task
                outcome = worker.proceed(function, self.timeout_s)
                if task is not None and outcome is not None:
                    outcomes[task] = outcome
                if worker.gone:
                    pool[pool.index(worker)] = _Worker(function, self.memory_mib)
            if end is not None and time.monotonic() > end:
                waiting.clear()
        skipped = Outcome(None, f"not run: the batch had taken {self.budget_s:g} s", skipped=True)
        return [outcome or skipped for outcome in outcomes]


class _Worker:
    """The parent's side of one worker, whose child starts, idles, runs a call, and is replaced after a kill."""

    def __init__(self, function: str, memory_mib: int) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _COMMAND,
                json.dumps({"path": sys.path, "target": function, "memory_mib": memory_mib}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C reaches the parent alone, and one signal ends worker and child together
        )
        assert self.process.stdin
        assert self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.child: int | None = None
        """process id of the child; None while it starts"""
        self.task: int | None = None
        """index of the call that the child is running"""
        self.deadline = time.monotonic() + _START_S
        """time by which the start or the call must be over"""
        self.gone = False
        """whether the worker has closed its replies, and so has ended"""
        self.buffer = b""
        """start of a reply whose line is not complete yet"""

    @property
    def idle(self) -> bool:
        return self.child is not None and self.task is None

    def call(self, task: int, arguments: Sequence[Any], timeout_s: float) -> None:
        self.task = task
        with contextlib.suppress(BrokenPipeError):  # `proceed` notices a dead worker by the end of its replies
            self.requests.write(json.dumps({"arguments": arguments, "timeout_s": timeout_s}).encode() + b"\n")
            self.requests.flush()
        self.deadline = time.monotonic() + timeout_s

    def proceed(self, function: str, timeout_s: float) -> Outcome | None:
        """Read the worker's messages, or act on a deadline that has passed; the outcome of the task, if it has ended.

        Raises RuntimeError if the worker cannot start."""
        for message in self._messages():
            if "cannot_load" in message:
                raise RuntimeError(f"the sandbox cannot load {function!r}: {message['cannot_load']}")
            if "child" in message:  # a new child: a task that was running has ended the previous one
                self.child = message["child"]
                if self.task is not None:
                    return self._end(Outcome(None, f"ended its process (exit status {message['last_status']})"))
            elif self.task is not None:
                return self._end(Outcome(message["value"], message["error"]))
        if self.gone:
            self.kill()
            if self.task is None:
                raise RuntimeError(f"the sandbox's worker for {function!r} ended with status {self.process.returncode}")
            return self._end(Outcome(None, "ended its worker"))
        overdue = time.monotonic() >= self.deadline
        if self.child is None:
            if overdue:
                raise RuntimeError(f"the sandbox's worker for {function!r} did not start within {_START_S:g} s")
            return None
        if overdue or len(self.buffer) > _MAX_REPLY:
            os.kill(self.child, signal.SIGKILL)
            self.child, self.buffer = None, b""
            self.deadline = time.monotonic() + _START_S
            return self._end(Outcome(None, f"took more than {timeout_s:g} s" if overdue else "its reply was too long"))
        return None

    def _end(self, outcome: Outcome) -> Outcome:
        self.task = None
        return outcome

    def _messages(self) -> list[dict[str, Any]]:
        if not select.select([self.replies], [], [], 0)[0]:
            return []
        piece = os.read(self.replies.fileno(), 1 << 16)
        self.gone = not piece
        *lines, self.buffer = (self.buffer + piece).split(b"\n")
        messages = []
        for line in lines:
            # Until a new child reports, all there is to read was left by its predecessor, and may be half a line.
            with contextlib.suppress(ValueError):
                messages.append(json.loads(line))
        if self.child is None:
            messages = [m for m in messages if "value" not in m]
        return messages

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.replies.close()


def _wait(pool: "list[_Worker]") -> "list[_Worker]":
    """Wait until some workers have written something or have run out of time; returns these workers."""
    watched = [worker for worker in pool if not worker.idle]
    patience = max(min(worker.deadline for worker in watched) - time.monotonic(), 0)
    readable = select.select([worker.replies for worker in watched], [], [], patience)[0]
    now = time.monotonic()
    return [worker for worker in watched if worker.replies in readable or now >= worker.deadline]


def _kill_all(pools: dict[str, list[_Worker]]) -> None:
    while pools:
        for worker in pools.popitem()[1]:
            worker.kill()


@contextlib.contextmanager
def _timer_paused() -> Iterator[None]:
    """Stop the interval timer of this process, and let it go on afterwards with the time it had left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    delay, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-3), interval)


# ---------------------------------------------------------------------------------------------- in the worker


def serve(target: str, memory_mib: int) -> None:
    """A worker's main function: import the target, fork a child that answers calls, and another when that one dies."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # send what the function prints elsewhere, as it could look like a reply
    logging.disable(logging.CRITICAL)
    try:
        function = _load(target)
    except BaseException:
        _say(replies, {"cannot_load": traceback.format_exc()[-5000:]})
        return
    status = 0
    while status != _FINISHED:
        child = os.fork()
        if child == 0:
            _limit_memory(memory_mib)
            _say(replies, {"child": os.getpid(), "last_status": status})
            _answer(function, replies)
            os._exit(_FINISHED)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _answer(function: Callable[..., Any], replies: IO[bytes]) -> None:
    """A child's main function: call the function for each request that comes in."""
    for line in sys.stdin.buffer:
        message = json.loads(line)
        try:
            _limit_time(message["timeout_s"])
            reply = json.dumps({"value": function(*message["arguments"]), "error": ""})
        except BaseException:  # SystemExit as well, and math-verify's own TimeoutException
            reply = json.dumps({"value": None, "error": traceback.format_exc()[-5000:]})
        signal.alarm(0)
        _say(replies, reply)


def _say(replies: IO[bytes], message: dict[str, Any] | str) -> None:
    """Write a message as one line. It begins with a line break, because a child may have died in the middle of one."""
    replies.write(b"\n" + (message if isinstance(message, str) else json.dumps(message)).encode() + b"\n")
    replies.flush()


def _load(target: str) -> Callable[..., Any]:
    """The function that "module:name" or "path/to/file.py:name" stands for."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        # The file gets a name other than __main__, as in multiprocessing, so that a recipe's main part does not run.
        specification = importlib.util.spec_from_file_location(f"_sandbox_{Path(place).stem}", place)
        if specification is None or specification.loader is None:
            raise ImportError(f"{place} is not a Python file")
        module = importlib.util.module_from_spec(specification)
        sys.modules[specification.name] = module
        specification.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


def _limit_memory(mib: int) -> None:
    """Limit the address space to its present size plus so many MiB. On Linux only; elsewhere there is no limit."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limit_time(seconds: float) -> None:
    """End this process some seconds after the parent would have killed it, in case the parent is gone or stopped."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = usage.ru_utime + usage.ru_stime
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent + seconds) + 5, hard))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process, even inside C code
    signal.alarm(int(seconds) + 5)
