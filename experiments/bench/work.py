"""Carries out jobs on this machine, as many at a time as there are workers."""

import collections
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from tqdm import tqdm

from experiments.algorithms import ROOT
from experiments.bench.jobs import Job, continue_or_skip
from experiments.bench.options import PATIENCE


class TimeIsUp(Exception):
    """The launcher's --time-limit has come."""


def take_lock(path: Path):
    """The lock of a run, a context manager that lets go of it; None while somebody else holds it.

    With fcntl it is a file that the run inherits: it is held for as long as the run lives, even if its
    launcher dies. Without, the launcher holds it.
    """
    if fcntl is None:
        from filelock import FileLock, Timeout  # which torch brings

        try:
            return FileLock(path).acquire(timeout=0)
        except Timeout:
            return None
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(path, "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        stack.pop_all()
        return lock


def end(process: subprocess.Popen) -> None:
    """Ask a run to stop, and kill one that does not: it goes on from its last checkpoint either way."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def environment() -> dict[str, str]:
    """This process's without the path to its own package: a run looks where the user stands."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path != str(ROOT))}


def lock_of(job: Job) -> Path:
    """The file that whoever works at the job holds: one for all commands that mean the same run, however they
    are written."""
    wanted = {k: v for k, v in job.wanted.items() if k not in ("runs_dir", "resume", "device")}
    same = json.dumps([job.algo, wanted], sort_keys=True, default=str)
    return job.log.parent / f"{hashlib.sha256(same.encode()).hexdigest()[:16]}.lock"


def run_alone(job: Job, stop=lambda: False, wait: bool = True, env=None, **options) -> int | None:
    """Carry out one job from its last checkpoint, in an environment with `env`; its exit code. While somebody
    else works at it: after them, or, without `wait`, not at all: None.

    Waits are short, so that stop() and Ray, which interrupts between two of them, end the job soon.
    """
    while (lock := take_lock(lock_of(job))) is None:
        if not wait:
            return None
        if stop():
            return -signal.SIGTERM
        time.sleep(0.1)
    with lock, open(job.log, "ab") as log:
        continue_or_skip(job)
        if job.state == "finished":
            return 0
        log.write(os.fsencode(f"$ {shlex.join(job.command)}\n"))
        log.flush()
        options |= {"stdout": log, "stderr": log, "cwd": job.cwd, "env": environment() | (env or {})}
        options |= {"pass_fds": [lock.fileno()]} if fcntl else {}
        process = subprocess.Popen(job.command, **options)
        try:
            while process.poll() is None and not stop():
                time.sleep(0.1)
        finally:
            end(process)
        return process.wait()


def settle(job: Job, code: int, seconds: float) -> None:
    """Note how a job ended, and say so."""
    job.outcome, job.seconds = "done" if code == 0 else f"exit code {code}", seconds
    if code:
        tqdm.write(f"FAILED  {job.name} ({job.outcome}, {seconds:.0f} s): {job.log}")
    else:
        tqdm.write(f"done    {job.name} ({seconds:.0f} s)")


def steps_done(log: Path) -> int:
    """The step on the progress bar that a run last wrote to its log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            found = re.findall(rb" (\d+)/\d+ \[", file.read(2000))
    except OSError:
        return 0
    return int(found[-1]) if found else 0


class Progress:
    """A bar over all steps and, on a terminal, one for each run under way, with steps/s and time left."""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.bars = jobs, {}
        self.whole = tqdm(total=sum(job.steps for job in jobs), unit="step", unit_scale=True)

    def show(self, running: set[str]) -> None:
        done = 0
        for job in self.jobs:
            if job.outcome or job.name not in running:
                done += job.steps if job.outcome else 0
                if bar := self.bars.pop(job.name, None):
                    bar.close()
                continue
            step = steps_done(job.log)
            done += step
            if job.name not in self.bars and sys.stderr.isatty():
                free = min(set(range(1, 2 + len(self.bars))) - {-b.pos for b in self.bars.values()})
                look = {"desc": job.name[-40:], "position": free, "leave": False, "unit": "step"}
                self.bars[job.name] = tqdm(total=job.steps, initial=step, **look)
            if bar := self.bars.get(job.name):
                bar.n = step
                bar.refresh()
        ended = [job for job in self.jobs if job.outcome]
        failed = sum(job.outcome != "done" for job in ended)
        self.whole.n = done
        self.whole.set_postfix_str(f"{len(ended)}/{len(self.jobs)} runs, {failed} failed", refresh=False)
        self.whole.refresh()

    def close(self) -> None:
        for bar in (*self.bars.values(), self.whole):
            bar.close()


def execute(jobs: list[Job], workers: int, until: float = math.inf) -> None:
    """Run the jobs on this machine, `workers` at a time; each gets its outcome. What somebody else works at
    comes last, when they are done.

    Raises TimeIsUp at `until` (of time.monotonic), when all have been stopped.
    """
    left, running, stopping = collections.deque(jobs), [], False

    def work() -> None:
        while not stopping:
            try:
                job = left.popleft()
            except IndexError:  # the rest is under way
                return
            begun = time.monotonic()
            running.append(job.name)
            try:
                code = run_alone(job, lambda: stopping, wait=False)
            except OSError as error:  # a full disk, say
                tqdm.write(f"{job.name}: {error}")
                code = -1
            running.remove(job.name)
            if code is None:
                left.append(job)
                time.sleep(0.1)
            elif not stopping:
                settle(job, code, time.monotonic() - begun)

    progress = Progress(jobs)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        try:
            while not all(future.done() for future in futures):
                progress.show(set(running))
                if time.monotonic() > until:
                    raise TimeIsUp
                time.sleep(0.5)
        except (KeyboardInterrupt, SystemExit, TimeIsUp):
            stopping = True
            raise
        finally:
            progress.close()
    for future in futures:  # an exception in the launcher itself must not pass for success
        future.result()


def mps_answers() -> bool:
    """Whether NVIDIA's Multi-Process Service runs here: without it processes take turns on a GPU."""
    asked = {"input": "get_server_list\n", "capture_output": True, "text": True, "timeout": 10}
    try:
        answer = subprocess.run(["nvidia-cuda-mps-control"], **asked)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "Cannot find" not in answer.stdout + answer.stderr
