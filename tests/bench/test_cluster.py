"""benchmark.sh --ray on a real cluster of three nodes on this machine, one of which is killed."""

import os
import subprocess
import sys
import time

import pytest

from experiments.bench.cluster import task
from experiments.bench.jobs import plan
from tests.conftest import ROOT, TINY, differing, long, run

pytest.importorskip("ray")
QUICK = {
    "health_check_initial_delay_ms": 1_000,
    "health_check_period_ms": 1_000,
    "health_check_failure_threshold": 3,
}
FLAGS = [word for name, value in (TINY | {"total-timesteps": 900, "checkpoint-every": 50}).items()
         if name not in ("env-id", "num-threads") for word in (f"--{name}", str(value))]  # fmt: skip


@pytest.fixture
def cluster(monkeypatch):
    """A head that runs nothing and two nodes that run one task each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # else other tests starve the runs
    head = {"num_cpus": 0, "_system_config": QUICK, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster
    cluster.shutdown()


def start(cluster, runs_dir, seeds: str, *flags: object, extra=(), cwd="/") -> subprocess.Popen:
    command = [ROOT / "benchmark.sh", "--ray", cluster.address, "--memory", 0.1, "--runs-dir", runs_dir]
    command += ["--algos", "sac", "--env-ids", "tests.tasks:Cliff-v0", "--seeds", seeds, *flags]
    command += ["--", *FLAGS, *extra[1:]]
    environment = {**os.environ, "PYTHON": sys.executable}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), env=environment, cwd=cwd, **pipes)


def both_begun(process, runs_dir, limit: float = 120) -> None:
    """Wait until both nodes have a run under way, each with a checkpoint that it has replaced."""
    deadline = time.monotonic() + limit
    while True:
        folders = [path.parent for path in runs_dir.glob("*/args.json")]
        running = [path for path in folders if not (path / "final.pt").exists()]
        if len(running) == 2 and all((path / "checkpoint.previous.pt").exists() for path in running):
            return
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@long
def test_a_node_dies_and_nothing_is_lost(cluster, tmp_path):
    """Six runs on two nodes, one killed in the middle: all complete, none twice, the same bits as without.

    Their task is one of the folder in which the launcher was started.
    """
    here, runs = tmp_path / "here", tmp_path / "runs"
    here.mkdir()
    (here / "odd_tasks.py").write_text("import tests.tasks")
    process = start(cluster, runs, "1,2,3,4,5,6", "--env-ids", "odd_tasks:Cliff-v0", cwd=here)
    both_begun(process, runs)  # whichever node dies, what it runs can be resumed
    cluster.remove_node(cluster.nodes[0], allow_graceful=False)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, out + error
    assert "6 runs, 6 complete, 0 failed" in out
    folders = [path for path in runs.iterdir() if path.name != "logs"]
    assert len(folders) == 6 and all((folder / "final.pt").exists() for folder in folders)
    for seed in (1, 2, 6):
        (folder,) = (path for path in folders if f"__sac__{seed}__" in path.name)
        alone = run("sac", runs / "alone", "--seed", seed, *FLAGS)
        assert differing(alone / "final.pt", folder / "final.pt", "/args/env_id") == []
    logs = [path.read_text() for path in (runs / "logs").glob("*.log")]
    starts = sum(text.count("$ ") for text in logs)
    assert starts >= 7 and sum("--resume" in text for text in logs) >= 1  # what the dead node had was resumed


@long
def test_stopping_leaves_the_cluster_clean(cluster, tmp_path):
    """SIGINT ends the runs with a checkpoint and frees what they held; the same command goes on.

    A failing run does not stop the others.
    """
    import ray

    longer = ["--", "--total-timesteps", 5_000]
    process = start(cluster, tmp_path, "1,2,3", extra=longer)
    both_begun(process, tmp_path)
    process.send_signal(2)
    process.communicate(timeout=120)
    assert process.returncode == 130
    ray.init(address=cluster.address, log_to_driver=False)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2
    ray.shutdown()
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).returncode == 1
    tasks = ["--env-ids", "tests.tasks:Cliff-v0,tests.tasks:LateNan-v0"]
    process = start(cluster, tmp_path, "1,2", *tasks, extra=longer)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 1 and out.count("resumed") >= 1, error
    assert "4 runs, 2 complete, 2 failed" in out and "LateNan" in error


@pytest.mark.parametrize(("gpus", "seen"), [(False, ""), (True, "0,1")])
def test_a_run_without_a_gpu_of_its_own_sees_none(gpus, seen, tmp_path, monkeypatch):
    """Where Ray leaves all of a machine's GPUs in sight."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (job,) = plan(["sac"], ["Pendulum-v1"], ["1"], str(tmp_path), 1, [])
    job.command = [sys.executable, "-c", "import os; print('seen', repr(os.environ['CUDA_VISIBLE_DEVICES']))"]
    job.log.parent.mkdir()
    assert task(job, gpus) == 0 and f"seen {seen!r}" in job.log.read_text()


def test_no_cluster_is_one_line(tmp_path):
    command = [ROOT / "benchmark.sh", "--ray", "127.0.0.1:1", "--algos", "sac", "--seeds", "1"]
    command += ["--runs-dir", tmp_path / "runs"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "error: --ray 127.0.0.1:1: must be auto or the address"
    )
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()
