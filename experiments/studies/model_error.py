"""Which model class predicts better? Figure 3 of Amos et al. 2021: one recurrent network against an ensemble.

    python algos/sac.py --env-id HalfCheetah-v5 --total-timesteps 50_000 --learning-starts 5_000
    python -m experiments.studies.model_error runs/<run> --csv error.csv --figure error.png

The replay of any finished run is fixed data, so that no model influences what is collected. A fifth of its
episodes, spread over the run, is the test set. The others arrive in the order in which they were played;
after --episodes of them, both models are trained from new weights on four fifths and held to the last fifth:

    recurrent   the dynamics of sac_svg_h.py, on windows of --horizon steps, from its own predictions (6)
    ensemble    the Gaussians of sac_mve.py, on single steps; predictions are the mean over its members

Errors are mean squares in deviations of the whole replay, held in [0.1, 10] as in (6), after k = 1 .. horizon
steps under the recorded actions, windows inside one episode. Holdout minus train is what a model memorises,
test minus holdout what it misses because the policy moves on. Interrupted, the same command goes on from what
is in --csv. Extra `bench` for the figure.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, optim
from tqdm import tqdm

from experiments.algorithms import load
from experiments.report.commands import Parser, at_least, check_output, mistake, numbers
from experiments.report.pictures import COLOURS, clean, draw, legend_below, pyplot, save
from experiments.report.tables import read_table, write_table

SETTINGS = "run,horizon,updates,recurrent_hidden,ensemble_hidden".split(",")  # one table, one set of these
FIELDS = [*SETTINGS, *"model,episodes,seed,split,k,mse".split(",")]
MODELS, SPLITS = ("ensemble", "recurrent"), ("train", "holdout", "test")


class Windows(NamedTuple):
    """W windows of H recorded steps, each inside one episode."""

    obs: Tensor  # [H + 1, W, n], the true successors
    action: Tensor  # [H, W, m]


def read_replay(run_dir: Path) -> tuple[list[Tensor], list[int]]:
    """Rows (obs, action, next obs) of every episode, in order: [[T, 2 n + m], ..], and (n, m)."""
    path = run_dir / "final.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        rows, episode = state["buffer"]["rows"], state["buffer"]["episode"]
        n, m = map(int, state["sizes"])
    except Exception:  # missing or damaged files raise many types
        raise ValueError(f"{run_dir}: must be a finished run with a readable final.pt") from None
    if state["buffer"]["added"] > len(rows):
        raise ValueError(f"{run_dir}: must have kept all its transitions, not the last {len(rows)} only")
    if rows.shape[1] != 2 * n + m + 2:
        raise ValueError(f"{run_dir}: must be a run whose replay holds single transitions")
    keep = [*range(n + m), *range(n + m + 1, 2 * n + m + 1)]
    episodes = [rows[episode == number][:, keep] for number in episode.unique()]
    return episodes, [n, m]


def windows(episodes: list[Tensor], sizes: list[int], horizon: int) -> Windows:
    """All windows of the episodes. Raises ValueError if every episode is shorter."""
    obs_dim, action_dim = sizes
    pieces = [e.unfold(0, horizon, 1) for e in episodes if len(e) >= horizon]  # [starts, columns, H]
    if not pieces:
        raise ValueError(f"--horizon {horizon}: must be at most the length of an episode")
    rows = torch.cat(pieces).permute(2, 0, 1)
    obs, action, after = rows.split([obs_dim, action_dim, obs_dim], 2)
    return Windows(torch.cat([obs, after[-1:]]).contiguous(), action.contiguous())


def fit_recurrent(svg, train: Windows, sizes: list[int], hidden: int, updates: int, bar: tqdm):
    """The trained Dynamics as a function of (obs [W, n], action [H, W, m]) -> predictions [H, W, n]."""
    args = svg.Args(model_hidden=hidden, gru_layers=1)
    normalizer = svg.Normalizer(sizes[0])
    normalizer.mean.copy_(train.obs[0].mean(0))
    normalizer.std.copy_(train.obs[0].std(0).clamp(0.1, 10))
    model = svg.Dynamics(normalizer, *sizes, args)
    optimizer = optim.Adam(model.parameters(), lr=args.model_lr, fused=True)
    for _ in range(updates):
        at = torch.randint(train.obs.shape[1], (args.sequence_batch,))
        actions = torch.cat([train.action[:, at], train.action[-1:, at]])  # the last is not used
        optimizer.zero_grad()
        svg.sequence_errors(model, train.obs[:, at], actions).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.update()

    def predict(obs: Tensor, action: Tensor) -> Tensor:
        memory, found = None, []
        for actions in action:
            obs, memory = model.step(obs, actions, memory)
            found.append(obs)
        return torch.stack(found)

    return predict


def fit_ensemble(mve, train: Windows, sizes: list[int], hidden: int, updates: int, bar: tqdm):
    """The trained GaussianEnsemble in the same form; a minibatch of single steps per member and update."""
    args = mve.Args(model_hidden=hidden)
    model = mve.GaussianEnsemble(args.members, *sizes, args.model_layers, hidden)
    model.fit_normalizer(train.obs[0])
    optimizer = optim.Adam(model.parameters(), lr=args.model_lr, fused=True)
    starts, actions, deltas = train.obs[0], train.action[0], train.obs[1] - train.obs[0]
    stack = (args.members, args.batch_size, -1)
    for _ in range(updates):
        at = torch.randint(len(starts), (args.members * args.batch_size,))
        mean, log_var = model(starts[at].view(stack), actions[at].view(stack))
        target = torch.cat([deltas[at], torch.zeros(len(at), 1)], 1).view(stack)  # no reward to predict here
        loss = mve.gaussian_nll(mean[:, :, :-1], log_var[:, :, :-1], target[:, :, :-1]).mean(1).sum()
        optimizer.zero_grad()
        (loss + 0.01 * (model.max_log_var - model.min_log_var).sum()).backward()
        optimizer.step()
        bar.update()

    def predict(obs: Tensor, action: Tensor) -> Tensor:
        found = []
        for actions in action:
            inputs = (x.expand(args.members, -1, -1) for x in (obs, actions))
            obs = obs + model(*inputs)[0].mean(0)[:, :-1]
            found.append(obs)
        return torch.stack(found)

    return predict


def split(episodes: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(the test set: every fifth from the third on, the others in order)."""
    test = episodes[2::5]
    return test, [e for i, e in enumerate(episodes) if i % 5 != 2]


@torch.no_grad()
def errors(predict, data: Windows, scale: Tensor, most: int = 4096) -> list[float]:
    """Mean square error in deviations after k = 1 .. H steps, over at most `most` windows evenly chosen."""
    at = torch.linspace(0, data.obs.shape[1] - 1, min(most, data.obs.shape[1])).long()
    predicted = predict(data.obs[0, at], data.action[:, at])
    return ((predicted - data.obs[1:, at]) / scale).square().mean((1, 2)).tolist()


def measure(run_dir: Path, args: argparse.Namespace, done: list[dict], write) -> list[dict]:
    """The whole table; rows already in `done` are kept, each new trio of splits goes to `write` at once."""
    svg, mve = load("sac_svg_h"), load("sac_mve")
    episodes, sizes = read_replay(run_dir)
    test, pool = split(episodes)
    if len(test) < 1 or max(args.episodes) > len(pool) or min(args.episodes) < 2:
        raise ValueError(
            f"--episodes {','.join(map(str, args.episodes))}: must be from 2 to {len(pool)} each"
        )
    scale = torch.cat(episodes)[:, : sizes[0]].std(0)
    scale = scale.clamp(0.1, 10)
    settings = {name: str(getattr(args, name)) for name in SETTINGS} | {"run": run_dir.resolve().name}
    if any({name: row[name] for name in SETTINGS} != settings for row in done):
        raise ValueError(f"--csv {args.csv}: must be of this run and these settings, or not exist")
    table, fits = list(done), {"recurrent": (fit_recurrent, svg), "ensemble": (fit_ensemble, mve)}
    jobs = [(number, seed, name) for number in args.episodes for seed in args.seeds for name in MODELS]
    have = {(int(row["episodes"]), int(row["seed"]), row["model"]) for row in done}
    jobs = [job for job in jobs if job not in have]
    with tqdm(total=len(jobs) * args.updates, unit="update") as bar:
        for number, seed, name in jobs:
            some = pool[:number]
            held = some[4::5] or some[-1:]
            parts = {
                "holdout": held,
                "test": test,
                "train": [e for e in some if all(e is not h for h in held)],
            }
            data = {part: windows(es, sizes, args.horizon) for part, es in parts.items()}
            torch.manual_seed(seed)
            fit, module = fits[name]
            hidden = args.recurrent_hidden if name == "recurrent" else args.ensemble_hidden
            predict = fit(module, data["train"], sizes, hidden, args.updates, bar)
            for part in SPLITS:
                for k, mse in enumerate(errors(predict, data[part], scale), 1):
                    row = {"model": name, "episodes": number, "seed": seed, "split": part, "k": k, "mse": mse}
                    table.append(settings | row)
            write(table)
    return table


def average(table: list[dict], model: str, episodes: int, part: str) -> float:
    """Mean over seeds and over k = 1 .. H."""
    found = [float(row["mse"]) for row in table
             if (row["model"], int(row["episodes"]), row["split"]) == (model, episodes, part)]  # fmt: skip
    return float(np.mean(found))


def measured(table: list[dict]) -> list[int]:
    """The numbers of episodes for which both models are in the table."""
    sizes = ({int(row["episodes"]) for row in table if row["model"] == model} for model in MODELS)
    return sorted(set.intersection(*sizes))


def report(table: list[dict]) -> str:
    """Mean multi-step errors as Markdown, and what Figure 3 claims of them."""
    sizes = measured(table)
    lines = ["| model | split | " + " | ".join(f"{n} episodes" for n in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 2) + "|")
    means = {(m, p): [average(table, m, n, p) for n in sizes] for m in MODELS for p in SPLITS}
    for (model, part), values in means.items():
        lines.append(f"| {model} | {part} | " + " | ".join(f"{value:.3g}" for value in values) + " |")
    gap = {m: [h / t for h, t in zip(means[m, "holdout"], means[m, "train"], strict=True)] for m in MODELS}
    for part in ("holdout", "test"):
        better = sum(e < r for e, r in zip(means["ensemble", part], means["recurrent", part], strict=True))
        lines.append(f"\nensemble below recurrent on {part}: {better} of {len(sizes)} sizes")
    larger = sum(r > e for r, e in zip(gap["recurrent"], gap["ensemble"], strict=True))
    lines.append(f"\nholdout / train larger for recurrent: {larger} of {len(sizes)} sizes")
    return "\n".join(lines)


def plot(table: list[dict], title: str, out: Path) -> None:
    """Mean over k and seeds against the number of episodes, band from lowest to highest seed."""
    plt = pyplot()
    sizes = measured(table)
    seeds = sorted({int(row["seed"]) for row in table})
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.3), sharex=True, sharey=True, layout="constrained")
    for axes, part in zip(panels, SPLITS, strict=True):
        for model, colour in zip(MODELS, COLOURS, strict=False):
            by_seed = [[row for row in table if int(row["seed"]) == seed] for seed in seeds]
            lines = np.array([[average(rows, model, n, part) for n in sizes] for rows in by_seed])
            draw(axes, sizes, lines.T, (colour, "-"), model, marker="o", ms=3)
        axes.set(title=part, xlabel="episodes", yscale="log", xscale="log")
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        clean(axes)
    panels[0].set_ylabel("mean square error")
    legend_below(figure, 2)
    figure.suptitle(f"{title}, mean and range of {len(seeds)} seeds", fontsize=11)
    save(figure, out)


def main() -> int:
    parser, count = Parser(__doc__), at_least(1)
    parser.add_argument("run", type=Path, help="folder of a finished run of any file")
    parser.add_argument("--horizon", type=count, default=5, help="steps predicted (default: 5)")
    parser.add_argument(
        "--episodes", type=numbers, default="2,5,10,20,40", help="sizes (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=numbers, default="1,2,3", help="(default: %(default)s)")
    parser.add_argument("--updates", type=count, default=3000, help="gradient steps per fit (default: 3000)")
    parser.add_argument(
        "--recurrent-hidden", type=count, default=256, help="width (default: 256, about 0.5 M)"
    )
    parser.add_argument(
        "--ensemble-hidden", type=count, default=200, help="width (default: 200, about 0.5 M)"
    )
    parser.add_argument("--threads", type=count, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--csv", type=Path, required=True, help="file for the table; continued if it exists")
    parser.add_argument("--figure", type=Path, help="picture")
    args = parser.parse_args()

    write = functools.partial(write_table, args.csv, FIELDS)
    try:
        for name in ("episodes", "seeds"):
            if not getattr(args, name):
                raise ValueError(f"--{name}: must not be empty")
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
        done = read_table(args.csv, FIELDS)
        torch.set_num_threads(args.threads)
        torch.set_flush_denormal(True)
        read_replay(args.run)
        table = measure(args.run, args, done, write)
    except ValueError as error:
        return mistake(error)
    print(report(table))
    if args.figure:
        plot(table, f"{args.run.name.split('__')[0]}: {args.horizon}-step prediction", args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
