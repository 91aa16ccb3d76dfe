"""CUDA graphs: on the CPU by a stand-in that records each operation and repeats it blindly, on a GPU by bits.

Like a real graph the stand-in executes nothing while it captures (state and generator are put back), repeats
the same operations on the same memory, knows nothing of Python, and may read no tensor. What depends on the
host, on the number of a step or on the inputs of the captured call comes out wrong.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.algos.test_math import played_buffer
from tests.conftest import ALGOS, EPISODIC, STEPWISE, differing, evaluations, flat, load, run, tiny

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
FLAGS = {"sac_mve": ("--tdk", "--num-particles", 2), "sac_svg_h": ("--horizon", 2), "steve": (), "td3": ()}
UNCAPTURED = {"pilco"}  # each of its plans is a search that reads its losses
CAPTURED = {"pets": {"plan", "fit_step"}}  # has no policy
ROWS = [(name, FLAGS.get(name, ())) for name in STEPWISE if name not in UNCAPTURED]
ROWS += [("sac_mve", ("--horizon", 0)), ("ddpg", ("--exploration", "parameter")), ("steve", ("--horizon", 0))]
ROWS += [("ddpg_mve", ("--exploration", "parameter", "--terminations")), ("sac_retrace", ("--horizon", 0))]
ROWS += [("sac_svg_h", ("--critic-expansion", kind)) for kind in ("tdk", "one-step")]
ROWS += [("steve", ("--reduction", kind)) for kind in ("last", "td-lambda")]
ROWS += [("sac_vaml", ("--model-loss", kind)) for kind in ("mle", "vaml", "vagram")]
ROWS += [("poplin", ("--distil", "gan"))]
ROWS += [("svg", ("--horizon", 0)), ("svg", ("--horizon", 3, "--soft", "--kl", 0.1))]
ROWS += [("svg", ("--imagine",)), ("svg", ("--whole-episodes",))]
ROWS += [("sac_svg_h", ("--value-loss", 1))]
ROWS += [("dreamer", ("--actor-gradient", "reinforce", "--critic-loss", "two-hot"))]
ROWS += [("dreamer", ("--no-cut", "--kl-floor", "mean", "--latent-std", "softplus", "--no-symlog"))]
RELEASED = ("--model-noise", "variance", "--mask", "released", "--terminal-actions", 3, "--entropy", "all")
ROWS += [("maac", RELEASED), ("maac", ("--model-noise", "none", "--actor-clip", 1))]


class Recorder(TorchDispatchMode):
    """Keeps (operation, arguments, result) of everything that is executed."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in func.name() for name in READS), f"{func.name()} while capturing"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


class FakeGraph:
    """torch.cuda.CUDAGraph for the CPU."""

    racing = False  # the capture's own stream, with its reset of the generator, may come after a replay

    def replay(self):
        assert not FakeGraph.racing, "replayed before the capture has been waited for"
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
                if aliases and not any(alias.is_write for alias in aliases):
                    continue  # a view still shows what it showed
                again = func(*args, **kwargs)
                if not aliases:
                    for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """graphs(module, agent): its methods as a GPU would run them; returns what is captured from then on."""

    def replace(module, agent) -> list[FakeGraph]:
        captured = []

        @contextlib.contextmanager
        def capture(graph):
            before, generator = copy.deepcopy(agent.state_dict()), torch.get_rng_state()
            with Recorder() as recorder:
                yield
            graph.operations = recorder.operations
            now = dict(flat(agent.state_dict()))
            with torch.no_grad():
                for name, value in flat(before):
                    if isinstance(value, torch.Tensor):
                        now[name].copy_(value)
            torch.set_rng_state(generator)
            FakeGraph.racing = True
            captured.append(graph)

        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(FakeGraph, "racing", False))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
        for name in agent.captured:
            setattr(agent, name, module.captured(getattr(agent, name)))
        return captured

    return replace


def twins(name: str, *flags: object):
    """Two agents with the same weights and a replay of each one's own kind with the same rows."""
    module = load(name)
    args = module.parse(tiny(name, *flags))
    agents = [module.Agent(args, 1, 1, torch.device("cpu")) for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    buffers = []
    for agent in agents:
        torch.manual_seed(0)
        buffers.append(played_buffer(module, agent))
    return module, agents, buffers


@pytest.mark.parametrize(("name", "flags"), ROWS)
def test_replayed_updates_are_the_eager_ones(name, flags, graphs):
    """The same weights, moments, metrics and random numbers after every one of 24 updates, to the bit."""
    module, agents, buffers = twins(name, *flags)
    found = graphs(module, agents[1])
    for step in range(61, 85):
        outcomes = []
        for agent, buffer in zip(agents, buffers, strict=True):
            torch.manual_seed(step)
            metrics = {key: value.clone() for key, value in agent.update(buffer, step).items()}
            outcomes.append((dict(flat(agent.state_dict())), metrics, torch.get_rng_state()))
        (a, metrics, generator), (b, other_metrics, other_generator) = outcomes
        assert a.keys() == b.keys() and metrics.keys() == other_metrics.keys()
        for key in a:
            assert torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key], key
        assert all(torch.equal(metrics[key], other_metrics[key]) for key in metrics)
        assert torch.equal(generator, other_generator)
    assert found and all(graph.operations for graph in found)


def test_every_file_names_what_is_captured(algo):
    """Methods of its agent, the policy and the update among them."""
    agent = load(algo).Agent
    if algo in UNCAPTURED:
        assert agent.captured == ()
        return
    wanted = CAPTURED.get(algo, {"policy_for" if algo in EPISODIC else "policy", "learn"})
    assert wanted <= set(agent.captured)
    assert all(callable(getattr(agent, name)) for name in agent.captured)


def test_observations_reach_the_normaliser_by_a_graph_too(graphs):
    """Ten observations of two replays, one of them seen by a graph from the fourth on: the same moments."""
    module, agents, buffers = twins("sac_svg_h")
    found = graphs(module, agents[1])
    for number in range(10):
        for buffer in buffers:
            buffer.add([float(number)], [0.0], 0.0, [0.0], False, 0)
    first, second = (agent.actor.normalizer.state_dict() for agent in agents)
    assert len(found) == 1 and first["seen"] == 210
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_believed_goes_on_from_graph_to_graph(graphs):
    """Ten steps of a recurrent policy, from the fourth on replayed: the same actions and beliefs."""
    module, agents, _ = twins("dreamer")
    found = graphs(module, agents[1])
    for agent in agents:
        agent.begin_episode()
    for step in range(10):
        actions = []
        for agent in agents:
            torch.manual_seed(step)
            actions.append(agent.act([0.1 * step], deterministic=step > 4).item())
        assert actions[0] == actions[1] and torch.equal(agents[0].belief, agents[1].belief)
    assert len(found) == 2 and agents[0].belief.any()


def test_each_signature_has_its_graph_after_three_ordinary_calls(graphs):
    """Two shapes and two values of the flag: four graphs; the results are those of the plain method."""
    module, agents, _ = twins("sac")
    found = graphs(module, agents[1])
    for call in range(1, 7):
        for size in (1, 3):
            for deterministic in (True, False):
                obs, results = torch.randn(size, 1), []
                for agent in agents:
                    torch.manual_seed(call)
                    results.append(agent.policy(obs, deterministic).clone())
                assert torch.equal(*results)
        assert len(found) == (4 if call > 3 else 0)


def test_graphs_are_no_part_of_the_state(graphs):
    module, agents, buffers = twins("sac")
    names = set(agents[1].state_dict())
    graphs(module, agents[1])
    for step in range(61, 67):
        agents[1].update(buffers[1], step)
    assert set(agents[1].state_dict()) == names


def test_arguments_are_copied_and_results_overwritten(graphs):
    """A replay reads what the call was given, in its own memory, and hands out the same tensors again."""
    module, agents, _ = twins("sac")
    agents[1].captured, agents[1].double = ("double",), lambda pair, scale: {"sum": pair[0] * scale + pair[1]}
    graphs(module, agents[1])
    calls = [((torch.full((2,), float(i)), torch.ones(2)), 2) for i in range(6)]
    results = [agents[1].double(*call)["sum"] for call in calls]
    assert [r[0].item() for r in results[:3]] == [1, 3, 5]
    assert results[3] is results[4] is results[5] and results[5][0].item() == 11
    assert calls[5][0][0].tolist() == [5, 5]


def test_the_stand_in_notices_what_a_graph_would_break(graphs):
    """A number of the host is frozen, a tensor that is read is an error."""
    module, agents, _ = twins("sac")
    agent, count = agents[1], [0]

    def frozen(x):
        count[0] += 1
        return x + count[0]

    agent.captured, agent.frozen, agent.reads = (
        ("frozen", "reads"),
        frozen,
        lambda x: x * 2 if x.sum() > 0 else x,
    )
    graphs(module, agent)
    assert [agent.frozen(torch.zeros(1)).item() for _ in range(6)] == [1, 2, 3, 4, 4, 4]
    for _ in range(3):
        agent.reads(torch.ones(1))
    with pytest.raises(AssertionError, match="while capturing"):
        agent.reads(torch.ones(1))


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@ON_GPU
@pytest.mark.parametrize("name", ALGOS)
def test_captured_is_eager_on_a_gpu(name, tmp_path):
    """300 updates, captured and not: the same evaluations, weights, moments, replay and generators."""
    flags = ("--device", "cuda", *FLAGS.get(name, ()))
    flags += ("--total-timesteps", 400) if name not in EPISODIC else ("--total-timesteps", 2000)
    kinds = ("--no-cuda-graphs", "--cuda-graphs")
    eager, graphed = (run(name, tmp_path / kind, *flags, kind) for kind in kinds)
    assert evaluations(eager) == evaluations(graphed)
    assert differing(eager / "final.pt", graphed / "final.pt", "/args/cuda_graphs") == []
