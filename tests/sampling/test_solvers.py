"""The table of solvers: entries describe their loops, and commands read it without torch."""

import subprocess

import pytest
import torch

from sit_atconv.sampling import SOLVERS, Solver, default_solver, time_grid
from sit_atconv.sampling.solvers import find_solver
from tests.conftest import python


@pytest.mark.parametrize("name", SOLVERS)
def test_an_entry_tells_when_its_loop_evaluates_the_velocity(name):
    solver, times, asked = SOLVERS[name], time_grid(5, 0.1, 0.9), []

    def velocity(x, t, *r):
        asked.append(t.item())
        return -x

    of_sde = (lambda x, t: t, torch.ones(2, 3), times, torch.zeros_like)
    solver.loop(velocity, *(of_sde if solver.is_sde else of_sde[1:] if solver.jumps else of_sde[1:3]))
    assert solver.is_adaptive or len(asked) == 5 * solver.evaluations
    assert (max(asked) >= times[-1]) == solver.at_last_time and min(asked) == pytest.approx(0.1)


def test_the_summary_of_an_entry():
    assert [SOLVERS[name].summary for name in ("euler", "sde-heun", "dopri5", "dpm++")] == [
        "NFE 1 per step",
        "NFE 2 per step, adds noise",
        "chooses its own steps for the whole batch",
        "NFE 1 per step, linear interpolant only",
    ]
    assert [default_solver(path) for path in ("linear", "gvp", "vp")] == ["unipc", "heun", "heun"]
    assert default_solver("linear", two_times=True) == "jump" and "MeanFlow models only" in SOLVERS["jump"].summary


def test_a_solver_is_found_by_name_path_entry_or_loop():
    assert find_solver("heun") is SOLVERS["heun"] is find_solver(SOLVERS["heun"])
    assert find_solver(f"{__name__}.OWN", is_sde=True) is OWN
    assert find_solver(OWN.loop, is_sde=True) == OWN
    for name in ("sde-heun", OWN):
        with pytest.raises(ValueError, match="is for sample_sde"):
            find_solver(name)
    with pytest.raises(ValueError, match=r"must be one of euler, heun, .*, or your own as module\.NAME, not 'rk9'"):
        find_solver("rk9")


def test_commands_read_the_tables_without_torch():
    code = (
        "import sys, sit_atconv.sampling, sit_atconv.generation.generate as g, sit_atconv.studies.sweep as s\n"
        "g.make_parser(), s.make_parser()\n"
        "print(*{'torch', 'numpy', 'diffusers'} & set(sys.modules))\n"
        "from sit_atconv.sampling import guided; print(guided.__name__ in dir(sit_atconv.sampling))"
    )
    done = subprocess.run(python("-c", code), capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["", "True"], done.stderr


OWN = Solver(lambda drift, diffusion, x, times, randn: x, is_sde=True)


def test_jumps_go_from_time_to_time_or_put_noise_back():
    times, spans = time_grid(2), []

    def u(x, t, r):
        spans.append((t.item(), r.item()))
        return x + 1

    x = torch.ones(2, 3)
    assert torch.equal(SOLVERS["jump"].loop(u, x, times, None), torch.full((2, 3), 3.5))
    assert spans == [(0.0, 0.5), (0.5, 1.0)]
    spans.clear()  # to data: 3; back to 0.5 with noise 4: 3.5; and to data again
    found = SOLVERS["jump-renoise"].loop(u, x, times, lambda x: torch.full_like(x, 4.0))
    assert torch.equal(found, torch.full((2, 3), 5.75)) and spans == [(0.0, 1.0), (0.5, 1.0)]
