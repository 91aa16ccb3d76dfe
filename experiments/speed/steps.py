"""Environment steps per second of the algorithms' real loops, beside Stable-Baselines3 and SBX.

    python -m experiments.speed.steps                    # sac.py and installed peers, 1 and 2 CPU threads
    python -m experiments.speed.steps --algo td3 ddpg    # beside their TD3 and DDPG
    python -m experiments.speed.steps --algo sac_mve --env-id InvertedPendulum-v5 --peers -- --horizon 3
    python -m experiments.speed.steps --device cuda --algo all    # a GPU: eager, and captured as CUDA graphs
    python -m experiments.speed.steps --device cuda --algo sac --processes 12    # and twelve of them at once

A measurement is a process of its own that runs `python algos/<algo>.py` with a stopwatch in its loop. It
counts as charts/SPS does, without evaluations, and begins when the warm-up is over. Only ratios inside one
table mean something: the same machine can be a third slower a minute later. What follows -- goes to every
file that has the flag. Peers: pip install -e '.[bench]'.

On the CPU: same task, networks (256 x 256), batch (256), one update per step and threads for all, rounds that
alternate between the contestants, and the share of an update that is spent in matrix products, that is, how
far the floor is.

On a GPU every file is measured once with --no-cuda-graphs and once captured, on a task and with flags of its
own (ROWS below; --env-id and what follows -- win); `least` is the ratio to be met. All files are meant to
take eight minutes on an H200. With --processes N so many captured runs are timed over one span, in which all
of them learn: best under NVIDIA's MPS (docs/gpu.md).

Exit code: 1 if a measurement failed (the others are made), 2 for a mistake or a missing device.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from experiments.algorithms import ALGOS, ROOT, has_flag, load, split_flags
from experiments.bench.work import mps_answers
from experiments.report.commands import Parser, at_least, mistake

WORKER = [sys.executable, "-m", "experiments.speed.steps"]
PEERS = {"sb3": "stable_baselines3", "sbx": "sbx"}
LEARNERS = {
    "ddpg": "DDPG",
    "td3": "TD3",
    "ddpg_mve": "DDPG",
    "steve": "DDPG",
    "mage": "TD3",
}  # of a peer; else SAC
COMPARED = ("sac", "ddpg", "td3")  # with their like in the libraries, unless asked otherwise
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
TOTAL = 1_000_000  # nobody gets there: who is measured is stopped


class Row(NamedTuple):
    """What is measured of a file, on a GPU with these flags. PILCO, which plans between trials, has none."""

    env_id: str = "HalfCheetah-v5"
    flags: str = ""  # short warm-ups of models: they cost time and change nothing later
    least: float = 4.0  # captured over eager
    warm_up: int = 500  # random steps
    settle: int = 50  # steps from the first update to the measurement
    captures: int = 0  # more of them until all is captured: what happens once per fit needs four fits
    period: int = 10  # steps that the work repeats itself after: whole periods are measured


ROWS = {
    "sac": Row(least=7.0),
    "sac_mve": Row(flags="--horizon 3 --model-warm-up 20", least=8.0),
    "sac_svg_h": Row("Hopper-v5", "--preset released --horizon 2 --expansion-starts 0", 5.0, warm_up=1024),
    "sac_ove": Row("InvertedPendulum-v5", "--horizon 3 --num-threads 8"),  # its simulator is on the CPU
    "sac_retrace": Row(flags="--horizon 3"),
    "sac_vaml": Row(captures=100, period=25),
    # A fifth of the defaults, that is, as much work per step.
    "mbpo": Row(flags="--model-interval 50 --refit-steps 100 --rollout-batch 2000", captures=150, period=50),
    "maac": Row(flags="--model-interval 50 --refit-steps 100 --rollout-batch 2000", captures=150, period=50),
    "ddpg": Row(),
    "td3": Row(),
    "svg": Row(),
    "ddpg_mve": Row(flags="--horizon 3 --model-warm-up 20"),
    "mage": Row(flags="--model-warm-up 20"),
    "steve": Row(flags="--horizon 3 --model-warm-up 20"),
    "dreamer": Row(flags="--pretrain 1"),  # an update every second step
    "ddpg_mve_min": Row("TorqueBall-v0", "--model-warm-up 20 --model-ready 100", settle=200),  # in cycles
}


def pinned(threads: int, command: list) -> list[str]:
    """The command on as many cores as it has threads."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return ["taskset", "-c", ",".join(map(str, cores)), *map(str, command)]


def say(step: int) -> None:
    """A point on a worker's stdout; the clock is the same in all processes."""
    print(f"@ {step} {time.monotonic()}", flush=True)


def run_ours(algo: str, begin: int, period: int, flags: list[str]) -> None:
    """In a process of its own: the file as from the command line, with points every `period` steps."""
    module = load(algo)
    original = module.RunFolder.steps

    def steps(self, at_once: int = 1):
        due = begin
        for step in original(self, at_once):
            if step >= due:
                say(step)
                due = step + period
            yield step

    module.RunFolder.steps = steps
    sys.argv = [str(ROOT / "algos" / f"{algo}.py"), *flags]
    module.main(getattr(module, "train_episodic", None) or module.train)


def run_peer(peer: str, algo: str, env_id: str, device: str, warm_up: int, begin: int) -> None:
    """In a process of its own: the peer's own learn() after the same warm-up, with points."""
    import gymnasium as gym
    import numpy as np
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps >= begin and self.num_timesteps % Row().period == 0:
                say(self.num_timesteps)
            return True

    learner, options = LEARNERS.get(algo, "SAC"), {"buffer_size": TOTAL // 10}
    if peer == "sb3":
        import stable_baselines3 as library
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        options["device"] = device
    else:
        import sbx as library
    if learner != "SAC":  # ours explores by the same noise
        width = gym.make(env_id).action_space.shape[0]
        options["action_noise"] = NormalActionNoise(np.zeros(width), np.full(width, 0.1))
    sizes = {"learning_starts": warm_up, "batch_size": 256, "policy_kwargs": {"net_arch": [256, 256]}}
    getattr(library, learner)("MlpPolicy", env_id, **sizes, **options).learn(TOTAL, callback=Clock())


def side_by_side(commands: list[list], steps: int, seconds: float, patience: float, threads: int):
    """Steps/s of commands that are started at once, over one span in which all of them learn.

    It is as long as each needs for `steps` steps and `seconds` seconds. Raises RuntimeError with one line for
    a command that ends, or tells no new point for `patience` seconds.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if threads == 1:
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        outputs = [Path(folder, f"{number}.out") for number in range(len(commands))]
        processes = []
        for command, path in zip(commands, outputs, strict=True):
            with open(path, "w") as out, open(path.with_suffix(".err"), "w") as error:
                words = [str(word) for word in command]
                processes.append(subprocess.Popen(words, env=environment, stdout=out, stderr=error))
            stack.callback(stop, processes[-1])
        heard, last = [0] * len(commands), [time.monotonic()] * len(commands)
        while True:
            time.sleep(0.1)
            for process, path in zip(processes, outputs, strict=True):
                if process.poll() is not None:
                    raise RuntimeError(last_words(path.with_suffix(".err")) or f"exit {process.returncode}")
            points = [points_of(path) for path in outputs]
            for number, found in enumerate(points):
                if len(found) != heard[number]:
                    heard[number], last[number] = len(found), time.monotonic()
            if time.monotonic() - min(last) > patience:
                raise RuntimeError(f"no new point within {patience:.0f} s")
            if not all(points):
                continue
            begin = max(found[0][1] for found in points)
            spans = [[point for point in found if point[1] >= begin] for found in points]
            spans = [(s[-1][0] - s[0][0], s[-1][1] - s[0][1]) if s else (0, 0.0) for s in spans]
            if all(done >= steps and took >= seconds for done, took in spans):
                return [done / took for done, took in spans]


def points_of(path: Path) -> list[tuple[int, float]]:
    """(step, moment) of every point that a worker has told."""
    lines = path.read_text(errors="replace").split("\n")[:-1]  # whole ones
    return [(int(x[1]), float(x[2])) for x in map(str.split, lines) if x[:1] == ["@"]]


def last_words(path: Path) -> str:
    """What a process said of its end."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return ["", *lines, *(line for line in lines if line.startswith("error: "))][-1]


def stop(process: subprocess.Popen) -> None:
    """End a worker; our files do so between two steps."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Task(NamedTuple):
    """What is measured, of us and of a peer alike."""

    env_id: str
    device: str
    threads: int
    warm_up: int
    steps: int
    seconds: float
    patience: float

    def ours(self, algo: str, flags: list[str], more: int = 0, processes: int = 1) -> list[float]:
        """Steps/s of each of `processes` runs of the file; measured `more` steps later."""
        own = ROWS.get(algo, Row())
        begin, worker = self.warm_up + own.settle + more, [*WORKER, "--worker", "ours"]
        worker += ["--algo", algo, "--begin", begin, "--period", own.period, "--"]
        worker += ["--env-id", self.env_id, "--learning-starts", self.warm_up, "--device", self.device]
        worker += ["--num-threads", self.threads, "--eval-episodes", 1, "--buffer-size", TOTAL // 10]
        for name in ("total-timesteps", "eval-every", "checkpoint-every"):
            worker += [f"--{name}", TOTAL]
        with tempfile.TemporaryDirectory() as folder:
            commands = [[*worker, "--runs-dir", f"{folder}/{k}", *flags] for k in range(processes)]
            return self.measured(commands)

    def peer(self, peer: str, algo: str) -> list[float]:
        """Steps/s of the peer's learner."""
        worker = [*WORKER, "--worker", peer, "--algo", algo, "--env-id", self.env_id]
        worker += ["--device", self.device, "--warm-up", self.warm_up]
        return self.measured([[*worker, "--begin", self.warm_up + Row().settle]])

    def measured(self, commands: list[list]) -> list[float]:
        if self.device == "cpu":
            commands = [pinned(self.threads, command) for command in commands]
        return side_by_side(commands, self.steps, self.seconds, self.patience, self.threads)


def product_share(algo: str, env_id: str, threads: int, extra: list[str]) -> tuple[float, float]:
    """Milliseconds of one update, and of the matrix products in it, by the profiler over 50 updates."""
    import torch

    module = load(algo)
    args = module.parse(["--env-id", env_id, "--device", "cpu", "--num-threads", str(threads), *extra])
    device, env = module.prepare(args), module.make_env(env_id)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    agent = module.Agent(args, *dims, device)
    buffer = agent.make_buffer(2000, env)
    obs = module.begin_episode(env, agent, 1)
    for _ in range(2000):
        action = 2 * torch.rand(dims[1]).numpy() - 1
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, 0)
        obs = module.begin_episode(env, agent) if terminated or truncated else next_obs
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


def own_flags(algo: str, extra: list[str]) -> list[str]:
    """Of what follows -- the flags that the file has."""
    return [word for group in split_flags(extra) if has_flag(load(algo), group[0]) for word in group]


def tried(what: str, measurement):
    """What measurement() returns, or None if it failed, which is said in one line."""
    try:
        return measurement()
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {what}: {str(error).removeprefix('error: ')}", file=sys.stderr, flush=True)
        return None


def on_cpu(args, algo: str, peers: list[str]) -> bool:
    """The tables of one file; returns whether all went well."""
    extra, well = own_flags(algo, args.extra), []
    in_cycles = algo == "ddpg_mve_min"  # of episodes on goal tasks
    env_id = args.env_id or (ROWS[algo] if in_cycles else Row()).env_id
    warm_up = args.warm_up or Row().warm_up
    title = " ".join([algo, *extra, "on", env_id])
    print(f"{title}, medians of {args.rounds} x {args.steps} steps")
    print(f"{'threads':>8} {'contestant':>12} {'steps/s':>9} {'ours / theirs':>14}   rounds")
    for threads in args.threads:
        task = Task(env_id, "cpu", threads, warm_up, args.steps, args.seconds, patience=900)
        calls = {algo: functools.partial(task.ours, algo, extra)}
        calls |= {peer: functools.partial(task.peer, peer, algo) for peer in peers}
        found = [
            {n: tried(f"{n}, threads: {threads}", c) for n, c in calls.items()} for _ in range(args.rounds)
        ]
        speeds = {name: [speed[name][0] for speed in found if speed[name]] for name in calls}
        well += [len(values) == args.rounds for values in speeds.values()]
        for name, values in speeds.items():
            if values:
                middle, own = statistics.median(values), speeds[algo]
                ratio = f"{statistics.median(own) / middle:.2f}" if own and name != algo else ""
                rounds = " ".join(f"{value:.1f}" for value in values)
                print(f"{threads:>8} {name:>12} {middle:>9.1f} {ratio:>14}   {rounds}", flush=True)
    for threads in args.threads if all(well) and not in_cycles else ():
        share = tried(f"{algo}, an update", functools.partial(product_share, algo, env_id, threads, extra))
        if share:
            part = f"{share[1]:.1f} ms in matrix products ({share[1] / share[0]:.0%})"
            print(f"one update on {threads} threads: {share[0]:.1f} ms, {part}", flush=True)
        well.append(bool(share))
    return all(well)


def on_gpu(args, algo: str, peers: list[str]) -> bool:
    """One line of the table, two with --processes; returns whether all went well."""
    row, extra = ROWS.get(algo, Row()), own_flags(algo, args.extra)
    env_id, flags = args.env_id or row.env_id, [*row.flags.split(), *extra]
    task = Task(env_id, "cuda", 1, args.warm_up or row.warm_up, args.steps, args.seconds, patience=120)
    captured = functools.partial(task.ours, algo, flags, row.captures)
    calls = {"eager": functools.partial(task.ours, algo, [*flags, "--no-cuda-graphs"]), "captured": captured}
    calls |= {peer: functools.partial(task.peer, peer, algo) for peer in peers}
    found = {name: tried(f"{algo}, {name}", call) for name, call in calls.items()}
    eager, alone = found["eager"], found["captured"]
    ratio = f"{alone[0] / eager[0]:.1f}" if alone and eager else ""
    shown = [
        f"{found[name][0]:.1f}" if found.get(name) else "-" for name in ("eager", "captured", *args.peers)
    ]
    line = f"{algo:<13} {env_id:<20} {shown[0]:>8} {shown[1]:>9} {ratio:>6} {row.least:>6.1f}"
    line += "".join(f" {x:>8}" for x in shown[2:]) + f"   {' '.join(flags)}"
    print(line.rstrip(), flush=True)
    if args.processes > 1:
        found["together"] = tried(f"{algo}, together", functools.partial(captured, args.processes))
        if speeds := found["together"]:
            each = f"{min(speeds):.1f} to {max(speeds):.1f} each"
            print(f"{'':<13} {len(speeds)} captured at once: {each}, {sum(speeds):.1f} together", flush=True)
    return all(found.values())


def parse() -> argparse.Namespace:
    """The command's flags."""
    parser = Parser(__doc__)
    parser.add_argument("--algo", nargs="+", default=["sac"], choices=["all", *ALGOS], metavar="FILE",
                        help="files of algos/ to measure, or all (default: sac)")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: cpu)")
    parser.add_argument("--env-id", help="(default: HalfCheetah-v5; on a GPU the file's of ROWS)")
    count, amount = at_least(1), at_least(0, float)
    parser.add_argument("--threads", type=count, nargs="+", default=[1, 2], help="on the CPU (default: 1 2)")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS),
                        help="beside them (default: those installed, beside sac, ddpg and td3)")  # fmt: skip
    parser.add_argument("--processes", type=count, default=1, help="on a GPU: so many at once, too")
    parser.add_argument("--rounds", type=count, default=3, help="on the CPU (default: 3)")
    parser.add_argument(
        "--steps", type=count, help="measured at least, after the warm-up (default: 2000; cuda: 1)"
    )
    parser.add_argument("--seconds", type=amount, help="measured at least (default: 0; cuda: 5)")
    parser.add_argument(
        "--warm-up", type=count, help="random steps before the first update (default: 500 or more)"
    )
    parser.add_argument("--worker", choices=["ours", *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--period", type=int, help=argparse.SUPPRESS)
    parser.add_argument("extra", nargs="*", metavar="-- FLAGS", help="for the algorithms that have them")
    return parser.parse_args()


def check(args: argparse.Namespace) -> list[str]:
    """Fills in what depends on the device; the files to measure. Raises ValueError with one line."""
    cuda = args.device == "cuda"
    defaults = {"steps": 1 if cuda else 2000, "seconds": 5.0 if cuda else 0.0}
    vars(args).update((name, value) for name, value in defaults.items() if getattr(args, name) is None)
    if args.processes > 1 and not cuda:
        raise ValueError(f"--processes {args.processes}: must be with --device cuda")
    if cuda:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: must be cpu here: torch finds no CUDA device")
    every = [name for name in ALGOS if name in ROWS]
    chosen = every if "all" in args.algo else list(dict.fromkeys(args.algo))
    for flag, *_ in split_flags(args.extra):
        if not any(has_flag(load(algo), flag) for algo in chosen):
            raise ValueError(f"{flag}: must be a flag of at least one of {', '.join(chosen)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not cuda and max(args.threads) > cores:
        raise ValueError(f"--threads {max(args.threads)}: must be at most {cores}, the cores there are")
    if cuda and "sbx" in (args.peers or []):
        raise ValueError("--peers sbx: must be left out on a GPU: its JAX would have to be built for it")
    return chosen


def installed_peers(wanted: list[str] | None, chosen: list[str], cuda: bool) -> list[str]:
    """Of the libraries that are asked for, or of all if a file is measured that they have, those that are
    there; says which are not."""
    every = [peer for peer in PEERS if not (cuda and peer == "sbx")]
    peers = (every if set(chosen) & set(COMPARED) else []) if wanted is None else wanted
    needed = {peer: (PEERS[peer], PEERS["sb3"]) for peer in peers}  # SBX is built on Stable-Baselines3
    found = [peer for peer, names in needed.items() if all(map(importlib.util.find_spec, names))]
    for peer in peers:
        if peer not in found:
            print(f"{peer} is not installed: skipped (pip install -e '.[bench]')")
    return found


def main() -> int:
    args = parse()
    if args.worker == "ours":
        run_ours(args.algo[0], args.begin, args.period, args.extra)
        return 0
    if args.worker:
        run_peer(args.worker, args.algo[0], args.env_id, args.device, args.warm_up, args.begin)
        return 0

    cuda, wanted = args.device == "cuda", args.peers
    try:
        chosen = check(args)
    except ValueError as error:
        return mistake(error)
    installed = installed_peers(wanted, chosen, cuda)
    if cuda:
        import torch

        args.peers, sharing = installed, "with" if mps_answers() else "without"
        print(f"steps/s on {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {sharing} MPS")
        head = f"{'file':<13} {'task':<20} {'eager':>8} {'captured':>9} {'ratio':>6} {'least':>6}"
        print(head + "".join(f" {peer:>8}" for peer in installed), flush=True)
    began, measured = time.perf_counter(), on_gpu if cuda else on_cpu
    well = [measured(args, a, installed if wanted or a in COMPARED else []) for a in chosen]
    print(f"took {(time.perf_counter() - began) / 60:.1f} minutes")
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
