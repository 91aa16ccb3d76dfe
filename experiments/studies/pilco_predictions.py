"""What a finished run of PILCO believes about the next episode, and what then happens.

    python -m experiments.studies.pilco_predictions runs/<run> --figure predictions.png
    python -m experiments.studies.pilco_predictions runs/<run> --trials trials.csv   # what each did

Prediction: mean and two deviations of every observation and of the cost over the horizon of the last plan, by
exact moment matching from the start belief. Real: episodes of the policy from the task's own resets, seed
1 000 on, and the share of their observations within the two deviations. A belief without model error has
about 95 % there.

The table has a row for each training episode, `success` being the first after the random one that ends with a
reward of at least 0.95 (of the cart-pole: the pole stands), or one more than there were. A minute. Figure:
the extra `bench`.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import torch

from experiments.algorithms import ROOT
from experiments.report.commands import Parser, at_least, check_output, mistake
from experiments.report.pictures import clean, legend_below, pyplot, save
from experiments.report.tables import read_table, write_table

FIELDS = ["env_id", "seed", "episode", "steps", "return", "cost", "last_reward", "success"]


def load_pilco():
    """algos/pilco.py as a module."""
    spec = importlib.util.spec_from_file_location("pilco", ROOT / "algos" / "pilco.py")
    sys.modules["pilco"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pilco"])
    return sys.modules["pilco"]


def predicted(agent, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations [H + 1, n + 1] of the observation and, in the last column, the cost (NaN at 0)."""
    with torch.no_grad():
        means, covs, costs = agent.beliefs(horizon, agent.processes.posterior())
    deviations = covs.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    costs = torch.cat([torch.full((1, 2), torch.nan, dtype=costs.dtype), costs])
    last = costs[:, 1:].clamp_min(0).sqrt()
    return torch.cat([means, costs[:, :1]], 1).numpy(), torch.cat([deviations, last], 1).numpy()


def played(module, agent, args, horizon: int, episodes: int, seed: int) -> np.ndarray:
    """Observations and costs [episodes, H + 1, n + 1] of the policy, NaN after an episode's end."""
    env = module.make_env(args.env_id, args.env_kwargs)
    found = np.full((episodes, horizon + 1, agent.sizes[0] + 1), np.nan)
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        found[episode, 0, :-1] = obs
        for h in range(1, horizon + 1):
            obs, _, terminated, truncated, _ = env.step(agent.act(obs, True))
            found[episode, h, :-1] = obs
            if terminated or truncated:
                break
    env.close()
    z = (
        module.features_of(torch.from_numpy(found[..., :-1]).flatten(0, 1), agent.problem.angles)
        - agent.problem.target
    )
    cost = 1 - (-0.5 * (z @ agent.problem.weights * z).sum(1)).exp()
    found[:, 1:, -1] = cost.view(episodes, -1)[:, 1:].numpy()
    return found


def within(real: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Share of the real numbers [episodes, H, n] within two deviations of their mean [H, n]: [n]."""
    inside = np.where(np.isnan(real), np.nan, np.abs(real - mean) <= 2 * deviation)
    return np.nanmean(inside, (0, 1))


def trials_of(module, run: Path, agent, args) -> list[dict]:
    """The rows (FIELDS) of all episodes in a run's replay; the cost is that of the first H steps."""
    state = torch.load(run / "final.pt", weights_only=True)["buffer"]
    n, m = agent.sizes
    rows, episode = state["rows"], state["episode"]
    buffer = module.ReplayBuffer(len(rows), n, m, torch.device("cpu"))
    buffer.load_state_dict(state)
    found = []
    for number in episode.unique().tolist():
        mine = rows[episode == number]
        cost = agent.recorded_cost(buffer, torch.tensor(number)).item()
        row = {"env_id": args.env_id, "seed": args.seed, "episode": number, "steps": len(mine)}
        row |= {"return": round(mine[:, n + m].sum().item(), 4), "cost": round(cost, 4)}
        found.append(row | {"last_reward": round(mine[-1, n + m].item(), 4)})
    upright = [row["episode"] for row in found if row["episode"] and row["last_reward"] >= 0.95]
    return [row | {"success": upright[0] if upright else len(found)} for row in found]


def add(rows: list[dict], path: Path) -> None:
    """The rows in a table, in the place of those of the same task and seed. ValueError for a foreign one."""
    run = [str(rows[0][name]) for name in FIELDS[:2]]
    found = read_table(path, FIELDS, "--trials")
    kept = [row for row in found if [row[name] for name in FIELDS[:2]] != run]
    try:
        write_table(path, FIELDS, [*kept, *rows])
    except OSError as error:
        raise ValueError(f"--trials {path}: must be a file that can be written: {error}") from error


def plot(real: np.ndarray, mean: np.ndarray, deviation: np.ndarray, names: list[str], out: Path) -> None:
    plt = pyplot()
    columns = len(names)
    figure, axes = plt.subplots(1, columns, figsize=(2.7 * columns, 2.6), layout="constrained")
    steps = np.arange(len(mean))
    for k, (name, axis) in enumerate(zip(names, axes, strict=True)):
        low, high = mean[:, k] - 2 * deviation[:, k], mean[:, k] + 2 * deviation[:, k]
        axis.fill_between(
            steps, low, high, color="#0072B2", alpha=0.25, lw=0, label="predicted, two deviations"
        )
        axis.plot(steps, mean[:, k], color="#0072B2", lw=1.5)
        for episode in real:
            axis.plot(steps, episode[:, k], color="#D55E00", lw=0.7, alpha=0.7, label="real episodes")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        clean(axis)
    legend_below(figure, 2)
    save(figure, out)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of algos/pilco.py")
    parser.add_argument("--episodes", type=at_least(1), default=20, help="real ones")
    parser.add_argument(
        "--seed", type=int, default=1_000, help="of the first real one; the next has the next"
    )
    parser.add_argument("--names", default="", help="of the observations, separated by commas")
    parser.add_argument("--figure", type=Path, help="file to draw to")
    parser.add_argument("--trials", type=Path, help="table to add what each training episode did to")
    args = parser.parse_args()
    module = load_pilco()
    sys.path += [os.getcwd(), str(ROOT)]  # --env-id package.module:Name-v0 finds modules there
    try:
        agent, settings = module.load(args.run)
        if not agent.processes.count:
            raise ValueError(f"{args.run}: must be a run that has planned")
        names = [name for name in args.names.split(",") if name] or [f"s{i}" for i in range(agent.sizes[0])]
        if len(names) != agent.sizes[0]:
            raise ValueError(f"--names {args.names}: must be {agent.sizes[0]} names")
        if args.trials and not (args.run / "final.pt").exists():
            raise ValueError(f"{args.run}: must be a finished run, with its final.pt")
        check_output(args.trials, "--trials")
        check_output(args.figure, "--figure")
        if args.trials:
            add(trials_of(module, args.run, agent, settings), args.trials)
        real = played(module, agent, settings, settings.horizon, args.episodes, args.seed)
    except ValueError as error:
        return mistake(error)
    mean, deviation = predicted(agent, settings.horizon)
    inside = within(real[:, 1:, :-1], mean[1:, :-1], deviation[1:, :-1])
    print(f"within two deviations, {args.episodes} episodes of {settings.horizon} steps: ", end="")
    print(", ".join(f"{name} {share:.0%}" for name, share in zip(names, inside, strict=True)))
    lost = np.nan_to_num(real[:, 1:, -1], nan=1.0).sum(1)
    spread = f"{lost.mean():.2f} ± {lost.std():.2f} (lowest {lost.min():.2f}, highest {lost.max():.2f})"
    print(f"cost: predicted {np.nansum(mean[:, -1]):.2f}, real {spread}")
    if args.figure:
        plot(real, mean, deviation, [*names, "cost"], args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
