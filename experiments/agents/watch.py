"""Watch a trained agent: in a window, on video, or by its returns alone.

    python -m experiments.agents.watch runs/<run>                               # a window, five episodes
    python -m experiments.agents.watch runs/<run> --video videos --episodes 3   # needs moviepy, no display
    python -m experiments.agents.watch runs/<run> --no-render --episodes 100
    python -m experiments.agents.watch runs/<run> --file path/to/my_method.py   # a copied file, not in algos/

Plays the agent as last saved, on the CPU, with its deterministic policy or, --stochastic, as in training.
Without --seed the episodes are those of the run's own evaluation: as many of them as there (--eval-episodes)
give the last row of a finished run's eval.csv again, in the same bits on the same kind of machine. Where
there is no display, MuJoCo films with MUJOCO_GL=osmesa or egl in the environment. Tasks of your own are found
where you stand and beside the file. Exit code 2 for a mistake, which leaves nothing on disk.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import torch

from experiments.algorithms import ROOT
from experiments.report.commands import Parser


def load(run: Path, file: Path | None):
    """The file that made the run as a module, the agent as last saved, its arguments. Or ValueError."""
    names = ("final.pt", "checkpoint.pt", "checkpoint.previous.pt")
    path = next((run / name for name in names if (run / name).exists()), run / names[0])
    try:
        algo = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["algo"]
    except Exception as error:  # missing and damaged files raise many types
        raise ValueError(f"{run}: must be a run's folder with a readable {path.name}: {error!r}") from None
    file = file or {file.stem: file for file in (ROOT / "algos").glob("*.py")}.get(algo)
    if file is None or file.suffix != ".py" or not file.is_file():
        raise ValueError(f"{run}: was made by {algo}.py, --file must say where that is unless in algos/")
    folders = [os.getcwd(), *map(str, file.resolve().parents[:2]), str(ROOT)]  # of modules with tasks
    sys.path += [folder for folder in folders if folder not in sys.path]
    spec = importlib.util.spec_from_file_location(f"watched_{file.stem}", file.resolve())  # hides no other
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module, *module.load(run)
    except Exception as error:  # a damaged run, or another file's
        raise ValueError(f"{run}: cannot be loaded by {file}: {error!r}") from None


def make(module, args, options: argparse.Namespace, name: str) -> gym.Env:
    """The run's task, drawn and filmed as the options say. Raises ValueError where it cannot be."""
    make_env = getattr(module, "make_goal_env", module.make_env)
    env = make_env(args.env_id, args.env_kwargs)
    if options.no_render:
        return env
    env.close()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if options.video:
                importlib.import_module("moviepy")  # asked before there is a folder
            elif not importlib.import_module("glfw").init():  # without a display some renderers crash
                raise ValueError("no display for a window: --video FOLDER needs none")
            mode = {"render_mode": "rgb_array" if options.video else "human"}
            env = make_env(args.env_id, json.dumps(json.loads(args.env_kwargs) | mode))
            env.reset()
            if env.render() is None and options.video:
                raise ValueError("render() returns no picture")
            if options.video:
                env = gym.wrappers.RecordVideo(env, str(options.video), lambda _: True, name_prefix=name)
    except Exception as error:  # tasks and renderers fail in many ways
        why = repr(error.__context__ or error)
        hint = "without a display set MUJOCO_GL=osmesa or egl, " * ("OpenGL" in why)
        raise ValueError(f"{args.env_id}: cannot be drawn ({hint}or --no-render): {why}") from None
    return env


def play(module, agent, env: gym.Env, seed: int, episodes: int, deterministic: bool) -> Iterator[dict]:
    """Return and length of each episode, as `evaluate` plays them."""
    for episode in range(episodes):
        obs, done = module.begin_episode(env, agent, None if episode else seed), False
        while not done:
            obs, _, terminated, truncated, info = env.step(agent.act(obs, deterministic))
            done = terminated or truncated
        yield {"return": info["episode"]["r"], "length": info["episode"]["l"]}


def play_goals(module, agent, env: gym.Env, seed: int, episodes: int, deterministic: bool) -> Iterator[dict]:
    """The same as `evaluate_goals` plays them, and whether the end was a success."""
    envs, rows = module.GoalVectorEnv([lambda: env]), agent.args.num_envs
    many = lambda seen: (x.repeat(rows, 0) for x in seen)  # a row alone can have other last bits
    for episode in range(episodes):
        policy = lambda *seen, at=episode % rows: agent.act_for(*many(seen), deterministic)[at : at + 1]
        played = module.play(envs, agent.task, episode, seed, policy)
        yield {"return": played.episode_return[0], "length": agent.task.length, "success": played.success[0]}


def watch(options: argparse.Namespace) -> list[dict]:
    """Plays, shows and prints; returns what was played. Raises ValueError for a mistake."""
    if options.episodes < 1 or (options.seed or 0) < 0:
        raise ValueError("--episodes must be at least 1, --seed at least 0")
    module, agent, args = load(options.run, options.file)
    module.prepare(dataclasses.replace(args, device="cpu"))  # the run's threads: its bits depend on them
    seed, found = args.seed + 100 if options.seed is None else options.seed, []
    env = make(module, args, options, f"{options.run.resolve().name}__seed-{seed}")
    text = lambda row: "  ".join(f"{name} {round(value, 2)}" for name, value in row.items())
    played = play_goals if hasattr(agent, "act_for") else play
    torch.manual_seed(seed)
    with contextlib.closing(env):
        for row in played(module, agent, env, seed, options.episodes, not options.stochastic):
            print(f"episode {len(found)}  {text(row)}", flush=True)  # numbered as its video
            found.append(row)
    means = {name: statistics.fmean(row[name] for row in found) for name in found[0]}
    print(f"mean of {len(found)}  {text(means)}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--episodes", type=int, default=5, help="default: 5")
    parser.add_argument("--seed", type=int, help="default: that of the run's evaluation, its own + 100")
    parser.add_argument("--stochastic", action="store_true", help="explore as in training")
    parser.add_argument("--file", type=Path, help="the run's file, where it is not in algos/")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--video", type=Path, metavar="FOLDER", help="film every episode; no window")
    shown.add_argument("--no-render", action="store_true", help="print returns; no window")
    try:
        watch(parser.parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.unraisablehook = lambda _: None  # renderers that were never whole complain when they are freed
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
