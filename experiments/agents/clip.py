"""A moving picture of a trained agent on a MuJoCo task, small enough for a page.

    python -m experiments.agents.clip agents/HalfCheetah-v5 docs/figures/cheetah.gif --camera track

Plays the first episode of the run's own evaluation with the deterministic policy and keeps every second step
from --first to --last, at the task's own speed, as an animated GIF. Without a display MuJoCo draws with
MUJOCO_GL=osmesa or egl in the environment. Exit code 2 for a mistake, which leaves nothing on disk.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

from experiments.agents.watch import load
from experiments.report.commands import Parser

EVERY = 2  # steps of a picture


def pictures(options: argparse.Namespace) -> tuple[list[np.ndarray], float]:
    """Pictures [height, width, 3] of the episode, seconds of each. Raises ValueError if there are none."""
    module, agent, args = load(options.run, None)
    if hasattr(agent, "act_for"):
        raise ValueError(f"{options.run}: must be of a task without goals")
    module.prepare(dataclasses.replace(args, device="cpu"))
    view = {"render_mode": "rgb_array", "width": options.width, "height": options.width * 9 // 16}
    view |= {"camera_name": options.camera} if options.camera else {}
    found = []
    try:
        env = module.make_env(args.env_id, json.dumps(json.loads(args.env_kwargs) | view))
        with contextlib.closing(env):
            model = getattr(env.unwrapped, "model", None)
            names = [model.camera(i).name for i in range(model.ncam)] if model else []
            if options.camera and options.camera not in names:
                rule = f"one of {', '.join(names)}" if names else f"left out: {args.env_id} has none by name"
                raise ValueError(f"--camera {options.camera}: must be {rule}")
            torch.manual_seed(args.seed + 100)
            obs, done, step = module.begin_episode(env, agent, args.seed + 100), False, 0
            while not done and step < options.last:
                obs, _, terminated, truncated, _ = env.step(agent.act(obs, True))
                done, step = terminated or truncated, step + 1
                if step >= options.first and step % EVERY == 0:
                    found.append(env.render())
            seconds = EVERY / env.metadata["render_fps"]
    except ValueError:
        raise
    except Exception as error:  # tasks and renderers fail in many ways
        raise ValueError(f"{args.env_id}: cannot be drawn: {error!r}") from None
    if len(found) < 2 or not isinstance(found[0], np.ndarray):
        end = f"the episode's end, step {step}"
        raise ValueError(f"--first {options.first}: must leave two pictures before {end}")
    return found, seconds


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="its folder, or a kept one")
    parser.add_argument("out", type=Path, help="file to write, .gif")
    parser.add_argument("--first", type=int, default=60, help="step (default: 60)")
    parser.add_argument("--last", type=int, default=160, help="step (default: 160)")
    parser.add_argument("--width", type=int, default=400, help="pixels; 16 to 9 (default: 400)")
    parser.add_argument("--camera", help="one of the task's, as track (default: the task's own view)")
    options = parser.parse_args(argv)
    try:
        if options.out.suffix != ".gif":
            raise ValueError(f"{options.out}: must end in .gif")
        for name, low in (("first", 1), ("last", options.first + EVERY), ("width", 32)):
            if getattr(options, name) < low:
                raise ValueError(f"--{name} {getattr(options, name)}: must be at least {low}")
        found, seconds = pictures(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(options.out, found, duration=round(1000 * seconds), loop=0)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{options.out}: {len(found)} pictures, {options.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
