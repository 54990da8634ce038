"""MeanFlow through the commands: exact resume, processes, warm starts, jumps, and errors."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sit_atconv.checkpoints.warm_start import start_from
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.models import SiT
from sit_atconv.pipeline import SiTPipeline
from sit_atconv.sampling import Sampler
from tests.commands.test_train import EXACT, TRAIN, assert_same_run, state_of, stats_of
from tests.conftest import load_command, relative_error

GENERATE = "sample/generate.py"
MEAN_FLOW = [*EXACT, "--model.two_times", "true", "--flow", "MeanFlow", "--preview.solver", "jump"]
JUMPS = [*MEAN_FLOW, "--preview.num_steps", "[1,4]", "--preview.every", "4"]


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """An uninterrupted MeanFlow run of four steps."""
    run = tmp_path_factory.mktemp("mean-flow") / "run"
    codes, output = launch(TRAIN, [*JUMPS, "--out", run])
    assert codes == [0], output
    return run


def test_files_of_a_run(whole):
    assert {path.name for path in (whole / "samples").iterdir()} == {f"step-0000004-{n}-steps.png" for n in (1, 4)}
    lines = stats_of(whole)
    assert all(line["flow/error_of_flow"] > 0 and line["flow/error_of_jumps"] > 0 for line in lines)
    weights = load_weights(str(whole))
    assert weights.traits == {"null_label": 10, "two_times": True, "trained_cfg": 1.0}
    assert weights.model.r_embedder.mlp[2].weight.abs().max() > 0  # it is trained


@pytest.mark.parametrize(
    ("processes", "accumulation", "more"),
    [
        (1, 1, []),
        pytest.param(2, 3, [], marks=pytest.mark.slow),
        pytest.param(1, 1, ["--flow.derivative", "difference"], marks=pytest.mark.slow),
        pytest.param(1, 1, ["--train.precision", "bf16", "--flow.guidance", "2"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_bitwise(launch, whole, tmp_path, processes, accumulation, more):
    argv = [*JUMPS, "--train.accumulation", accumulation, *more]
    run, expected = tmp_path / "run", whole
    if (processes, more) != (1, []):
        expected = tmp_path / "whole"
        codes, output = launch(TRAIN, [*argv, "--out", expected], processes)
        assert codes == [0] * processes, output
    codes, output = launch(TRAIN, [*argv, "--out", run], processes, die="after the first checkpoint")
    assert codes == [-9] * processes, output
    codes, output = launch(TRAIN, [*argv, "--out", run], processes)
    assert codes == [0] * processes and "step 2 of 4" in output, output
    assert_same_run(expected, run)


@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (2, ["--train.accumulation", "3"]),
        pytest.param(1, ["--train.compile", "true"], marks=pytest.mark.slow),
        pytest.param(2, ["--train.compile", "true"], marks=pytest.mark.slow),
    ],
)
def test_processes_micro_batches_and_compilation_change_only_rounding(launch, whole, tmp_path, processes, more):
    run = tmp_path / "run"
    codes, output = launch(TRAIN, [*MEAN_FLOW, *more, "--out", run], processes)
    assert codes == [0] * processes, output
    for one, two in zip(stats_of(run), stats_of(whole), strict=True):
        for name in ("loss", "flow/error_of_flow", "flow/error_of_jumps", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-4)
    one, two = state_of(whole, 2), state_of(run, 2)
    moments = [name for name in one if name.endswith("/exp_avg")]  # a running mean of the gradients
    assert len(moments) > 40 and max(relative_error(two[name], one[name]) for name in moments) < 1e-4


def test_activation_checkpointing_changes_no_bit(launch, whole, tmp_path):
    codes, output = launch(TRAIN, [*MEAN_FLOW, "--train.activation_checkpointing", "true", "--out", tmp_path / "run"])
    assert codes == [0], output
    assert_same_run(whole, tmp_path / "run")


def test_a_model_with_two_times_jumps_by_default(launch, whole, tmp_path):
    argv = ["--ckpt", whole, "--num-samples", 4, "--no-npz"]
    codes, output = launch(GENERATE, [*argv, "--out", tmp_path / "one"])
    assert codes == [0] and "samples are not guided: with solver jump, --cfg takes two forwards" in output, output
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert (manifest["evaluations"], manifest["forwards"]) == (1, 1)
    assert {name: manifest["settings"][name] for name in ("solver", "steps", "cfg")} == {
        "solver": "jump",
        "steps": 1,
        "cfg": 1,
    }
    codes, output = launch(GENERATE, [*argv, "--solver", "jump-renoise", "--cfg", 2, "--out", tmp_path / "two"])
    assert codes == [0], output
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert (manifest["evaluations"], manifest["forwards"]) == (2, 4)


def test_the_pipeline_jumps_as_the_command_does(whole, tmp_path, capsys):
    load_command("sit_atconv/convert.py").main([str(whole), str(tmp_path / "pipeline"), "--to", "pipeline"])
    pipeline = SiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    noise, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
    model = load_weights(str(whole)).model
    for steps in (None, 4):
        latents = pipeline(y.tolist(), latents=noise, num_inference_steps=steps, output_type="latent").images
        with torch.no_grad():
            expected = Sampler(solver="jump", steps=steps, cfg=1.0)(model, noise, y)
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    again = load_weights(str(tmp_path / "pipeline"))
    assert again.traits == load_weights(str(whole)).traits

    ends = []  # of jumps: with stochastic sampling the scheduler goes to the data, and puts noise back
    pipeline.transformer.register_forward_pre_hook(lambda module, inputs: ends.append(inputs[3][0].item()))
    for stochastic, expected in ((False, [0.5, 1.0]), (True, [1.0, 1.0])):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
        pipeline([3], num_inference_steps=2, output_type="latent")
        assert ends == expected
        ends.clear()


def test_flow_weights_are_reproduced_to_the_bit(launch, tiny_run, whole, tmp_path):
    """With the second time, at every r, as --init-from reads them."""
    flow = load_weights(str(tiny_run))
    config = {name: value for name, value in flow.model.config.items() if not name.startswith("_")}
    model = SiT(**{**config, "two_times": True})
    start = start_from(model, str(tiny_run), "linear", "velocity", flow.recipe.codec)
    assert "the embedding of the second time starts as zero: the model first samples as these weights do" in start.lines
    noise, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 7, 10])
    sampler = Sampler(solver="heun", steps=3, cfg=2.0)
    with torch.no_grad():
        assert torch.equal(sampler(model, noise, y), sampler(flow.model, noise, y))
        t = torch.full((4,), 0.3)
        assert torch.equal(model(noise, t, y, t + 0.5), flow.model(noise, t, y))

    # The way back keeps what the model computes for r = t.
    there, back = load_weights(str(whole)).model, SiT(**config)
    start = start_from(back, str(whole), "linear", "velocity", flow.recipe.codec)
    assert any("embedding of the second time is left out" in line for line in start.lines)
    with torch.no_grad():
        torch.testing.assert_close(back(noise, t, y), there(noise, t, y))


def test_learned_guidance_is_known_to_the_checkpoint(launch, fails, tmp_path):
    argv = [*MEAN_FLOW, "--train.steps", 1, "--flow.guidance", 3, "--flow.guidance_interval", "[0.2,1]"]
    codes, output = launch(TRAIN, [*argv, "--out", tmp_path / "run"])
    assert codes == [0], output
    main = load_command(GENERATE).main
    error = fails(main, ["--ckpt", tmp_path / "run", "--cfg", 2])
    assert "have learned the guidance scale 3, and cfg = 2 would guide them again: use cfg = 1" in error
    argv = ["--ckpt", tmp_path / "run", "--num-samples", 2, "--no-npz"]
    codes, output = launch(GENERATE, [*argv, "--out", tmp_path / "one"])
    assert codes == [0] and "need no guidance: the weights have learned the scale 3 (--cfg 1)" in output, output
    codes, output = launch(GENERATE, [*argv, "--cfg", 2, "--guidance", "two-branch", "--out", tmp_path / "two"])
    assert codes == [0] and json.loads((tmp_path / "two" / "manifest.json").read_text())["forwards"] == 2, output
    load_command("sit_atconv/convert.py").main([str(tmp_path / "run"), str(tmp_path / "pipeline"), "--to", "pipeline"])
    pipeline = SiTPipeline.from_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="have learned the guidance scale 3"):
        pipeline([0], guidance_scale=2.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.two_times", "true"], "FlowMatching trains one time: give --flow MeanFlow"),
        (["--flow", "MeanFlow"], "MeanFlow needs a model with two times: set model.two_times to true"),
        ([*MEAN_FLOW, "--flow.path", "gvp"], "flow.path"),
        ([*MEAN_FLOW, "--flow.jump_every", "0"], "flow.jump_every must be at least 1, not 0"),
        ([*MEAN_FLOW, "--flow.guidance", "0.5"], "flow.guidance must be at least 1, which is off, and finite, not 0.5"),
        ([*MEAN_FLOW, "--flow.guidance", "2", "--flow.class_dropout_prob", "0"], "needs a null label that is trained"),
        ([*MEAN_FLOW, "--flow.guidance_interval", "[0.8,0.2]"], "must be two increasing times in [0, 1]"),
        ([*MEAN_FLOW, "--flow.shares", "[0.1,0.2]"], "flow.shares must be two falling numbers"),
        ([*MEAN_FLOW, "--flow.end_logit_mean", "4"], "end_logit_std must be given together"),
        (
            [*MEAN_FLOW, "--flow.derivative", "difference", "--train.precision", "bf16"],
            "flow.derivative difference is only noise in bf16: set train.precision to fp32",
        ),
        (["--preview.solver", "jump"], "solver jump needs a model with two times, which MeanFlow trains"),
        ([*MEAN_FLOW, "--preview.num_steps", "[]"], "preview.num_steps must be at least 1"),
    ],
)
def test_what_mean_flow_cannot_do_is_refused(fails, tmp_path, argv, message):
    assert message in fails(load_command(TRAIN).main, [*argv, "--out", tmp_path / "run"])


def test_jumps_of_a_flow_model_are_refused(fails, tiny_run):
    error = fails(load_command(GENERATE).main, ["--ckpt", tiny_run, "--solver", "jump"])
    assert "solver jump needs a model with two times, which MeanFlow trains, and this one has one" in error
