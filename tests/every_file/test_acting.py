"""What an agent that remembers may rely on: it is told of episodes, resumed exactly and evaluated apart."""

import pytest
import torch

from tests.conftest import differing, evaluations, load, tiny

sac = load("sac")


class Remembering(sac.Agent):
    """Acts on a decaying trace of its own noise and counts episodes; both are tensors, and so are saved."""

    acting = ("trace", "seen")

    def __init__(self, *args):
        super().__init__(*args)
        self.trace, self.seen = torch.zeros(1), torch.zeros(())
        self.log = []

    def begin_episode(self) -> None:
        self.log.append(self.trace.item())
        self.trace *= 0.5  # never all forgotten: what is left must survive a resume
        self.seen += 1

    def act(self, obs, deterministic=False):
        self.trace.mul_(0.9).add_(torch.randn(1))
        return (super().act(obs, deterministic) + 0.1 * self.trace.tanh().numpy()).clip(-1, 1)


@pytest.fixture
def remembering(monkeypatch):
    made = []
    monkeypatch.setattr(sac, "Agent", lambda *args: made.append(Remembering(*args)) or made[-1])
    return made


def train(folder, *flags: object):
    return sac.train(sac.parse(tiny("sac", "--runs-dir", folder, *flags)))


def test_told_of_every_episode_in_training_and_evaluation(remembering, tmp_path):
    run = train(tmp_path)
    state = torch.load(run / "final.pt", weights_only=True)
    (agent,) = remembering
    assert state["agent"]["seen"] == agent.seen == state["episode"] + 1  # the one under way, or just over
    assert (
        len(agent.log) == agent.seen + 2 * 4
    )  # two episodes in each of four evaluations, put back afterwards


def test_resume_keeps_what_is_remembered(remembering, tmp_path):
    short = train(tmp_path / "a", "--total-timesteps", 200)
    longer = sac.train(sac.parse(["--resume", str(short), "--total-timesteps", "300"]))
    planned = train(tmp_path / "b")
    assert evaluations(longer) == evaluations(planned)
    assert differing(longer / "final.pt", planned / "final.pt") == []


def test_evaluation_draws_and_remembers_apart(remembering, tmp_path):
    """However often one looks, training is the same; the same look twice sees the same."""
    often, seldom = train(tmp_path / "a", "--eval-every", 20), train(tmp_path / "b", "--eval-every", 300)
    assert differing(often / "final.pt", seldom / "final.pt", "/args/", "/rows/") == []
    first, again = evaluations(often)[1], evaluations(seldom)[1]
    assert first == again and float(first[2]) > 0
