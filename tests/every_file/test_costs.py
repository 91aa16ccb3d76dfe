"""No operation of an update may cost more because the replay holds more: elements counted, not time."""

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.algos.test_math import played_buffer
from tests.conftest import STEPWISE, TRIALS, load, tiny

PICKS = ("aten::index_select", "aten::index", "aten::gather", "aten::embedding")  # read what they return
ROWS, TIMES = 1_000, 10
KINDS = [(name, ()) for name in STEPWISE if name not in TRIALS]  # these fit all they have after each trial
KINDS += [("sac_vaml", ("--model-loss", loss)) for loss in ("vaml", "vagram", "mle")]
KINDS += [("sac_vaml", ("--model-loss", "vaml-unbiased", "--samples", 2))]
KINDS += [("ddpg_mve", ("--terminations",)), ("steve", ("--reduction", "last", "--tdk"))]
FEW = {"LOOKED_AT": 150, "HELD_OUT": 20}  # the bounds of what comes now and then, far below ROWS
STEPS = (75, 80, 100, 101)  # a fit, a diagnosis, a refresh, and nothing that comes now and then


class Work(TorchDispatchMode):
    """Elements that each operation reads or writes; views are free."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if not aliases or any(alias.is_write for alias in aliases):
            read = args[1:] if func.name().split(".")[0] in PICKS else args
            leaves = [x for x in pytree.tree_leaves((read, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.elements.append((max((x.numel() for x in leaves), default=0), func.name()))
        return result


def tiled(module, agent, played, times: int):
    """The agent's own kind of replay with the played rows `times` times, each time as new episodes."""
    rows, episodes = played.size, int(played.episode.max()) + 1
    buffer = agent.make_buffer(rows * times, module.make_env("tests.tasks:Cliff-v0"))
    for name, value in vars(played).items():
        if isinstance(value, torch.Tensor) and len(value) == rows:
            setattr(buffer, name, value.repeat(times, *[1] * (value.dim() - 1)))
        elif isinstance(value, np.ndarray) and len(value) == rows:
            setattr(buffer, name, np.tile(value, (times, *[1] * (value.ndim - 1))))
    buffer.episode += episodes * torch.arange(times, dtype=torch.int32).repeat_interleave(rows)
    buffer.added = rows * times
    return buffer


@pytest.mark.parametrize(("name", "flags"), KINDS)
def test_work_does_not_grow_with_the_replay(name, flags, monkeypatch):
    """Updates at 1 000 and at 10 000 transitions: neither the largest operation nor the sum of all grows.
    Refits of MBPO and MAAC are left out: they pass over the replay."""
    module = load(name)
    for constant in FEW.keys() & vars(module).keys():
        monkeypatch.setattr(module, constant, FEW[constant])
    refits = ("--model-interval", 1000) if name in ("mbpo", "maac") else ()
    flags = (*flags, "--total-timesteps", 20_000, *refits)
    found = []
    for times in (1, TIMES):
        torch.manual_seed(0)
        agent = module.Agent(module.parse(tiny(name, *flags)), 1, 1, torch.device("cpu"))
        played = played_buffer(module, agent, 200)
        agent.update(played, 61)  # the first, with what is done once
        buffer = tiled(module, agent, played, times * ROWS // 200)
        with Work() as work:
            for step in STEPS:
                agent.update(buffer, step)
        found.append(work.elements)
    (most, _), (grown, operation) = map(max, found)
    assert grown <= most, f"{operation}: {grown} elements, {most} at {ROWS} rows"
    small, large = (sum(count for count, _ in elements) for elements in found)
    assert large <= 1.02 * small


def test_the_counter_sees_what_grows():
    """A mean over the replay is work, a slice of it none, rows picked from it only what is picked."""
    rows = torch.zeros(1_000, 4)
    with Work() as work:
        rows[:500].index_select(0, torch.arange(3))
    assert max(work.elements)[0] == 12
    with Work() as work:
        rows[:, :2].mean(0)
    assert max(work.elements)[0] == 2_000


@pytest.mark.parametrize("name", ["sac_mve", "ddpg_mve", "mage", "sac_vaml"])
def test_some_places_are_distinct_and_as_likely_everywhere(name):
    places, device = load(name).some_places, torch.device("cpu")
    assert torch.equal(places(50, 50, device), torch.arange(50)) and len(places(0, 10, device)) == 0
    torch.manual_seed(0)
    for size in (60, 99, 100, 101, 300, 5_000):
        counts = torch.zeros(size)
        for _ in range(400):
            at = places(size, 50, device)
            assert len(at) == 50 == len(at.unique()) and (at.diff() > 0).all() and at.max() < size
            counts[at] += 1
        thirds = torch.stack([part.mean() for part in counts.tensor_split(3)])
        assert torch.allclose(thirds, torch.full((3,), 400 * 50 / size), rtol=0.1)
