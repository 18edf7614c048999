"""Worker processes with limits of time and memory, for code that may never come back from untrusted text.

The workers are fresh interpreters, not forks: forking a process that holds CUDA or threads is not safe. They speak
JSON, one line a message, so that nothing a worker says is ever executed or unpickled here; they see no GPU and none
of the environment's secrets; and none of this touches the main module of the process that starts them.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import resource
import selectors
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
from typing import Any, NamedTuple

_START_S = 120.0
"""a worker's start and imports may take so long: a cold disk, a recipe's torch"""
_MAX_REPLY = 1 << 20
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class Outcome(NamedTuple):
    """What became of one call."""

    value: Any
    error: str
    """empty where the call returned; else the last line says why it did not"""
    skipped: bool = False
    """never run: the whole batch's time was used up"""


class Sandbox:
    """A pool of workers, started at the first `map` and closed with the object or at the end of a `with` block.

    workers: processes, each of about 80 MB for math-verify; None: half of the cores, at most 4. timeout_s: wall clock
    of one call, seconds; a worker that takes longer is killed and replaced, which with the default is done within
    the second. memory_mb: address space the calls may add to what the imports took. budget_s: wall clock of one
    `map`; what has not begun by then is skipped."""

    def __init__(
        self, workers: int | None = None, *, timeout_s: float = 0.9, memory_mb: int = 512, budget_s: float = 60.0
    ) -> None:
        if workers is None:
            workers = max(1, min(4, (os.cpu_count() or 2) // 2))
        if workers < 1 or timeout_s <= 0 or memory_mb < 1 or budget_s <= 0:
            raise ValueError(f"Sandbox: {workers=}, {timeout_s=}, {memory_mb=}, {budget_s=} must all be positive")
        self.workers = workers
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.budget_s = budget_s
        self._pool: list[_Worker] = []
        # Not a bound method: the finalizer must not keep the object alive.
        self._finalizer = weakref.finalize(self, _kill_all, self._pool)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers. A later `map` starts new ones."""
        _kill_all(self._pool)

    def map(self, function: str, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """Call the function with each list of arguments; outcomes in the order of `calls`.

        function: "module:name" or "path/to/file.py:name". Arguments and results must be JSON. An interval timer that
        runs (the limit `grpo.rewards.score` sets) stands still meanwhile.

        Raises RuntimeError, with the worker's traceback, where the function cannot be imported."""
        if not calls:
            return []
        with _timer_paused():
            try:
                return self._map(function, calls)
            except BaseException:
                self.close()  # a worker that still computes would answer the next call's question
                raise

    def _map(self, function: str, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        end: float | None = None  # the budget begins with the first call, not with the workers' imports
        while len(self._pool) < self.workers:
            self._pool.append(_Worker())
        while waiting or any(worker.task is not None for worker in self._pool):
            for worker in self._pool:
                if worker.deadline is not None:
                    continue
                if function not in worker.loaded:
                    worker.load(function, self.memory_mb)
                elif waiting:
                    end = end or time.monotonic() + self.budget_s
                    worker.call(function, calls[waiting[0]], self.timeout_s, waiting.popleft())
            for worker, reply in self._replies():
                task, worker.task = worker.task, None
                if task is None:
                    if reply.error:
                        raise RuntimeError(f"the sandbox cannot load {worker.loading!r}: {reply.error}")
                    worker.loaded.add(worker.loading)
                    continue
                outcomes[task] = reply
                if worker.dead:  # its successor imports while the others go on, and after this call returns
                    self._pool.remove(worker)
                    worker.kill()
                    self._pool.append(_Worker())
                    self._pool[-1].load(function, self.memory_mb)
            if end is not None and time.monotonic() > end:
                waiting.clear()
        skipped = Outcome(None, f"not run: the batch had taken {self.budget_s:g} s", skipped=True)
        return [outcome or skipped for outcome in outcomes]

    def _replies(self) -> "list[tuple[_Worker, Outcome]]":
        """Wait for a reply or a deadline. Every worker that is done with what it was asked, one way or the other."""
        asked = {worker: worker.deadline for worker in self._pool if worker.deadline is not None}
        with selectors.DefaultSelector() as selector:
            for worker in asked:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            patience = max(min(asked.values()) - time.monotonic(), 0)
            readable = {key.data for key, _ in selector.select(patience)}
        done = []
        for worker, deadline in asked.items():
            reply = worker.read() if worker in readable else None
            if reply is None and not worker.dead and time.monotonic() >= deadline:
                worker.dead = True
                reply = Outcome(None, f"took more than {self.timeout_s if worker.task is not None else _START_S:g} s")
            elif reply is None and worker.dead:
                reply = Outcome(None, f"ended its worker ({worker.status()})")
            if reply is not None:
                worker.deadline = None
                done.append((worker, reply))
        return done


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self) -> None:
        code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import grpo.sandbox; grpo.sandbox.serve()"
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # a Ctrl-C is the parent's business
        )
        assert self.process.stdin
        assert self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.loaded: set[str] = set()
        self.loading = ""
        self.task: int | None = None
        """index of the call it computes; None while it loads, or is idle"""
        self.deadline: float | None = None
        """of what it was asked; None: idle"""
        self.dead = False
        self.buffer = b""

    def load(self, function: str, memory_mb: int) -> None:
        self.loading = function
        self._ask({"load": function, "memory_mb": memory_mb}, _START_S)

    def call(self, function: str, arguments: Sequence[Any], timeout_s: float, task: int) -> None:
        self.task = task
        self._ask({"function": function, "arguments": arguments, "timeout_s": timeout_s}, timeout_s)

    def _ask(self, message: dict[str, Any], timeout_s: float) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died: the end of its replies says so
            self.requests.write(json.dumps(message).encode() + b"\n")
            self.requests.flush()
        self.deadline = time.monotonic() + timeout_s

    def read(self) -> Outcome | None:
        """The reply if it is whole by now. Sets `dead` at the end of file, and for a reply that is too long."""
        piece = os.read(self.replies.fileno(), 1 << 16)
        self.buffer += piece
        self.dead = not piece or len(self.buffer) > _MAX_REPLY
        if self.dead or not self.buffer.endswith(b"\n"):
            return None
        line, self.buffer = self.buffer, b""
        return Outcome(**json.loads(line))

    def status(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)
        code = self.process.poll()
        return "its reply was too long" if code is None else f"exit status {code}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.replies.close()


def _kill_all(pool: list[_Worker]) -> None:
    while pool:
        pool.pop().kill()


@contextlib.contextmanager
def _timer_paused() -> Iterator[None]:
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


def serve() -> None:
    """A worker's life: read a message, act on it, reply; until the parent closes the pipe."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not look like a reply
    logging.disable(logging.CRITICAL)
    functions: dict[str, Callable[..., Any]] = {}
    for line in sys.stdin.buffer:
        message = json.loads(line)
        value = None
        try:
            if "load" in message:
                _limit_memory(None)
                functions[message["load"]] = _load(message["load"])
                _limit_memory(message["memory_mb"])
            else:
                _limit_time(message["timeout_s"])
                value = functions[message["function"]](*message["arguments"])
            reply = json.dumps({"value": value, "error": ""})
        except BaseException:  # SystemExit as well, and math-verify's own TimeoutException
            reply = json.dumps({"value": None, "error": traceback.format_exc()[-5000:]})
        signal.alarm(0)
        replies.write(reply.encode() + b"\n")
        replies.flush()


def _load(target: str) -> Callable[..., Any]:
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        # As multiprocessing does: under another name than __main__, so that a recipe's main part does not run.
        specification = importlib.util.spec_from_file_location(f"_sandbox_{Path(place).stem}", place)
        if specification is None or specification.loader is None:
            raise ImportError(f"{place} is not a Python file")
        module = importlib.util.module_from_spec(specification)
        sys.modules[specification.name] = module
        specification.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


def _limit_memory(megabytes: int | None) -> None:
    """Limit the address space to what is taken and so much more (None: not). Linux only: not enforced elsewhere."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        wanted = hard if megabytes is None else used + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _limit_time(seconds: float) -> None:
    """Die some seconds after the parent would have killed this process: it may be gone, or stopped."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = usage.ru_utime + usage.ru_stime
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent + seconds) + 5, hard))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whose action is to end the process, also within C code
    signal.alarm(int(seconds) + 5)
