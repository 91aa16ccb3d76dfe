"""A model that looks perfect and drifts: k-step errors of one-step and of multi-step losses (Botev 2018).

    python -m experiments.studies.compounding_error --csv error.csv --figure error.png
    python -m experiments.studies.compounding_error --tasks TorqueBall-v0 --loss-steps 1,2,5,10,20

Episodes of uniformly random actions are recorded; a tenth of them is held out. On the others the ensemble of
ddpg_mve_min.py is trained with its loss (7) for each L of --loss-steps: every variant takes as many gradient
steps, and sees as many transitions in each, 1 280 / L windows. Predictions run for --horizon steps
under the recorded actions of held-out windows, each member by itself; an error is the root of the mean square
in deviations of the observation, `median` that of its values by window (a wall, hit in few of them, rules the
mean), and `unexplained` the error of the change since the window's start, as a share of that change's own (1:
as good as predicting no change). Interrupted, the same command goes on from what is in --csv. Extra `bench`
for the figure.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, optim
from tqdm import tqdm

from experiments.algorithms import load
from experiments.report.commands import Parser, at_least, check_output, mistake, numbers
from experiments.report.pictures import COLOURS, clean, draw, legend_below, pyplot, save
from experiments.report.tables import read_table, write_table

SETTINGS = "transitions,updates,members,hidden,horizon".split(",")  # one table, one set of these
FIELDS = [*SETTINGS, *"task,seed,loss_steps,k,error,median,unexplained".split(",")]
SHOWN = 1_280  # transitions per member and gradient step


def record(module, env_id: str, transitions: int, seed: int):
    """A replay of random episodes, cut to the shortest one's length where tasks end them."""
    env = gym.make(env_id, disable_env_checker=True)
    rng, episodes, count = np.random.default_rng(seed), [], 0
    flat = lambda obs: obs["observation"] if isinstance(obs, dict) else obs
    low, high = env.action_space.low, env.action_space.high
    while count < transitions:
        rows, done = [flat(env.reset(seed=seed if not episodes else None)[0])], False
        actions = []
        while not done:
            action = rng.uniform(-1, 1, env.action_space.shape)
            obs, _, terminated, truncated, _ = env.step(low + (action + 1) * (high - low) / 2)
            rows.append(flat(obs))
            actions.append(action)
            done = terminated or truncated
        episodes.append([np.array(x, np.float32) for x in (rows, actions)])
        count += len(actions)
    env.close()
    length = min(len(actions) for _, actions in episodes)
    obs, action = (torch.as_tensor(np.stack([e[i][: length + (i == 0)] for e in episodes])) for i in range(2))
    task = module.GoalTask(obs.shape[2], 1, action.shape[2], length, [0], 0.0, False, [])
    replay = module.EpisodeReplay(len(obs) * length, task, 1, 0, torch.device("cpu"))
    replay.add(obs, action, torch.zeros(len(obs), 1))
    return replay


def fit(module, replay, loss_steps: int, args: argparse.Namespace, bar: tqdm):
    """A DynamicsEnsemble trained with the loss of `loss_steps` steps."""
    train = replay.training()
    model = module.DynamicsEnsemble(args.members, replay.task, 4, args.hidden)
    model.observe(replay.obs[train])
    optimizer = optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in range(args.updates):
        obs, action = replay.windows((args.members, max(1, SHOWN // loss_steps)), loss_steps, train)
        optimizer.zero_grad()
        module.multi_step_loss(model.errors(obs, action)).backward()
        optimizer.step()
        bar.update()
    return model


@torch.no_grad()
def errors(model, obs: Tensor, action: Tensor) -> list[tuple[float, float, float]]:
    """(error, median, unexplained) after k = 1 .. H steps; obs [1, W, H + 1, n], action [1, W, H, m]."""
    difference = model.errors(obs, action) * model.change.std  # [E, W, H, n]
    change = obs[:, :, 1:] - obs[:, :, :1]
    scale = model.input.std
    squares = (difference / scale).square().mean((0, 3))  # [W, H]
    error, median = squares.mean(0).sqrt(), squares.sqrt().median(0).values
    own = (change / scale).square().mean((0, 1, 3)).sqrt()
    return list(zip(*(x.tolist() for x in (error, median, error / own)), strict=True))


def measure(args: argparse.Namespace, done: list[dict], write) -> tuple[list[dict], dict]:
    """The table, each variant to `write` at once; and a window of the first task with predictions."""
    module = load("ddpg_mve_min")
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    if any({name: row[name] for name in SETTINGS} != settings for row in done):
        raise ValueError(f"--csv {args.csv}: must be of these settings, or not exist")
    have = {(row["task"], int(row["seed"]), int(row["loss_steps"])) for row in done}
    jobs = [(task, seed, steps) for task in args.tasks for seed in args.seeds for steps in args.loss_steps]
    pictured = {(args.tasks[0], args.seeds[0], steps) for steps in args.loss_steps} if args.figure else set()
    todo = [job for job in jobs if job not in have or job in pictured]
    table, paths, replays = list(done), {}, {}
    with tqdm(total=len(todo) * args.updates, unit="update") as bar:
        for task, seed, steps in todo:
            if (task, seed) not in replays:
                try:
                    replays = {(task, seed): record(module, task, args.transitions, seed)}
                except Exception as error:  # of a task that is not ours anything may come
                    why = f"{type(error).__name__}: {error}"
                    raise ValueError(f"--tasks {task}: must be a task that can be made: {why}") from None
            replay = replays[task, seed]
            for flag, value in (("horizon", args.horizon), ("loss-steps", steps)):
                if value > replay.task.length:
                    raise ValueError(f"--{flag} {value}: must be at most {replay.task.length} on {task}")
            held = module.held_out(replay.number[: replay.size]).nonzero().squeeze(1)
            if not len(held):
                few = f"--transitions {args.transitions}: must fill two episodes or more of {task}"
                raise ValueError(few)
            torch.manual_seed(seed)
            model = fit(module, replay, steps, args, bar)
            torch.manual_seed(seed)
            obs, action = replay.windows((1, 1000), args.horizon, held)
            if (task, seed, steps) in pictured:
                with torch.no_grad():
                    drift = model.errors(obs[:, :1], action[:, :1])[0, 0] * model.change.std
                paths["recorded"], paths[f"L = {steps}"] = obs[0, 0, 1:], obs[0, 0, 1:] + drift
            if (task, seed, steps) not in have:
                for k, found in enumerate(errors(model, obs, action), 1):
                    row = {"task": task, "seed": seed, "loss_steps": steps, "k": k}
                    table.append(settings | row | dict(zip(FIELDS[-3:], found, strict=True)))
                write(table)
    return table, paths


def average(table: list[dict], task: str, steps: int, column: str) -> np.ndarray:
    """[seeds, k]"""
    rows = [row for row in table if (row["task"], int(row["loss_steps"])) == (task, steps)]
    seeds = sorted({int(row["seed"]) for row in rows})
    return np.array([[float(row[column]) for row in rows if int(row["seed"]) == s] for s in seeds])


def report(table: list[dict]) -> str:
    """Mean errors at some k as Markdown."""
    last = max(int(row["k"]) for row in table)
    shown = [k for k in (1, 2, 3, 5, 10, 20, 30, 50) if k <= last]
    heads = " | ".join(f"k = {k}" for k in shown)
    lines = [f"| task | L | {heads} | median at 1 | at {last} | unexplained at 1 |"]
    lines.append("|---" * (len(shown) + 5) + "|")
    for task in dict.fromkeys(row["task"] for row in table):
        for steps in sorted({int(row["loss_steps"]) for row in table if row["task"] == task}):
            found = average(table, task, steps, "error").mean(0)
            first = average(table, task, steps, "unexplained").mean(0)[0]
            numbers = " | ".join(f"{found[k - 1]:.3g}" for k in shown)
            middle = average(table, task, steps, "median").mean(0)
            cells = [task, str(steps), numbers, f"{middle[0]:.2g}", f"{middle[-1]:.2g}", f"{first:.2g}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(table: list[dict], paths: dict[str, Tensor], out: Path) -> None:
    """A window of the first task and its predictions; errors against k, one panel per task."""
    plt = pyplot()
    tasks = list(dict.fromkeys(row["task"] for row in table))
    figure, panels = plt.subplots(
        1, 1 + len(tasks), figsize=(3.4 * (1 + len(tasks)), 3.6), layout="constrained"
    )
    for i, (name, path) in enumerate(paths.items()):
        colour = "black" if name == "recorded" else COLOURS[(i - 1) % len(COLOURS)]
        style = {"lw": 2.5, "alpha": 0.5} if name == "recorded" else {"marker": ".", "ms": 3}
        panels[0].plot(path[:, 0], path[:, 1], color=colour, label=name, **style)
    panels[0].set(title=f"one window, {tasks[0]}", xlabel="first dimension", ylabel="second dimension")
    for axes, task in zip(panels[1:], tasks, strict=True):
        losses = sorted({int(row["loss_steps"]) for row in table if row["task"] == task})
        for steps, colour in zip(losses, itertools.cycle(COLOURS), strict=False):
            lines = average(table, task, steps, "error")
            k = np.arange(1, lines.shape[1] + 1)
            draw(axes, k, lines.T, (colour, "-"), f"L = {steps}")
            middle = average(table, task, steps, "median").mean(0)
            axes.plot(k, middle, "--", lw=1, color=colour, label=f"median, L = {steps}")
        axes.set(title=f"{task}, {len(lines)} seeds", xlabel="steps predicted", yscale="log")
        clean(axes)
    panels[1].set_ylabel("r.m.s. error in deviations")
    panels[0].spines[["top", "right"]].set_visible(False)
    legend_below(figure, 5)
    save(figure, out)


def main() -> int:
    parser, count = Parser(__doc__), at_least(1)
    names = lambda text: [part for part in text.split(",") if part]
    parser.add_argument(
        "--tasks", type=names, default="TorqueBall-v0,HalfCheetah-v5", help="ids (default: %(default)s)"
    )
    parser.add_argument("--loss-steps", type=numbers, default="1,5", help="L (default: %(default)s)")
    parser.add_argument("--seeds", type=numbers, default="1,2,3,4,5", help="(default: %(default)s)")
    parser.add_argument("--horizon", type=count, default=20, help="steps predicted (default: 20)")
    parser.add_argument("--transitions", type=count, default=10_000, help="recorded (default: 10000)")
    parser.add_argument("--updates", type=count, default=3000, help="gradient steps per fit (default: 3000)")
    parser.add_argument("--members", type=count, default=5, help="of the ensemble (default: 5)")
    parser.add_argument("--hidden", type=count, default=128, help="width of four layers (default: 128)")
    parser.add_argument("--threads", type=count, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--csv", type=Path, required=True, help="file for the table; continued if it exists")
    parser.add_argument("--figure", type=Path, help="picture")
    args = parser.parse_args()

    write = functools.partial(write_table, args.csv, FIELDS)
    try:
        for name in ("tasks", "seeds", "loss_steps"):
            flag = name.replace("_", "-")
            if not getattr(args, name):
                raise ValueError(f"--{flag}: must not be empty")
        if min(args.loss_steps) < 1:
            raise ValueError(f"--loss-steps {min(args.loss_steps)}: must be at least 1")
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
        done = read_table(args.csv, FIELDS)
        torch.set_num_threads(args.threads)
        torch.set_flush_denormal(True)
        table, paths = measure(args, done, write)
    except ValueError as error:
        return mistake(error)
    print(report(table))
    if args.figure:
        plot(table, paths, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
