"""What an oracle query costs: sac_ove.py's Simulator.step beside a bare call of mujoco.rollout; and a slope.

    python -m experiments.speed.oracle_query --env-ids HalfCheetah-v5,Hopper-v5 --threads 1 2

A query moves 256 stored states by one environment step: scaled actions, physics, observations, rewards and
terminations. The bare call does the physics alone, from the same states and warm starts with the same
actions, in the same number of threads. A slope is Simulator.differentiate of the first --slopes of these
states, what an actor that looks ahead pays for each imagined step: x + m + 1 queries a state, at once.
Medians of alternating rounds, milliseconds.
"""

import math
import statistics
import sys
import time

import mujoco.rollout
import numpy as np

from experiments.algorithms import load
from experiments.report.commands import Parser, mistake

TASKS = (
    "InvertedPendulum InvertedDoublePendulum Reacher Pusher Swimmer HalfCheetah Hopper Walker2d Ant Humanoid"
)


def measure(env_id: str, batch: int, slopes: int, threads: int, rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of a bare rollout, of a query and of slopes; NaN where bodies turn freely."""
    oracle, rng = load("sac_ove"), np.random.default_rng(0)
    env = oracle.make_env(env_id)
    simulator, rows = oracle.Simulator(env_id, env, threads), []
    if simulator.task is None:
        raise ValueError(f"--env-ids {env_id}: must be tasks with batched formulas")
    env.reset(seed=0)
    while len(rows) < batch:  # every third of random steps
        for _ in range(3):
            step = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
            if step[2] or step[3]:
                env.reset()
        rows.append(simulator.row(env.unwrapped))
    rows, action = np.array(rows), rng.uniform(-1, 1, (batch, *env.action_space.shape)).astype(np.float32)
    model, skip, full = simulator.model, env.unwrapped.frame_skip, simulator.full
    state, warm = rows[:, :full].copy(), rows[:, full : full + model.nv].copy()
    control = np.repeat(simulator.copy.env.func(action)[:, None].astype(float), skip, 1)
    datas = [mujoco.MjData(model) for _ in range(threads)]
    pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
    bare, query, slope = [], [], []
    for _ in range(rounds):
        started = time.perf_counter()
        pool.rollout(model, datas, state, control, nstep=skip, initial_warmstart=warm)
        between = time.perf_counter()
        simulator.step(rows, action)
        bare.append(between - started)
        query.append((after := time.perf_counter()) - between)
        if model.nq == model.nv:
            simulator.differentiate(rows[:slopes], action[:slopes])
            slope.append(time.perf_counter() - after)
    pool.close()
    return tuple(1e3 * statistics.median(times) if times else math.nan for times in (bare, query, slope))


def main() -> int:
    parser = Parser(__doc__)
    every = ",".join(f"{name}-v5" for name in TASKS.split())
    parser.add_argument("--env-ids", default=every, help="comma-separated (default: all with formulas)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--slopes", type=int, default=32, help="states, at most --batch (default: 32)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    for name, value in (("batch", args.batch), ("rounds", args.rounds), ("threads", min(args.threads))):
        if value < 1:
            return mistake(f"--{name} {value}: must be at least 1")
    if not 1 <= args.slopes <= args.batch:
        return mistake(f"--slopes {args.slopes}: must be in [1, {args.batch}], the batch")
    print(f"{'task':>26} {'threads':>8} {'rollout':>9} {'query':>9} {'ratio':>7} {'slope':>9}")
    for env_id in args.env_ids.split(","):
        for threads in args.threads:
            try:
                bare, query, slope = measure(env_id, args.batch, args.slopes, threads, args.rounds)
            except ValueError as error:  # BadInput is one
                return mistake(error)
            times = f"{bare:>9.2f} {query:>9.2f} {query / bare:>7.2f} {slope:>9.2f}"
            print(f"{env_id:>26} {threads:>8} {times}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
