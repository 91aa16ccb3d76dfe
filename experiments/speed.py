"""Environment steps per second of an algorithm's real loop, beside Stable-Baselines3 and SBX.

    python experiments/speed.py                       # sac.py and installed peers, 1 and 2 threads
    python experiments/speed.py --algo td3            # beside their TD3; ddpg beside their DDPG
    python experiments/speed.py --algo sac_mve --env-id InvertedPendulum-v5 --peers -- --horizon 3

Same task, networks (256 x 256), batch (256), one update per step and threads for all. Each measurement is a
process of its own and rounds alternate between the contestants: only ratios inside one table mean something,
the same machine can be a third slower a minute later. Also printed: the share of an update that is spent in
matrix products, that is, how far the floor is. Peers: pip install -e '.[bench]'.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"sb3": "stable_baselines3", "sbx": "sbx"}
LEARNERS = {"ddpg": "DDPG", "td3": "TD3", "ddpg_mve": "DDPG", "mage": "TD3"}  # of a peer; else SAC
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def load(algo: str):
    """The module algos/<algo>.py."""
    spec = importlib.util.spec_from_file_location(algo, ROOT / "algos" / f"{algo}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[algo] = module
    spec.loader.exec_module(module)
    return module


def pinned(threads: int, command: list) -> list[str]:
    """The command on as many cores as it has threads."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return ["taskset", "-c", ",".join(map(str, cores)), *map(str, command)]


def measure_ours(algo: str, env_id: str, threads: int, warm_up: int, steps: int, extra: list[str]) -> float:
    """Steps/s of `python algos/<algo>.py` after its warm-up, from the charts/SPS it logs itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    total, every = warm_up + 200 + steps, 100
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "algos" / f"{algo}.py"),
            "--env-id",
            env_id,
            "--runs-dir",
            folder,
        ]
        command += [
            "--total-timesteps",
            total,
            "--learning-starts",
            warm_up,
            "--eval-every",
            total,
            "--log-every",
            every,
        ]
        command += ["--eval-episodes", 1, "--num-threads", threads, "--device", "cpu", *extra]
        subprocess.run(pinned(threads, command), check=True, capture_output=True)
        events = EventAccumulator(str(next(Path(folder).iterdir())))
        events.Reload()
        points = [e.value for e in events.Scalars("charts/SPS") if e.step > warm_up + 200]
    return every * len(points) / sum(every / value for value in points)


def measure_peer(peer: str, algo: str, env_id: str, threads: int, warm_up: int, steps: int) -> float:
    """Steps/s of the peer's own learn() after the same warm-up, in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        peer,
        "--algo",
        algo,
        "--env-id",
        env_id,
        "--steps",
        steps,
        "--warm-up",
        warm_up,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if threads == 1:
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    run = subprocess.run(
        pinned(threads, command), env=environment, check=True, capture_output=True, text=True
    )
    return float(run.stdout.split()[-1])


def worker(peer: str, algo: str, env_id: str, warm_up: int, steps: int) -> None:
    """Runs inside measure_peer's process: prints steps/s."""
    import gymnasium as gym
    import numpy as np
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise

    class Clock(BaseCallback):
        started = 0.0

        def _on_step(self) -> bool:
            if self.num_timesteps == warm_up + 200:
                self.started = time.perf_counter()
            return True

    learner, options = LEARNERS.get(algo, "SAC"), {}
    if peer == "sb3":
        import stable_baselines3 as library
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        options = {"device": "cpu"}
    else:
        import sbx as library
    if learner != "SAC":  # ours explores by the same noise
        width = gym.make(env_id).action_space.shape[0]
        options["action_noise"] = NormalActionNoise(np.zeros(width), np.full(width, 0.1))
    clock = Clock()
    model = getattr(library, learner)(
        "MlpPolicy",
        env_id,
        learning_starts=warm_up,
        batch_size=256,
        policy_kwargs={"net_arch": [256, 256]},
        **options,
    )
    model.learn(warm_up + 200 + steps, callback=clock)
    print(steps / (time.perf_counter() - clock.started))


def product_share(algo: str, env_id: str, threads: int, extra: list[str]) -> tuple[float, float]:
    """Milliseconds of one update, and of the matrix products in it, by the profiler over 50 updates."""
    module = load(algo)  # before torch: what it sets for torch's threads counts here too
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    args = module.parse(["--env-id", env_id, "--device", "cpu", *extra])
    env = module.make_env(env_id)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    agent = module.Agent(args, *dims, torch.device("cpu"))
    buffer = agent.make_buffer(2000, env)
    obs, _ = env.reset(seed=1)
    for _ in range(2000):
        action = 2 * torch.rand(dims[1]).numpy() - 1
        next_obs, reward, terminated, truncated = module.take_step(env, action, 0)
        buffer.add(obs, action, reward, next_obs, terminated, 0)
        obs = env.reset()[0] if terminated or truncated else next_obs
    for step in range(1, 21):
        agent.update(buffer, step)
    started = time.perf_counter()
    for step in range(21, 71):
        agent.update(buffer, step)
    milliseconds = (time.perf_counter() - started) / 50 * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for step in range(71, 121):
            agent.update(buffer, step)
    products = (
        sum(event.self_cpu_time_total for event in profile.key_averages() if event.key in PRODUCTS) / 50 / 1e3
    )
    return milliseconds, products


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    algos = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
    parser.add_argument("--algo", default="sac", choices=algos, help="file of algos/ to measure")
    parser.add_argument("--env-id", default="HalfCheetah-v5")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000, help="measured steps per round, after the warm-up")
    parser.add_argument("--warm-up", type=int, default=500, help="random steps before the first update")
    parser.add_argument("--worker", choices=list(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("extra", nargs="*", help="after --: arguments for the algorithm")
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.algo, args.env_id, args.warm_up, args.steps)

    peers = [peer for peer in args.peers if importlib.util.find_spec(PEERS[peer])]
    for peer in set(args.peers) - set(peers):
        print(f"{peer} is not installed: skipped (pip install -e '.[bench]')")
    print(
        f"{args.algo} {' '.join(args.extra)} on {args.env_id}, medians of {args.rounds} x {args.steps} steps"
    )
    print(f"{'threads':>8} {'contestant':>12} {'steps/s':>9} {'ours / theirs':>14}   rounds")
    for threads in args.threads:
        speeds: dict[str, list[float]] = {name: [] for name in [args.algo, *peers]}
        for _ in range(args.rounds):
            for name, values in speeds.items():
                sizes = (args.env_id, threads, args.warm_up, args.steps)
                peer = name in PEERS
                speed = (
                    measure_peer(name, args.algo, *sizes) if peer else measure_ours(name, *sizes, args.extra)
                )
                values.append(speed)
        ours = statistics.median(speeds[args.algo])
        for name, values in speeds.items():
            ratio = "" if name == args.algo else f"{ours / statistics.median(values):.2f}"
            rounds = " ".join(f"{value:.1f}" for value in values)
            print(
                f"{threads:>8} {name:>12} {statistics.median(values):>9.1f} {ratio:>14}   {rounds}",
                flush=True,
            )
    for threads in args.threads:
        milliseconds, products = product_share(args.algo, args.env_id, threads, args.extra)
        share = f"{products:.1f} ms in matrix products ({products / milliseconds:.0%})"
        print(f"one update on {threads} threads: {milliseconds:.1f} ms, {share}")


if __name__ == "__main__":
    main()
