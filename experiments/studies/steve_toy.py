"""Weighing horizons by their uncertainty, in a table: the first experiment of Buckman et al. 2018 (STEVE).

    python -m experiments.studies.steve_toy --csv toy.csv --figure toy.png

A chain of states 0 .. 100 and an end: every step costs 1, leaving state 100 pays 100, nothing is
discounted, so that V(s) = s. Tables Q_l, l = 1 .. 8, start as random integers of 0 .. 100. At each step
every table moves one random state s onto a target: the real step s -> s + 1, then up to H = 5 imagined
ones. The noisy model jumps to a random state with probability 0.1 and pays what the state it leaves pays.
T[h, m, l] is the sum of rewards over h imagined steps of rollout m plus Q_l where it ends.

    q             Q_l(s) <- T[0] with its own table: plain Q-learning          q-ensemble  mean over l of T[0]
    mve-exact     T[H] with its own table and one exact rollout                mve-noisy   one noisy rollout
    steve-exact   mean over h of the means over (m, l), weighted by 1 / variance   steve-noisy the same, noisy

The error is the mean over s of (s − mean_l Q_l(s))². Half a minute. Extra `bench` for the figure.
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.report.commands import Parser, at_least, check_output, mistake
from experiments.report.pictures import COLOURS, clean, draw, legend_below, pyplot, save
from experiments.report.tables import write_table

METHODS = ("q", "q-ensemble", "mve-exact", "steve-exact", "mve-noisy", "steve-noisy")
FIELDS = ["method", "trial", "step", "error"]
END, MEMBERS = 101, 8  # the state after 100; tables, and rollouts per target


def walk(
    state: np.ndarray, horizon: int, noise: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One real step from `state` [..], then `horizon` imagined ones.

    Returns sums of rewards up to each h [H + 1, ..] and the states reached [H + 1, ..].
    """
    rewards, states, total = [], [], np.zeros(state.shape)
    for h in range(horizon + 1):
        total = total + np.where(state == 100, 100.0, np.where(state == END, 0.0, -1.0))
        after = np.minimum(state + 1, END)
        if h > 0 and noise > 0:
            jump = (rng.random(state.shape) < noise) & (state != END)
            after = np.where(jump, rng.integers(0, END, state.shape), after)
        state = after
        rewards.append(total)
        states.append(state)
    return np.stack(rewards), np.stack(states)


def weighted(targets: np.ndarray) -> np.ndarray:
    """Inverse-variance weights over horizons of the means over samples: [H + 1, samples, ..] -> [..]."""
    weights = 1 / (targets.var(1) + 1e-8)
    return (weights * targets.mean(1)).sum(0) / weights.sum(0)


def target(
    method: str, table: np.ndarray, state: np.ndarray, horizon: int, rng: np.random.Generator
) -> np.ndarray:
    """New value of Q_l(state) for each trial and table: table [trials, L, 102], state [trials, L]."""
    trials, members = np.indices(state.shape)
    horizon = 0 if method.startswith("q") else horizon
    noise = 0.1 if method.endswith("noisy") else 0.0
    if method.startswith("steve"):
        rewards, reached = walk(np.broadcast_to(state, (MEMBERS, *state.shape)), horizon, noise, rng)
        values = table[trials[..., None], np.arange(MEMBERS), reached[..., None]]  # [H + 1, M, trials, L, l]
        found = rewards[..., None] + values
        return weighted(np.moveaxis(found, -1, 2).reshape(horizon + 1, MEMBERS * MEMBERS, *state.shape))
    rewards, reached = walk(state, horizon, noise, rng)
    if method == "q-ensemble":
        return rewards[-1] + table[trials[..., None], np.arange(MEMBERS), reached[-1][..., None]].mean(-1)
    return rewards[-1] + table[trials, members, reached[-1]]


def learn(method: str, steps: int, trials: int, horizon: int, every: int, seed: int) -> np.ndarray:
    """Errors [trials, steps / every + 1]."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, END, (trials, MEMBERS, END + 1)).astype(float)
    table[..., END] = 0
    rows, columns = np.indices((trials, MEMBERS))
    truth, errors = np.arange(END), []
    for step in tqdm(range(steps + 1), desc=method, leave=False, mininterval=1):
        if step % every == 0:
            errors.append(((truth - table[..., :END].mean(1)) ** 2).mean(1))
        state = rng.integers(0, END, (trials, MEMBERS))
        table[rows, columns, state] = target(method, table, state, horizon, rng)
    return np.stack(errors, 1)


def report(errors: dict[str, np.ndarray], every: int) -> str:
    """First step with an error below 1 (mean over the trials that get there) and errors on the way."""
    count = next(iter(errors.values())).shape[1]
    shown = [k for k in (500, 2_500, 5_000, 7_500, 10_000) if k % every == 0 and k // every < count]
    lines = ["| method | error < 1 at | trials | " + " | ".join(f"{k:_}" for k in shown) + " |"]
    lines.append("|---" * (len(shown) + 3) + "|")
    for method, found in errors.items():
        below = found < 1
        there = below.any(1)
        first = f"{below[there].argmax(1).mean() * every:.0f}" if there.any() else "never"
        numbers = " | ".join(f"{found[:, k // every].mean():.3g}" for k in shown)
        lines.append(f"| {method} | {first} | {there.sum()} of {len(found)} | {numbers} |")
    return "\n".join(lines)


def write(errors: dict[str, np.ndarray], every: int, out: Path) -> None:
    """The table: a row for each method, trial and step."""
    rows = [dict(zip(FIELDS, (method, trial + 1, k * every, round(float(x), 6)), strict=True))
            for method, found in errors.items() for trial, row in enumerate(found)
            for k, x in enumerate(row)]  # fmt: skip
    write_table(out, FIELDS, rows)


def plot(errors: dict[str, np.ndarray], every: int, out: Path) -> None:
    """Mean error over trials, band from the lowest to the highest."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.5), sharey=True, layout="constrained")
    for axes, model in zip(panels, ("exact", "noisy"), strict=True):
        chosen = [m for m in errors if m.startswith("q") or m.endswith(model)]
        for method, colour in zip(chosen, COLOURS, strict=False):
            found = np.maximum(errors[method], 1e-3)
            steps = np.arange(found.shape[1]) * every
            draw(axes, steps, found.T, (colour, "-"), method.removesuffix(f"-{model}"))
        axes.set(title=f"{model} model", xlabel="steps", yscale="log", ylim=(1e-2, 1e4))
        clean(axes)
    panels[0].set_ylabel(f"mean square error, {len(found)} trials")
    legend_below(figure, 4)
    save(figure, out)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=at_least(1), default=10_000, help="(default: 10000)")
    parser.add_argument("--trials", type=at_least(1), default=10, help="side by side (default: 10)")
    parser.add_argument("--horizon", type=at_least(1), default=5, help="imagined steps (default: 5)")
    parser.add_argument("--every", type=at_least(1), default=100, help="steps between rows (default: 100)")
    parser.add_argument("--seed", type=at_least(0), default=1, help="(default: 1)")
    parser.add_argument("--csv", type=Path, required=True, help="file for the table")
    parser.add_argument("--figure", type=Path, help="picture")
    args = parser.parse_args()
    try:
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
    except ValueError as error:
        return mistake(error)
    errors = {m: learn(m, args.steps, args.trials, args.horizon, args.every, args.seed) for m in METHODS}
    write(errors, args.every, args.csv)
    print(report(errors, args.every))
    if args.figure:
        plot(errors, args.every, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
