"""More backups or better targets? Dyna (Sutton 1990), MVE and STEVE at equal calls of one learned table.

    python -m experiments.studies.dyna --csv dyna.csv --figure dyna.png

The chain and the eight value tables of `steve_toy.py`. The model is a table of the steps its learner has
seen, exact or noisy: with chance 0.1 it jumps to any state. Calls of it for each real step of a value table:
q none; dyna-n n, each a backup Q(s) <- r + Q(s') from a state seen before; mve 5, the real step's target
going on for H = 5 imagined steps; steve 40, 8 rollouts whose horizons are weighed by 1 / variance. A rollout
ends where the table does. As n grows, Dyna is value iteration on what was seen. One to two minutes. Extra
`bench` for the figure.
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.report.commands import Parser, at_least, check_output, mistake
from experiments.studies import steve_toy as toy
from experiments.studies.steve_toy import END, MEMBERS

KINDS, HORIZON = ("dyna-5", "mve", "dyna-40", "steve"), 5
METHODS = ["q", *(f"{kind}-{model}" for model in ("exact", "noisy") for kind in KINDS)]


class Learner:
    """Values q [trials, L, 102], 0 at the end; states of the real steps so far, seen [:count, trials, L]."""

    def __init__(self, method: str, steps: int, trials: int, seed: int):
        self.kind, self.noise = method.split("-"), 0.1 if method.endswith("noisy") else 0.0
        self.rng, self.count = np.random.default_rng(seed), 0
        self.rows, self.columns = np.indices((trials, MEMBERS))
        self.q = self.rng.integers(0, END, (trials, MEMBERS, END + 1)).astype(float)
        self.q[..., END], self.known = 0, np.zeros(self.q.shape, bool)
        self.seen = np.zeros((steps, trials, MEMBERS), int)

    def walk(self, state: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """steve_toy.walk, standing still where the table ends: rewards' sums and states [H + 1, ..]."""
        rewards, states = toy.walk(state, horizon, self.noise, self.rng)
        length = self.known[self.rows, self.columns, states[:-1]].cumprod(0).sum(0)
        upto = np.minimum(np.arange(horizon + 1).reshape(-1, *[1] * state.ndim), length)
        return np.take_along_axis(rewards, upto, 0), np.take_along_axis(states, upto, 0)

    def dream(self, backups: int) -> None:
        """Dyna's backups, one state of those seen at a time."""
        for index in self.rng.integers(0, self.count, (backups, *self.rows.shape)):
            state = self.seen[index, self.rows, self.columns]
            (reward,), (after,) = toy.walk(state, 0, 0.0, self.rng)
            jump = self.rng.random(state.shape) < self.noise
            after = np.where(jump, self.rng.integers(0, END, state.shape), after)
            self.q[self.rows, self.columns, state] = reward + self.q[self.rows, self.columns, after]

    def step(self, state: np.ndarray) -> None:
        """One real step of every table from state [trials, L], and what is imagined after it."""
        self.seen[self.count], self.count = state, self.count + 1
        self.known[self.rows, self.columns, state] = True
        starts = np.broadcast_to(state, (MEMBERS, *state.shape)) if self.kind[0] == "steve" else state
        rewards, states = self.walk(starts, HORIZON if self.kind[0] in ("mve", "steve") else 0)
        if self.kind[0] == "steve":
            found = rewards[..., None] + self.q[self.rows[..., None], np.arange(MEMBERS), states[..., None]]
            new = toy.weighted(np.moveaxis(found, -1, 2).reshape(HORIZON + 1, -1, *state.shape))
        else:
            new = rewards[-1] + self.q[self.rows, self.columns, states[-1]]
        self.q[self.rows, self.columns, state] = new
        if self.kind[0] == "dyna":
            self.dream(int(self.kind[1]))


def learn(method: str, steps: int, trials: int, every: int, seed: int) -> np.ndarray:
    """Errors [trials, steps / every + 1] of the mean table, as in steve_toy.py."""
    learner, errors = Learner(method, steps + 1, trials, seed), []
    for step in tqdm(range(steps + 1), desc=method, leave=False, mininterval=1):
        if step % every == 0:
            errors.append(((np.arange(END) - learner.q[..., :END].mean(1)) ** 2).mean(1))
        learner.step(learner.rng.integers(0, END, (trials, MEMBERS)))
    return np.stack(errors, 1)


def main() -> int:
    parser = Parser(__doc__)
    for name, default in (("steps", 10_000), ("trials", 10), ("every", 100), ("seed", 1)):
        parser.add_argument(f"--{name}", type=at_least(1), default=default, help="(default: %(default)s)")
    parser.add_argument("--csv", type=Path, required=True, help="file for the table")
    parser.add_argument("--figure", type=Path, help="picture")
    args = parser.parse_args()
    try:
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
    except ValueError as error:
        return mistake(error)
    errors = {m: learn(m, args.steps, args.trials, args.every, args.seed) for m in METHODS}
    toy.write(errors, args.every, args.csv)
    print(toy.report(errors, args.every))
    if args.figure:
        toy.plot(errors, args.every, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
