"""Can value-aware models be fitted along a real run? Lovatto et al. 2020, section 5.2.

    python -m experiments.studies.vaml_frozen --env-id Hopper-v5 --seeds 1,2 --csv out.csv --figure out.png

sac.py learns the task by itself, in stages of --every steps (a longer run resumed is the same as one
planned so, to the bit); the agent of each stage is kept in <runs-dir>/snapshots. At each of them new models
are fitted to the replay of that moment with c of (9) 1, 0.001 and 0 against that agent's value V (6). A
fifth of the transitions, at most 2 000, is kept for the test alone, the same ones for all three; of the rest
a fit holds out its own to know when to stop. No model ever touches the run. Per row, on the test's
transitions: the value-aware error with 32 samples, the same as a share of the variance of V(s'), the
negative log-likelihood of the varying dimensions, mean σ, gradient steps taken. A fit ends after five passes
without a lower loss on what it holds out, or at --fit-steps (the same for all c; of 200 000 transitions these
are 13 passes); with n = 2 samples, so that so many are affordable. Rows are written fit by fit and runs
resume: stopped, the same command goes on; a seed whose rows are all there is not run again. On one core
200 000 steps take SAC half an hour, the 30 fits at most an hour and a half. Extra `bench` for the figure.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from experiments.algorithms import load
from experiments.report.commands import Parser, at_least, check_output, mistake, numbers
from experiments.report.pictures import COLOURS, clean, draw, legend_below, pyplot, save
from experiments.report.tables import read_table, write_table

SETTINGS = "env_id,every,steps,fit_steps,samples,hidden,learning_starts,batch_size".split(
    ","
)  # one table, one set of these
FIELDS = [*SETTINGS, *"c,seed,step,value_error,share,nll,std,taken".split(",")]
SHARES = {"1": ("mle", 1.0), "0.001": ("reg-vaml", 0.001), "0": ("vaml", 0.0)}
LABELS = {"1": "likelihood (c = 1)", "0.001": "regularised (c = 0.001)", "0": "value-aware (c = 0)"}


def learn(sac, env_id: str, seed: int, args: argparse.Namespace) -> Path:
    """Run SAC in stages, leaving <runs_dir>/snapshots/<task>-<seed>/<step>.pt; returns the run folder."""
    folder = args.runs_dir / "snapshots" / f"{env_id.replace(':', '-').replace('/', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "run.txt"
    run_dir = Path(marker.read_text()) if marker.exists() else None
    for path in sorted(folder.glob("*.pt")):  # before anything goes on from them
        saved, same = torch.load(path, weights_only=True)["args"], ("hidden", "batch_size", "learning_starts")
        if any(saved[name] != getattr(args, name) for name in same):
            raise ValueError(f"--runs-dir {args.runs_dir}: must not hold snapshots of other settings: {path}")
    for step in range(args.every, args.steps + 1, args.every):
        snapshot = folder / f"{step}.pt"
        if snapshot.exists():
            continue
        flags = ["--total-timesteps", str(step)]
        if run_dir is None:
            flags += ["--env-id", env_id, "--seed", str(seed), "--runs-dir", str(args.runs_dir)]
            flags += ["--num-threads", str(args.threads), "--learning-starts", str(args.learning_starts)]
            flags += [
                "--eval-every",
                str(args.every),
                "--device",
                "cpu",
                "--batch-size",
                str(args.batch_size),
            ]
            flags += ["--hidden", str(args.hidden)]
        else:
            flags += ["--resume", str(run_dir)]
        run_dir = sac.train(sac.parse(flags))
        marker.write_text(str(run_dir.resolve()))
        state = torch.load(run_dir / "final.pt", weights_only=True)
        torch.save({"agent": state["agent"], "args": state["args"]}, snapshot.with_suffix(".tmp"))
        snapshot.with_suffix(".tmp").rename(snapshot)
    return run_dir


def fit(
    vaml, agent_state: dict, rows: torch.Tensor, sizes: list[int], c: str, seed: int, args: argparse.Namespace
) -> dict:
    """Fit a new model with the loss (9) to rows of a replay; its errors on those of the test."""
    kind, share = SHARES[c]
    flags = [
        "--model-loss",
        kind,
        "--samples",
        str(args.samples),
        "--hidden",
        str(args.hidden),
        "--device",
        "cpu",
    ]
    torch.manual_seed(seed)
    order = torch.randperm(len(rows))  # the same for every c
    count = min(len(rows) // 5, 2_000)
    test, train = (vaml.ReplayBuffer(n, *sizes, torch.device("cpu")) for n in (count, len(rows) - count))
    test.rows[:], train.rows[:] = rows[order[:count]], rows[order[count:]]
    test.added, train.added = count, len(rows) - count
    agent = vaml.Agent(vaml.parse(flags), *sizes, torch.device("cpu"))
    for name in ("actor", "critic_target"):
        getattr(agent, name).load_state_dict(agent_state[name])
    with torch.no_grad():
        agent.log_alpha.copy_(agent_state["log_alpha"])
    agent.fit_until_worse(train, share, 100, args.fit_steps)
    torch.manual_seed(seed)
    agent.report_fit(test[torch.arange(count)], int(agent.fit_report[-1]))
    return dict(zip(vaml.FIT_REPORT, agent.fit_report.tolist(), strict=True))


def measure(args: argparse.Namespace, done: list[dict], write) -> list[dict]:
    """The table, fit by fit; rows in `done` are kept."""
    sac, vaml = load("sac"), load("sac_vaml")
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    if any({name: row[name] for name in SETTINGS} != settings for row in done):
        raise ValueError(f"--csv {args.csv}: must be of these settings, or not exist")
    table, have = list(done), {(row["c"], int(row["seed"]), int(row["step"])) for row in done}
    steps = range(args.every, args.steps + 1, args.every)
    for seed in args.seeds:
        jobs = [(step, c) for step in steps for c in SHARES if (c, seed, step) not in have]
        if not jobs:  # a seed whose rows are all there needs no run
            continue
        try:
            run_dir = learn(sac, args.env_id, seed, args)
        except sac.BadInput as error:
            raise ValueError(str(error)) from None
        rows = torch.load(run_dir / "final.pt", weights_only=True)["buffer"]["rows"]
        for step, c in tqdm(jobs, desc=f"fits, seed {seed}"):
            folder = args.runs_dir / "snapshots" / f"{args.env_id.replace(':', '-').replace('/', '-')}-{seed}"
            snapshot = torch.load(folder / f"{step}.pt", weights_only=True)
            agent = snapshot["agent"]
            inputs = agent["critic"]["layers.0.weight"].shape[1]
            obs_dim = rows.shape[1] - 2 - inputs
            found = fit(vaml, agent, rows[:step], [obs_dim, inputs - obs_dim], c, seed, args)
            row = {"c": c, "seed": str(seed), "step": str(step), "value_error": found["value_error"]}
            row |= {"share": found["value_error_share"], "nll": found["nll"], "std": found["std"]}
            table.append(settings | row | {"taken": int(found["fit_steps"])})
            write(table)
    return table


def series(table: list[dict], c: str, name: str) -> tuple[list[int], np.ndarray]:
    """Steps, and values [seeds, steps] of all seeds that have them all."""
    rows = [row for row in table if row["c"] == c]
    steps = sorted({int(row["step"]) for row in rows})
    seeds = sorted({row["seed"] for row in rows}, key=int)
    values = [
        [float(r[name]) for s in steps for r in rows if (r["seed"], int(r["step"])) == (seed, s)]
        for seed in seeds
    ]
    return steps, np.array([v for v in values if len(v) == len(steps)])


def report(table: list[dict]) -> str:
    """Means over seeds as Markdown: error and share at each snapshot, and the means of all."""
    steps, _ = series(table, "1", "value_error")
    lines = [
        "| c | | " + " | ".join(f"{s // 1000}k" for s in steps) + " | mean |",
        "|---" * (len(steps) + 3) + "|",
    ]
    for c in SHARES:
        for name in ("value_error", "share", "nll", "std"):
            values = series(table, c, name)[1].mean(0)
            cells = " | ".join(f"{x:.3g}" for x in values)
            lines.append(f"| {c} | {name} | {cells} | {values.mean():.3g} |")
    return "\n".join(lines)


def plot(table: list[dict], out: Path) -> None:
    """Error, share and σ against the step of the snapshot, mean and range over seeds."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained")
    names = {"value_error": "value-aware error", "share": "share of Var V(s')", "std": "mean σ"}
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        for c, colour in zip(SHARES, COLOURS, strict=False):
            steps, values = series(table, c, name)
            draw(axes, steps, values.T, (colour, "-"), LABELS[c], marker="o", ms=3)
        axes.set(title=label, xlabel="steps of SAC", yscale="log")
        clean(axes)
    legend_below(figure, 3)
    figure.suptitle(f"{table[0]['env_id']}, {len(values)} seed{'s' * (len(values) > 1)}", fontsize=11)
    save(figure, out)


def main() -> int:
    parser, count = Parser(__doc__), at_least(1)
    parser.add_argument("--env-id", default="Hopper-v5", help="(default: Hopper-v5)")
    parser.add_argument("--seeds", type=numbers, default="1,2", help="(default: %(default)s)")
    parser.add_argument("--steps", type=count, default=200_000, help="of SAC (default: 200000)")
    parser.add_argument(
        "--every", type=count, default=20_000, help="steps between snapshots (default: 20000)"
    )
    parser.add_argument("--learning-starts", type=count, default=5_000, help="of SAC (default: 5000)")
    parser.add_argument("--batch-size", type=count, default=256, help="of SAC (default: 256)")
    parser.add_argument("--hidden", type=count, default=256, help="units of SAC (default: 256)")
    parser.add_argument("--samples", type=count, default=2, help="n of (8a) (default: 2)")
    parser.add_argument(
        "--fit-steps", type=count, default=10_000, help="gradient steps of a fit at most (default: 10000)"
    )
    parser.add_argument("--threads", type=count, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="(default: runs)")
    parser.add_argument("--csv", type=Path, required=True, help="file for the table; continued if it exists")
    parser.add_argument("--figure", type=Path, help="picture")
    args = parser.parse_args()

    write = functools.partial(write_table, args.csv, FIELDS)
    try:
        if args.every > args.steps:
            raise ValueError(f"--every {args.every}: must be at most --steps {args.steps}")
        if not args.seeds:
            raise ValueError("--seeds: must not be empty")
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
        done = read_table(args.csv, FIELDS)
        try:
            args.runs_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--runs-dir {args.runs_dir}: must be writable: {error}") from error
        torch.set_num_threads(args.threads)
        torch.set_flush_denormal(True)
        table = measure(args, done, write)
    except ValueError as error:
        return mistake(error)
    print(report(table))
    if args.figure:
        plot(table, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
