"""The back end of benchmark.sh --ray: runs as tasks of a Ray cluster (docs/cluster.md). Extra `cluster`.

Every task carries out one job as this machine would: it finds the run's folder, which all nodes share, and
goes on from its last checkpoint. When a node or its worker dies Ray starts the task again on another; the run
that it left behind is told to stop, and holds a lock until it has.
"""

import ctypes
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path

from experiments.algorithms import ROOT
from experiments.bench.jobs import Job
from experiments.bench.options import PATIENCE
from experiments.bench.work import Progress, TimeIsUp, run_alone, settle

STOPPING = 2 * PATIENCE  # seconds that all runs of the cluster have to stop in


def end_with_parent() -> None:
    """In a new process on Linux: ask for SIGTERM when the process that started it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


def connect(address: str) -> None:
    """Join the cluster at `address`, or with auto the machine's. Raises ValueError if there is none."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its future default; `task` sees to it
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal() and "/" not in host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        job = ray.job_config.JobConfig(code_search_path=[str(ROOT)])  # where all nodes have this package
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", job_config=job)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--ray {address}: must be auto or the address of a running cluster: {why}"
        ) from None


def task(job: Job, sees_gpus: bool) -> int:
    """What a node does: one job; the run ends with the worker that began it. Ray shows one that reserved no
    GPU all of them."""
    options = {"preexec_fn": end_with_parent} if sys.platform == "linux" else {}
    return run_alone(job, env={} if sees_gpus else {"CUDA_VISIBLE_DEVICES": ""}, **options)


def execute_on_ray(jobs: list[Job], needs: dict, retries: int, until: float = math.inf) -> None:
    """Run the jobs on the connected cluster, as many at a time as fit; each gets its outcome.

    needs: num_cpus, memory in bytes and num_gpus of each run. No task stays there, whatever happens. Raises
    TimeIsUp at `until` (of time.monotonic).
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    amounts = {"CPU": needs["num_cpus"], "memory": needs["memory"], "GPU": needs["num_gpus"]}
    if not any(all(machine.get(k, 0) >= amount for k, amount in amounts.items()) for machine in machines):
        asked = ", ".join(f"{k} {amount:g}" for k, amount in amounts.items() if amount)
        print(f"no machine of the cluster has {asked}: the runs wait for one; Ctrl-C stops", file=sys.stderr)
    remote = ray.remote(max_retries=retries, **needs)(task)
    progress, begun, started = Progress(jobs), time.monotonic(), {}
    sizes = {job.name: size(job.log) for job in jobs}
    pending = {remote.remote(job, needs["num_gpus"] > 0): job for job in jobs}
    signals, told = (signal.SIGINT, signal.SIGTERM), []  # noted: raised in a callback of Ray's one is lost
    before = [signal.signal(number, lambda number, _: told.append(number)) for number in signals]
    try:
        while pending:
            ended, _ = ray.wait(list(pending), timeout=0.5)
            if told:
                raise KeyboardInterrupt if told[0] == signal.SIGINT else SystemExit(128 + told[0])
            for job in jobs:  # on the shared folder its log says that a task has begun
                if job.name not in started and size(job.log) > sizes[job.name]:
                    started[job.name] = time.monotonic()
            for ref in ended:
                job = pending.pop(ref)
                try:
                    code = ray.get(ref)
                except ray.exceptions.RayError as error:
                    note(job, error)
                    code = -1
                settle(job, code, time.monotonic() - started.get(job.name, begun))
            progress.show({job.name for job in pending.values()} & set(started))
            if pending and time.monotonic() > until:
                raise TimeIsUp
    finally:
        for number, handler in zip(signals, before, strict=True):  # once more stops at once
            signal.signal(number, handler)
        for ref in pending:
            ray.cancel(ref)
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=STOPPING)
        progress.close()
        ray.shutdown()


def size(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def note(job: Job, error: Exception) -> None:
    """Write what Ray says of a task it gave up into the run's log, and its first line to the screen."""
    from tqdm import tqdm

    with open(job.log, "a") as log:
        log.write(f"{error}\n")
    tqdm.write(f"{job.name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
