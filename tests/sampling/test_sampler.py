import pytest
import torch

from sit_atconv.flow import as_velocity, get_interpolant
from sit_atconv.sampling import (
    SOLVERS,
    Counted,
    Guidance,
    Sampler,
    SampleStream,
    Solver,
    guided,
    sample_ode,
    sample_sde,
    time_grid,
)
from tests.models.test_sit import randomised

Y = torch.tensor([1, 2, 3])
NOISE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
EVALUATIONS = {"euler": 6, "heun": 12, "unipc": 6, "dpm++": 6, "sde-euler": 6, "sde-heun": 11}


class Noting:
    """Guidance that records, for each batch, the step of every call."""

    batches = []  # noqa: RUF012

    def __init__(self, model, y, sampler, weak):
        self.velocity, self.steps = guided(model, y, cfg=sampler.cfg, weak=weak), []
        self.batches.append(self.steps)

    def __call__(self, x, t, step, num_steps, *r):
        self.steps.append((step, num_steps))
        return self.velocity(x, t, *r)


NOTING = Guidance(Noting)
WRONG_ENTRY = Solver(SOLVERS["heun"].loop, evaluations=1, at_last_time=True)


@pytest.fixture(scope="module")
def model():
    return randomised()


@pytest.mark.parametrize(("solver", "evaluations"), EVALUATIONS.items())
def test_evaluations_are_counted(model, solver, evaluations):
    counted = Counted(model)
    Sampler(cfg=3.0, solver=solver, steps=6)(counted, NOISE, Y)
    assert (counted.evaluations, counted.samples) == (evaluations, evaluations * 6)
    counted = Counted(model)
    Sampler(cfg=1.0, solver=solver, steps=6)(counted, NOISE, Y)
    assert (counted.evaluations, counted.samples) == (evaluations, evaluations * 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_custom_guidance_gets_the_step_and_has_its_own_state_for_each_batch(model, solver):
    Noting.batches.clear()
    model = randomised(two_times=True) if SOLVERS[solver].jumps else model
    samplers = [Sampler(cfg=2.0, solver=solver, steps=4, guidance=name) for name in ("cfg", f"{__name__}.NOTING")]
    streams = [SampleStream(0, range(3)) for _ in range(3)]
    x = [samplers[i > 0](model, NOISE, Y, randn=stream.randn_like) for i, stream in enumerate(streams)]
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2]) and len(Noting.batches) == 2
    a_step = SOLVERS[solver].evaluations
    steps = [(i, 4) for i in range(4) for _ in range(a_step or 0)][: EVALUATIONS.get(solver)]
    if solver == "sde-heun":
        del steps[-1]  # the last step is one evaluation
    assert all(batch == steps if a_step else set(batch) == {(None, None)} for batch in Noting.batches)


def test_a_solver_with_a_higher_nfe_than_its_entry_says_is_refused(model):
    with pytest.raises(ValueError, match=r"an NFE above 1 per step: .* in its Solver\(loop, evaluations="):
        Sampler(cfg=1.0, solver=f"{__name__}.WRONG_ENTRY", steps=4)(model, NOISE, Y)


def old_guidance(model, y, sampler, weak):
    velocity = guided(model, y, cfg=sampler.cfg)
    return lambda x, t, step, num_steps: velocity(x, t)


WITHOUT_END = Guidance(old_guidance)


def test_a_guidance_that_does_not_take_the_end_of_a_jump_is_refused():
    with pytest.raises(ValueError, match=r"takes no end r of a jump: .*docs/extending\.md"):
        Sampler(cfg=2.0, solver="jump", guidance=f"{__name__}.WITHOUT_END")(randomised(two_times=True), NOISE, Y)


def test_settings_reach_guidance_and_solver(model):
    velocity = guided(model, Y, cfg=3.0, channels=3, interval=(0.2, 0.9))
    expected = sample_ode(velocity, NOISE, solver="heun", times=time_grid(5, shift=2.0))
    sampler = Sampler(cfg=3.0, cfg_channels=3, cfg_interval=(0.2, 0.9), solver="heun", steps=5, shift=2.0)
    assert torch.equal(sampler(model, NOISE, Y), expected)
    times = (0.0, 0.1, 0.5, 1.0)
    expected = sample_ode(guided(model, Y, cfg=lambda t: 1 + 2 * 2 * t), NOISE, times=times)
    sampler = Sampler(cfg=3.0, cfg_schedule="linear", solver="euler", times=times)
    assert torch.equal(sampler(model, NOISE, Y), expected)


def test_settings_reach_the_sde(model):
    path, streams = get_interpolant("gvp"), [SampleStream(0, range(3)) for _ in range(2)]
    expected = sample_sde(
        guided(model, Y, cfg=2.0),
        NOISE,
        path,
        solver="heun",
        num_steps=7,
        diffusion_form="linear",
        diffusion_norm=0.5,
        last_step="tweedie",
        last_step_size=0.1,
        randn=streams[0].randn_like,
    )
    sampler = Sampler(
        cfg=2.0,
        solver="sde-heun",
        steps=7,
        diffusion_form="linear",
        diffusion_norm=0.5,
        last_step="tweedie",
        last_step_size=0.1,
    )
    assert torch.equal(sampler(model, NOISE, Y, path="gvp", randn=streams[1].randn_like), expected)


@pytest.mark.parametrize("prediction", ["noise", "score", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("solver", ["euler", "heun", "sde-euler"])
def test_every_prediction_is_sampled_at_times_where_it_is_finite(model, path, prediction, solver):
    x = Sampler(cfg=1.0, solver=solver, steps=20)(model, NOISE, Y, path=path, prediction=prediction)
    assert x.isfinite().all()
    grid = Sampler(solver=solver).grid(path, prediction)
    t0, t1 = get_interpolant(path).interval(prediction)
    assert grid[0] == t0 and grid[-1] == (1.0 if solver == "sde-euler" else t1)


def test_a_weak_model_guides(model):
    weak = randomised(depth=1)
    path = get_interpolant("linear")
    expected = sample_ode(guided(model, Y, cfg=2.0, weak=as_velocity(weak, path)), NOISE, num_steps=4)
    assert torch.equal(Sampler(cfg=2.0, solver="euler", steps=4)(model, NOISE, Y, weak=weak), expected)


@pytest.mark.parametrize(
    ("options", "model_options", "message"),
    [
        (dict(cfg_interval=(0.8, 0.3)), {}, r"guidance interval must be .* not \[0\.8, 0\.3\]"),
        (dict(cfg_interval=(0.3, 1.2)), {}, r"not \[0\.3, 1\.2\]"),
        (dict(solver="unipc"), dict(path="gvp"), "unipc needs the linear interpolant.* gvp: use one of euler, heun"),
        (dict(solver="dpm++"), dict(path="vp"), "sde-heun"),
        (dict(cfg=2.0), dict(null_label=None), r"cfg = 2\.0 needs a null label"),
        (dict(cfg_schedule="linear"), dict(null_label=None), "cfg = a schedule needs a null label"),
        (dict(times=(0.0, 1.1)), {}, "from 0 to 1.1"),
        (dict(times=(0.0, 0.5)), {}, "from 0 to 0.5"),
        (dict(times=(0.4, 1.0)), {}, "from 0.4 to 1"),
        (dict(times=(0.0, 1.0)), dict(prediction="noise"), r"\[0\.001, 0\.999\].* finite, not 0"),
        (dict(times=(0.0, 0.5, 1.0), solver="heun"), dict(path="vp"), r"\[0, 0\.999\].* finite, not 1"),
        (dict(solver="sde-euler", last_step_size=1.0), {}, r"last_step_size must be between 0\.001 and 1, not 1\.0"),
        (dict(solver="sde-euler", last_step_size=5e-4), {}, r"not 0\.0005"),
        (dict(solver="rk9"), {}, "solver must be one of euler, .*, not 'rk9'"),
        (dict(solver="jump"), {}, "jump needs a model with two times, which MeanFlow trains"),
        (dict(solver="jump", cfg=2.0), dict(two_times=True, trained_cfg=3.0), "have learned the guidance scale 3, and"),
        (dict(cfg=2.0), dict(trained_cfg=3.0), "use cfg = 1 and no other option of guidance, or --guidance two-branch"),
        (dict(guidance="pull"), {}, "guidance must be one of cfg, two-branch, or your own .*, not 'pull'"),
        (dict(last_step="best"), {}, "last_step must be one of none, .*, not 'best'"),
        (dict(diffusion_form="cubic"), {}, "diffusion_form must be one of constant, .*, not 'cubic'"),
        (dict(steps=0), {}, "num_steps must be at least 1, not 0"),
    ],
)
def test_settings_that_do_not_fit_raise_an_error(options, model_options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options).check(**(dict(path="linear", prediction="velocity", null_label=10) | model_options))


def test_settings_that_fit_raise_no_error():
    Sampler(solver="unipc", cfg_interval=(0.3, 0.8)).check("linear", "data", 10)
    Sampler(solver="euler", times=(0.0, 0.5, 1.0)).check("vp", "velocity", 10)  # evaluates at 0 and 0.5
    Sampler(diffusion_form="SBDM").check("gvp", "score", 10)
    Sampler(solver="sde-euler").check("vp", "noise", None, weak=True)
    Sampler(guidance=f"{__name__}.NOTING", cfg=3.0).check("linear", "velocity", None)  # needs no null label


def test_settled_settings_are_equal_if_the_samples_are():
    assert Sampler().settled("linear").solver == "unipc" and Sampler().settled("gvp").solver == "heun"
    assert Sampler(last_step="none").settled("linear") == Sampler(solver="unipc").settled("linear")
    assert Sampler(times=(0.0, 1.0), steps=7, shift=2.0).settled("vp") == Sampler(times=(0.0, 1.0)).settled("vp")
    assert Sampler(solver="dopri5", steps=7).settled("gvp") == Sampler(solver="dopri5").settled("gvp")
    assert Sampler(solver="sde-euler", last_step="none").settled("vp").last_step == "none"
    jump = Sampler().settled("linear", 10, two_times=True)
    assert (jump.solver, jump.steps, jump.cfg) == ("jump", 1, 1.0)
    assert Sampler(cfg_interval=(0.2, 0.8)).settled("linear", 10, two_times=True).cfg == 4.0  # it asks for guidance
    assert Sampler().settled("linear", 10, weak=True, two_times=True).cfg == 4.0
    assert Sampler().settled("linear", 10, trained_cfg=2.0).cfg == 1.0 and Sampler().settled("linear", 10).steps == 25
    Sampler(cfg=2.0, guidance="two-branch").check("linear", "velocity", 10, trained_cfg=3.0)
    assert "guidance" not in Sampler().settings() and Sampler(guidance="own.x").settings()["guidance"] == "own.x"


def test_grids():
    shifted = Sampler(solver="sde-euler", steps=4, shift=2.0).grid("linear", "velocity")
    assert torch.equal(shifted, torch.cat([time_grid(3, 0, 0.96, 2.0), torch.ones(1)]))
    assert torch.equal(Sampler(solver="dpm++", steps=4).grid("linear", "velocity"), time_grid(4, 1e-3))
    assert torch.equal(Sampler(steps=4, times=(0, 0.5, 1)).grid("linear", "data"), torch.tensor([0, 0.5, 1]).double())
