"""Studies of how models are fitted: windows of several steps, artificial worlds, snapshots of a run."""

import types

import pytest
import torch

from experiments.studies import compounding_error, vaml_artificial, vaml_frozen
from tests.conftest import load, long, rows_of, tool

COMPOUNDING = (
    "--tasks TorqueBall-v0 --transitions 1000 --updates 60 --members 2 --hidden 16 --horizon 6".split()
)
COMPOUNDING += "--seeds 1 --threads 1".split()


def test_compounding_error_resumes(tmp_path):
    """One row for each L and k; a table cut in the middle is completed to the same numbers."""
    done = tool("studies.compounding_error", *COMPOUNDING, "--csv", tmp_path / "a.csv")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "a.csv")
    assert [(r["loss_steps"], int(r["k"])) for r in rows] == [(n, k) for n in "15" for k in range(1, 7)]
    assert all(float(r["error"]) > 0 and float(r["unexplained"]) > 0 for r in rows)
    assert "| TorqueBall-v0 | 5 |" in done.stdout
    lines = (tmp_path / "a.csv").read_text().splitlines(keepends=True)
    (tmp_path / "b.csv").write_text("".join(lines[:7]))
    assert tool("studies.compounding_error", *COMPOUNDING, "--csv", tmp_path / "b.csv").returncode == 0
    assert rows_of(tmp_path / "b.csv") == rows


def test_errors_of_a_drifting_model_compound():
    """A model that adds 0.1 to every dimension and step is off by 0.1 k, whatever the deviations: σ = 1."""
    module = compounding_error
    minimum = load("ddpg_mve_min")
    model = minimum.DynamicsEnsemble(2, minimum.GoalTask(2, 1, 1, 9, [0], 0.0, False, []), 1, 4)
    model.layers[-1].weight.data.zero_(), model.layers[-1].bias.data.zero_()
    model.change.mean.fill_(0.1)
    obs = torch.zeros(1, 5, 4, 2) + torch.arange(4.0)[:, None]
    found = module.errors(model, obs, torch.zeros(1, 5, 3, 1))
    assert [e for e, _, _ in found] == pytest.approx([0.9, 1.8, 2.7], rel=1e-5)  # the truth moves by 1
    assert [u for _, _, u in found] == pytest.approx([0.9] * 3, rel=1e-5)
    obs = torch.cat([obs, obs[:, :2] + 100 * (torch.arange(4.0)[:, None] > 0)], 1)  # two of seven far off
    (error, median, _), *_ = module.errors(model, obs, torch.zeros(1, 7, 3, 1))
    assert median == pytest.approx(0.9, rel=1e-5)
    assert error == pytest.approx(((5 * 0.9**2 + 2 * 100.9**2) / 7) ** 0.5, rel=1e-5)


ARTIFICIAL = "--widths 8 --seeds 1,2 --transitions 300 --epochs 3 --threads 1".split()


@long
def test_artificial_worlds_resume(tmp_path):
    """Cells of two worlds, three losses and the truth; the first cell kept, the second comes out the same."""
    done = tool("studies.vaml_artificial", *ARTIFICIAL, "--csv", tmp_path / "a.csv")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "a.csv")
    assert len(rows) == 2 * 2 * 5 and {r["c"] for r in rows} == {"1", "0.001", "0", "truth", "mean"}
    lines = (tmp_path / "a.csv").read_text().splitlines(keepends=True)
    (tmp_path / "b.csv").write_text("".join(lines[:11]))
    assert tool("studies.vaml_artificial", *ARTIFICIAL, "--csv", tmp_path / "b.csv").returncode == 0
    kept = rows_of(tmp_path / "b.csv")
    assert kept[:10] == rows[:10] and len(kept) == 20
    truth = [r for r in rows if r["c"] in ("truth", "mean")]
    for realizable in ("yes", "no"):  # the world is the same
        mine = [(r["c"], r["seed"]) for r in truth if r["realizable"] == realizable]
        assert mine == [("truth", "1"), ("truth", "2"), ("mean", "1"), ("mean", "2")]


def test_the_truth_looks_twice_as_bad_with_one_sample():
    """Property 6 in a random world: error of the world itself 2 v at n = 1, of its mean v."""
    module, vaml = vaml_artificial, load("sac_vaml")
    torch.manual_seed(0)
    world = vaml.DeltaGaussian(1, 4, 2, 2, 16, low=-3.0, high=-1.0).requires_grad_(False)
    values = module.Values(vaml, 1).requires_grad_(False)
    module.xavier(world)
    data = module.live(world, 20_000)
    (truth,), (mean,) = (module.tested(vaml, world, values, data, still) for still in (False, True))
    assert truth["value_error_1"] / mean["value_error"] == pytest.approx(2, rel=0.05)
    assert truth["value_error"] / mean["value_error"] == pytest.approx(1 + 1 / 32, rel=0.05)
    assert mean["std"] == 0 and truth["std"] > 0.1


def test_stacked_fits_stop_member_by_member():
    """A member that has stopped leaves the stack with its best weights; the others go on as if it stayed."""
    module, vaml = vaml_artificial, load("sac_vaml")
    torch.manual_seed(0)
    model = vaml.DeltaGaussian(2, 4, 2, 1, 8)
    values, data = module.Values(vaml, 1).requires_grad_(False), [torch.randn(1, 50, n) for n in (4, 2, 4)]
    scores = iter(
        [[3.0, 3.0], *([4.0, 3.0 - 0.1 * k] for k in range(1, 6)), *([2 - 0.1 * k] for k in range(20))]
    )
    original, seen = module.losses, []

    def losses(*args):
        loss = original(*args)
        if torch.is_grad_enabled():
            return loss
        seen.append([p.detach().clone() for p in args[1].parameters()])
        return torch.tensor(next(scores))

    module.losses = losses
    args = type("Args", (), {"epochs": 12, "samples": 2})
    owner, shares = torch.zeros(2, dtype=torch.long), torch.tensor([1.0, 0.0])
    stopped = module.fit(vaml, model, values, data, owner, shares, args, "test")
    module.losses = original
    assert stopped == [6, 12]  # patience 5 after the first epoch; the other improves to the end
    assert [len(s[0]) for s in seen] == [2] * 6 + [1] * 6 and model.members == 2
    for parameter, first, last in zip(model.parameters(), seen[0], seen[-1], strict=True):
        assert torch.equal(parameter[0], first[0]) and torch.equal(parameter[1], last[0])


def test_losses_of_a_stack_are_those_of_its_members():
    """(9) member by member, c = 1, 0.5, 0, at n = 1 000 (noise differs); what weighs 0 is not evaluated."""
    module, vaml = vaml_artificial, load("sac_vaml")
    torch.manual_seed(0)
    model, values = vaml.DeltaGaussian(3, 4, 2, 1, 8), module.Values(vaml, 3)
    batch = [torch.randn(3, 20, n) for n in (4, 2, 4)]
    value, shares = values(batch[2]), torch.tensor([1.0, 0.5, 0.0])
    judges = module.chosen(values, torch.tensor([1, 2]))
    with torch.no_grad():
        found = module.losses(vaml, model, judges, [*batch, value], shares, 4_000)
        mean, log_std = model(*batch[:2])
        likely = vaml.likelihood_loss(batch[2] - batch[0], mean, log_std, model.varying)
        drawn = values(model.draw(*batch[:2], 4_000))
        aware = vaml.value_aware_loss(value, drawn)
        assert torch.allclose(found, shares * likely + (1 - shares) * aware, rtol=5e-2)
        assert torch.allclose(found[0], likely[0])
        broken = types.SimpleNamespace(likelihood_loss=None, value_aware_loss=vaml.value_aware_loss)
        zero = torch.zeros(3)
        assert torch.allclose(
            module.losses(broken, model, values, [*batch, value], zero, 4_000), aware, rtol=5e-2
        )
        broken = types.SimpleNamespace(likelihood_loss=vaml.likelihood_loss, value_aware_loss=None)
        assert torch.equal(module.losses(broken, model, None, [*batch, value], torch.ones(3), 4_000), likely)


FROZEN = (
    "--env-id Pendulum-v1 --seeds 1 --steps 400 --every 200 --learning-starts 100 --batch-size 16".split()
)
FROZEN += "--hidden 16 --fit-steps 5 --samples 2 --threads 1".split()


@long
def test_frozen_snapshots_resume(tmp_path):
    """SAC in stages, three fits at each; the run is that of one stage, to the bit; fits resume."""
    flags = [*FROZEN, "--runs-dir", tmp_path / "runs"]
    done = tool("studies.vaml_frozen", *flags, "--csv", tmp_path / "a.csv")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "a.csv")
    assert [(r["step"], r["c"]) for r in rows] == [
        (s, c) for s in ("200", "400") for c in ("1", "0.001", "0")
    ]
    lines = (tmp_path / "a.csv").read_text().splitlines(keepends=True)
    (tmp_path / "b.csv").write_text("".join(lines[:3]))
    again = tool("studies.vaml_frozen", *flags, "--csv", tmp_path / "b.csv")
    assert again.returncode == 0 and rows_of(tmp_path / "b.csv") == rows
    known = {name: int(value) if value.isdigit() else value for name, value in rows[0].items()}
    args = types.SimpleNamespace(**known, seeds=[1], threads=1, runs_dir=tmp_path / "none", csv=None)
    assert vaml_frozen.measure(args, rows, None) == rows
    assert not args.runs_dir.exists()  # a seed that has all its rows is not run again
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "runs").rglob("*"))
    longer = ["--hidden", 8, "--steps", 600, "--csv", tmp_path / "c.csv"]  # nothing goes on from them
    other = tool("studies.vaml_frozen", *flags, *longer)
    assert other.returncode == 2 and "must not hold snapshots of other settings" in other.stderr
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "runs").rglob("*"))
    sac = load("sac")
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if path.name != "snapshots"]
    plain = "--env-id Pendulum-v1 --total-timesteps 400 --learning-starts 100 --batch-size 16 --hidden 16"
    plain += f" --num-threads 1 --eval-every 200 --device cpu --runs-dir {tmp_path / 'plain'}"
    whole = sac.train(sac.parse(plain.split()))
    a, b = (torch.load(path / "final.pt", weights_only=True)["agent"]["actor"] for path in (folder, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "flags", "text"),
    [
        ("compounding_error", ["--horizon", 0], "--horizon 0: must be a whole number, at least 1"),
        ("compounding_error", ["--tasks", "NoSuchTask-v0"], "--tasks NoSuchTask-v0: must be a task"),
        ("compounding_error", ["--loss-steps", "60"], "--loss-steps 60: must be at most 50 on TorqueBall-v0"),
        (
            "compounding_error",
            ["--tasks", "no_such_module:X-v0"],
            "--tasks no_such_module:X-v0: must be a task",
        ),
        ("compounding_error", ["--tasks", "CartPole-v1"], "--tasks CartPole-v1: must be a task"),
        ("compounding_error", ["--figure", "a.xyz"], "--figure a.xyz: must end in .png, .pdf or .svg"),
        ("vaml_artificial", ["--widths", "a"], "--widths a: must be whole numbers with commas between"),
        ("vaml_artificial", ["--csv", "/"], "--csv /: must be a file that can be written, not a folder"),
        ("vaml_artificial", ["--transitions", 4], "--transitions 4: must be at least 5"),
        ("vaml_artificial", ["--widths", ""], "--widths: must be numbers of at least 1"),
        ("vaml_frozen", ["--every", 300, "--steps", 200], "--every 300: must be at most --steps 200"),
        ("vaml_frozen", ["--env-id", "NoSuchTask-v0"], "--env-id NoSuchTask-v0: must be"),
    ],
)
def test_mistakes_of_the_new_experiments(name, flags, text, tmp_path):
    base = {"compounding_error": COMPOUNDING, "vaml_artificial": ARTIFICIAL, "vaml_frozen": FROZEN}[name]
    runs = ["--runs-dir", tmp_path / "runs"] if name == "vaml_frozen" else []
    done = tool(f"studies.{name}", *base, *runs, "--csv", tmp_path / "new" / "a.csv", *flags)
    assert done.returncode == 2 and text in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["compounding_error", "vaml_artificial", "vaml_frozen"])
def test_foreign_tables_are_left_alone(name, tmp_path):
    base = {"compounding_error": COMPOUNDING, "vaml_artificial": ARTIFICIAL, "vaml_frozen": FROZEN}[name]
    runs = ["--runs-dir", tmp_path / "runs"] if name == "vaml_frozen" else []
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    done = tool(f"studies.{name}", *base, *runs, "--csv", tmp_path / "other.csv")
    assert done.returncode == 2 and "must be a table of this script, or not exist" in done.stderr
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"
