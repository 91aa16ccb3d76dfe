"""Stable-Baselines3's SAC under our budget and evaluation protocol.

    python -m experiments.bench.sb3_sac --env-id HalfCheetah-v5 --seed 1 --total-timesteps 50_000

Its own defaults otherwise (3e-4, batch 256, 256 x 256, one update per step). Writes the eval.csv of our
files: deterministic policy, 10 episodes, a task of its own from seed + 100. Needs pip install -e '.[bench]'.
"""

import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

from experiments.report.commands import mistake, needs
from experiments.report.reading import folder_of


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """Gymnasium id."""
    seed: int = 1
    """Seed of agent and task."""
    total_timesteps: int = 50_000
    """Environment steps."""
    learning_starts: int = 5_000
    """Random actions before the first update."""
    eval_every: int = 5_000
    """Steps between evaluations."""
    eval_episodes: int = 10
    """Episodes per evaluation."""
    num_threads: int = 1
    """CPU threads of PyTorch."""
    runs_dir: str = "runs"
    """Parent of the run folder."""


def evaluate(model, args: Args) -> tuple[float, float, float]:
    """Mean and deviation of the return, mean length."""
    env, returns, lengths = gym.make(args.env_id), np.zeros(args.eval_episodes), np.zeros(args.eval_episodes)
    for episode in range(args.eval_episodes):
        obs, done = env.reset(seed=None if episode else args.seed + 100)[0], False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(model.predict(obs, deterministic=True)[0])
            returns[episode] += reward
            lengths[episode] += 1
            done = terminated or truncated
    return returns.mean(), returns.std(), lengths.mean()


def main(args: Args) -> None:
    from stable_baselines3 import SAC

    torch.set_num_threads(args.num_threads)
    model = SAC("MlpPolicy", args.env_id, learning_starts=args.learning_starts, seed=args.seed, device="cpu")
    name = f"{folder_of(args.env_id)}__sb3_sac__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = Path(args.runs_dir) / name
    folder.mkdir(parents=True)
    started, part = time.perf_counter(), folder / "eval.csv.part"  # an eval.csv is one of a complete run
    with open(part, "w") as file:
        file.write("step,return_mean,return_std,length_mean,episodes,seconds\n")
        for step in [*range(0, args.total_timesteps, args.eval_every), args.total_timesteps]:
            if step:
                model.learn(step - model.num_timesteps, reset_num_timesteps=False)
            mean, std, length = evaluate(model, args)
            seconds = time.perf_counter() - started
            file.write(f"{step},{mean},{std},{length},{args.eval_episodes},{seconds:.2f}\n")
            file.flush()
            print(f"step {step:>8}  evaluation return {mean:9.2f} ± {std:.2f}", flush=True)
    part.rename(folder / "eval.csv")


def checked(args: Args) -> int:
    """main, its mistakes as one line and exit code 2."""
    try:
        needs("stable_baselines3")
        for name in ("total_timesteps", "eval_every", "eval_episodes", "num_threads"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
        try:
            gym.make(args.env_id).close()
        except Exception as error:  # of a task that is not ours anything may come
            raise ValueError(f"--env-id {args.env_id}: must be a task that can be made: {error}") from None
    except ValueError as error:
        return mistake(error)
    main(args)
    return 0


if __name__ == "__main__":
    sys.exit(checked(tyro.cli(Args, description=__doc__)))
