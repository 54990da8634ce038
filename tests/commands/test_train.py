"""The training command: files of a run, exact resume, and errors."""

import itertools
import json
import multiprocessing
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from sit_atconv.data.images import ImageFolder
from sit_atconv.data.order import hold_out
from sit_atconv.encoders import digit_features
from sit_atconv.flow import MeanFlow
from sit_atconv.models import PRESETS, SiT
from sit_atconv.runtime.files import exclusive
from sit_atconv.runtime.installation import configs_of
from sit_atconv.training.config import parse
from tests.conftest import ROOT, TINY_RUN, encode_argv, load_command, python, relative_error, working_folder
from tests.data.test_stores import same_images, write_numbered

TRAIN = "sit_atconv/train.py"
EXACT = [
    *TINY_RUN,
    "--train.batch_size",
    "384",
    "--train.lr",
    "1e-3",
    "--train.lr_decay",
    "cosine",
    "--train.warmup_steps",
    "1",
    "--train.weight_decay",
    "0.1",
    "--flow.class_dropout_prob",
    "0.3",
    "--train.max_grad_norm",
    "1.0",
    "--train.ema_decay",
    "[0.9,0.5]",
]
IMAGES = [*TINY_RUN, "--data.codec", "identity", "--data.image_size", "16", "--data.mirror", "true"]
IMAGES += ["--train.steps", "2", "--train.batch_size", "32"]
SMALL = [*TINY_RUN, "--model.depth", "1", "--train.batch_size", "64"]
KINDS = [(1, 1), (2, 3), *(pytest.param(kind, marks=pytest.mark.slow) for kind in [(1, 3), (2, 1), (3, 1)])]


def state_of(run: Path, step: int) -> dict:
    checkpoint = run / "checkpoints" / f"step-{step:07d}"
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)}/{name}": t for file in files for name, t in load_file(file).items()}


def stats_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").open()]


def recipe_of(run: Path, step: int, name: str = "ema") -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:07d}" / name / "recipe.json").read_text())


def assert_same_run(run: Path, other: Path, step: int = 4) -> None:
    """Asserts that the last checkpoints and all logged losses and norms are bitwise equal."""
    one, two = state_of(run, step), state_of(other, step)
    assert one.keys() == two.keys() and {name.split("/")[0] for name in one} > {"model", "ema", "optimizer.safetensors"}
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    lines = [[(line["step"], line["loss"], line["grad_norm"]) for line in stats_of(r)] for r in (run, other)]
    assert lines[0] == lines[1] and len(lines[0]) == step


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """whole(processes, accumulation) -> an uninterrupted run of four steps in epochs of four."""
    runs = {}

    def run(processes: int, accumulation: int) -> Path:
        if (processes, accumulation) not in runs:
            folder = tmp_path_factory.mktemp("whole") / "run"
            argv = [*EXACT, "--train.accumulation", accumulation, "--out", folder]
            codes, output = launch(TRAIN, argv, processes)
            assert codes == [0] * processes, output
            runs[processes, accumulation] = folder
        return runs[processes, accumulation]

    return run


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "processes-{}-accumulation-{}".format(*kind))
def test_a_killed_run_resumes_bitwise(launch, whole, tmp_path, kind):
    processes, accumulation = kind
    argv = [*EXACT, "--train.accumulation", accumulation, "--out", tmp_path / "run"]
    codes, output = launch(TRAIN, argv, processes, die="after the first checkpoint")
    assert codes == [-9] * processes, output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]
    codes, output = launch(TRAIN, argv, processes)
    assert codes == [0] * processes and "step 2 of 4" in output and "->" not in output, output
    assert_same_run(whole(*kind), tmp_path / "run")
    half = state_of(whole(*kind), 2)["model/diffusion_pytorch_model.safetensors/final_layer.linear.weight"]
    assert not torch.equal(
        half, state_of(whole(*kind), 4)["model/diffusion_pytorch_model.safetensors/final_layer.linear.weight"]
    )


OWN_LOSS = """
import torch.nn as nn
from sit_atconv.data.codecs import Codec
from sit_atconv.flow.auxiliary import AuxiliaryLoss
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

class Packed(Codec):
    channels, downsample = 4, 2
    def encode(self, images):
        return pixel_unshuffle(images, 2)
    def decode(self, z):
        return pixel_shuffle(z, 2)

class Brightness(AuxiliaryLoss):
    needs_pixels, block = True, 1
    def __init__(self, weight: float = 0.5):
        super().__init__()
        self.weight = weight
    def build(self, net):
        self.head = nn.Linear(net.config.hidden_size, 1)
        self.encoder = nn.Linear(1000, 1).requires_grad_(False)
    def forward(self, inputs):
        assert inputs.pixels.shape[1:] == (1, 8, 8)
        error = self.head(inputs.hidden).mean((1, 2)).float() - inputs.pixels.mean((1, 2, 3))
        return {"brightness": self.weight * error.square()}
"""
CONV = ["--auxiliary.projector", "conv"]  # small
PARTS = {
    "an auxiliary loss": ["--auxiliary", "own_loss.Brightness", "--auxiliary.weight", "0.7"],
    "alignment": ["--auxiliary", "Alignment", "--auxiliary.encoder", "digits", *CONV, "--auxiliary.dispersive", "0.5"],
    "on a codec": ["--auxiliary", "own_loss.Brightness", "--data.codec", "own_loss.Packed", "--model.patch_size", "1"],
    "Muon": ["--optimizer", "sit_atconv.training.optimizers.MuonAdamW"],
}


@pytest.mark.parametrize(
    ("part", "processes"),
    [
        ("alignment", 1),
        ("Muon", 1),
        pytest.param("alignment", 2, marks=pytest.mark.slow),
        pytest.param("an auxiliary loss", 1, marks=pytest.mark.slow),
        pytest.param("an auxiliary loss", 2, marks=pytest.mark.slow),
        pytest.param("on a codec", 2, marks=pytest.mark.slow),
    ],
)
def test_runs_with_an_auxiliary_loss_or_muon_resume_bitwise(launch, fails, tmp_path, part, processes):
    (tmp_path / "own_loss.py").write_text(OWN_LOSS)
    argv = [*EXACT, *PARTS[part]]
    codes, output = launch(TRAIN, [*argv, "--out", tmp_path / "whole"], processes, folder=tmp_path)
    assert codes == [0] * processes, output
    run = tmp_path / "run"
    codes, output = launch(TRAIN, [*argv, "--out", run], processes, die="after the first checkpoint", folder=tmp_path)
    assert codes == [-9] * processes, output
    codes, output = launch(TRAIN, [*argv, "--out", run], processes, folder=tmp_path)
    assert codes == [0] * processes and "step 2 of 4" in output, output
    assert_same_run(tmp_path / "whole", run)
    names = state_of(run, 4)
    exported = [name for name in names if name.startswith(("model", "ema"))]
    if part == "Muon":
        assert any("momentum_buffer" in name for name in names) and any("exp_avg" in name for name in names)
    else:
        head, term = ("projectors.0", "alignment") if part == "alignment" else ("head", "brightness")
        assert not [name for name in exported if head in name]
        assert not [name for name in names if "encoder" in name]
        for place in ("", "ema/", "ema-0.5/"):
            key = f"auxiliary.safetensors/{place}{head}.weight"
            first, last = (state_of(run, step)[key] for step in (2, 4))
            assert not torch.equal(first, last)
        assert all(line[f"auxiliary/{term}"] != 0 for line in stats_of(run))
    if (part, processes) == ("alignment", 1):
        weights = {name: tensor + 1 for name, tensor in load_file(digit_features.WEIGHTS).items()}
        save_file(weights, other := tmp_path / "other.safetensors")
        argv += ["--out", run, "--train.steps", "5", "--auxiliary.encoder_weights"]
        assert "with other data (auxiliary.encoders" in fails(load_command(TRAIN).main, [*argv, other])


OWN_OBJECTIVE = """
from dataclasses import dataclass
from sit_atconv.flow import FlowMatching

class Halved:
    def __init__(self, model):
        self.model, self.null_label = model, model.null_label
    def __call__(self, x, t, y):
        return self.model(x, t, y) / 2

@dataclass(frozen=True)
class Doubled(FlowMatching):
    \"\"\"The model learns twice the velocity.\"\"\"
    def loss(self, model, data, y, draw, null_label):
        return super().loss(Halved(type("M", (), {"null_label": None, "__call__": lambda self, *a: model(*a)})()),
                            data, y, draw, null_label)
    def velocity(self, model):
        return Halved(model)
"""


PLAIN_OBJECTIVE = """
import torch
from sit_atconv.flow import Draw, Objective

class Plain(Objective):
    def draw(self, shape, generator):
        noise = torch.randn(shape, generator=generator, device=generator.device)
        t = torch.rand(shape[0], generator=generator, device=generator.device)
        return Draw(noise, t, t < 0)
    def loss(self, model, data, y, draw, null_label):
        x = self.interpolant.interpolate(data, draw.noise, draw.t)
        error = model(x, draw.t, y).float() - self.interpolant.velocity(data, draw.noise, draw.t)
        return {"error": error.square().flatten(1).mean(1), "loss": draw.t}
    def velocity(self, model):
        return model
"""


def test_an_objective_without_options_trains_and_logs_its_terms_separately(launch, tmp_path):
    (tmp_path / "plain.py").write_text(PLAIN_OBJECTIVE)
    (tmp_path / "own.yaml").write_text("{}")
    codes, output = launch(
        TRAIN,
        ["--config", "own.yaml", *SMALL, "--train.steps", 1, "--flow", "plain.Plain", "--out", "run"],
        folder=tmp_path,
    )
    assert codes == [0] and list((tmp_path / "run" / "samples").glob("*.png")), output
    line = stats_of(tmp_path / "run")[-1]
    assert line["loss"] > 1 > line["flow/loss"] > 0


def test_state_of_a_users_optimizer_is_resumed_or_refused_by_name(launch, tmp_path):
    (tmp_path / "own_optimizers.py").write_text("""
import torch

class Learning(torch.optim.SGD):
    def __init__(self, params, lr=0.1, scale=1.0):
        super().__init__(params, lr=lr)
        self.defaults["scale"] = scale
        for group in self.param_groups:
            group["scale"] = scale
    def step(self, closure=None):
        for group in self.param_groups:
            group["scale"] += 1
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
        super().step()

class Odd(Learning):
    def step(self, closure=None):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["word"] = "text"
""")
    argv = [*SMALL, "--optimizer", "own_optimizers.Learning", "--out", "run"]
    codes, output = launch(TRAIN, argv, die="after the first checkpoint", folder=tmp_path)
    assert codes == [-9], output
    codes, output = launch(TRAIN, argv, folder=tmp_path)
    assert codes == [0] and "step 2 of 4" in output, output
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-0000004" / "state.json").read_text())
    assert [numbers["scale"] for numbers in state["optimizer"]] == [5.0, 5.0]
    counts = {name: t for name, t in state_of(tmp_path / "run", 4).items() if name.endswith("/count")}
    assert counts and all(count == 4 for count in counts.values())
    codes, output = launch(TRAIN, [*SMALL, "--optimizer", "own_optimizers.Odd", "--out", "odd"], folder=tmp_path)
    assert codes == [1] and "Odd keeps" in output and "as a str" in output and "Traceback" not in output, output


def test_an_objective_that_overrides_velocity_is_needed_to_sample(launch, tmp_path):
    (tmp_path / "own_objective.py").write_text(OWN_OBJECTIVE)
    codes, output = launch(
        TRAIN, [*SMALL, "--train.steps", 2, "--flow", "own_objective.Doubled", "--out", "run"], folder=tmp_path
    )
    assert codes == [0], output
    recipe = recipe_of(tmp_path / "run", 2)
    assert recipe["objective"]["class_path"] == "own_objective.Doubled" and recipe["prediction"] == "velocity"
    argv = ["--ckpt", "run", "--num-samples", 2, "--steps", 2, "--out"]
    codes, output = launch("sample/generate.py", [*argv, "not"], folder=tmp_path)
    assert codes == [1] and "objective own_objective.Doubled is not known here: give --import own_obj" in output, output
    codes, output = launch("sample/generate.py", [*argv, "samples", "--import", "own_objective"], folder=tmp_path)
    assert codes == [0], output


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_steps_resumes_bitwise(launch, tmp_path, processes, accumulation):
    """The run is killed five times, at random between the first and the last line of progress."""
    argv = [*EXACT, "--train.accumulation", accumulation, "--train.steps", 12, "--train.checkpoint_every", 3]
    codes, output = launch(TRAIN, [*argv, "--out", tmp_path / "whole"], processes)
    assert codes == [0] * processes, output
    for kill_at in np.random.default_rng(accumulation * 2 + processes).choice(np.arange(1, 11), 5, replace=False):
        run = tmp_path / f"killed-at-{kill_at}"
        codes, output = launch(TRAIN, [*argv, "--out", run], processes, kill_at=int(kill_at))
        assert -9 in codes, output
        codes, output = launch(TRAIN, [*argv, "--out", run], processes)
        assert codes == [0] * processes, output
        assert_same_run(tmp_path / "whole", run, 12)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("every", [pytest.param(13, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.scale)])
def test_a_run_killed_at_any_write_resumes_bitwise(launch, tmp_path, processes, every):
    """The run is killed before it opens for writing, creates, renames or deletes a file or folder."""
    argv = [
        *EXACT,
        "--train.accumulation",
        3,
        "--train.steps",
        3,
        "--train.checkpoint_every",
        1,
        "--train.keep_checkpoints",
        1,
    ]
    codes, output = launch(TRAIN, [*argv, "--out", tmp_path / "whole"], processes)
    assert codes == [0] * processes, output
    for number in itertools.count(1, every):
        run = tmp_path / f"{number}"
        codes, output = launch(TRAIN, [*argv, "--out", run], processes, die=number)
        if codes == [0] * processes:
            break
        codes, output = launch(TRAIN, [*argv, "--out", run], processes)
        assert codes == [0] * processes, f"{number}: {output}"
        assert_same_run(tmp_path / "whole", run, 3)
        shutil.rmtree(run)
    assert number > 60
    print(f"{number - 1} writes; killed at every {every}th.")


@pytest.mark.scale
def test_two_torchrun_agents_forward_a_signal_and_the_run_resumes(whole, tmp_path):
    """The recipe of docs/training.md, with both nodes on this machine; only the first agent gets the signal.

    The other agent then waits for five minutes at torchrun's exit barrier, which cannot be configured.
    """
    run = tmp_path / "run"
    argv = [*EXACT, "--train.accumulation", 3, "--train.cpu_threads", 1, "--train.checkpoint_every", 100, "--out", run]

    def start() -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = python(
            "-m",
            "torch.distributed.run",
            "--nnodes",
            2,
            "--nproc_per_node",
            1,
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            f"127.0.0.1:{port}",
            "--local_addr",
            "127.0.0.1",
            "--signals-to-handle",
            "SIGTERM,SIGINT,SIGUSR1",
            "--shutdown-timeout",
            300,
            ROOT / TRAIN,
            *argv,
        )
        return [
            subprocess.Popen(command, stdout=open(tmp_path / f"{i}.txt", "a"), stderr=subprocess.STDOUT)
            for i in range(2)
        ]

    agents = start()
    while not re.search(r"[0-3]/4 \[", "".join((tmp_path / f"{i}.txt").read_text() for i in range(2))):
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.05)
    agents[0].terminate()
    for agent in agents:
        agent.wait(600)  # torchrun's other agent may wait 300 s for the one that was signalled
    said = "".join((tmp_path / f"{i}.txt").read_text() for i in range(2))
    stopped = re.search(r"stopped by SIGTERM at step (\d) of 4", said)
    assert stopped and (run / "checkpoints" / f"step-000000{stopped[1]}").is_dir(), said
    assert [agent.wait(300) for agent in start()] == [0, 0], said
    one, two = state_of(whole(2, 3), 4), state_of(run, 4)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


ALIGNED = ["--auxiliary", "Alignment", "--auxiliary.encoder", "digits", *CONV]


def test_without_a_coefficient_alignment_changes_no_bit(launch, whole, tmp_path):
    argv = [*EXACT, *ALIGNED, "--auxiliary.coefficient", "0", "--out", tmp_path / "run"]
    codes, output = launch(TRAIN, argv)
    assert codes == [0], output
    assert_same_run(whole(1, 1), tmp_path / "run")


@pytest.mark.slow
def test_alignment_stops_after_its_last_step_and_only_rounds_with_processes(launch, tmp_path):
    for processes, accumulation in ((1, 1), (2, 3)):
        argv = [*EXACT, *ALIGNED, "--auxiliary.last_step", "2", "--train.accumulation", accumulation]
        codes, output = launch(TRAIN, [*argv, "--out", tmp_path / f"{processes}"], processes)
        assert codes == [0] * processes, output
    alone, shared = (stats_of(tmp_path / name) for name in "12")
    for one, two in zip(alone, shared, strict=True):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        assert ("auxiliary/alignment" in one) == (one["step"] <= 2)
        assert one.get("auxiliary/alignment", 0) == pytest.approx(two.get("auxiliary/alignment", 0), rel=1e-4)
    states = [state_of(tmp_path / "1", step)["auxiliary.safetensors/projectors.0.weight"] for step in (2, 4)]
    assert torch.equal(*states)  # no gradient, no update


@pytest.mark.slow
def test_a_dispersive_run_refuses_micro_batches_of_another_size(launch, tmp_path):
    argv = [*SMALL, "--auxiliary", "Alignment", "--auxiliary.coefficient", "0", "--auxiliary.dispersive", "0.5"]
    argv += ["--out", tmp_path / "run"]
    codes, output = launch(TRAIN, [*argv, "--train.accumulation", "64"])
    assert codes == [1] and "a micro-batch, which has one image: lower train.accumulation" in output, output
    assert launch(TRAIN, [*argv, "--train.steps", "2"])[0] == [0]
    codes, output = launch(TRAIN, [*argv, "--train.steps", "3", "--train.accumulation", "2"])
    assert codes == [1] and "compares the samples of a micro-batch" in output and "accumulation 1 -> 2" in output, (
        output
    )


def test_processes_and_micro_batches_only_change_rounding(whole):
    """Noise, times, dropout and images are drawn for the whole batch, so its gradient is the same."""
    alone, shared = whole(1, 1), whole(2, 3)
    for one, two in zip(stats_of(alone), stats_of(shared), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        assert one["loss_by_time"] == pytest.approx(two["loss_by_time"], rel=1e-4)
    one, two = state_of(alone, 2), state_of(shared, 2)
    moments = [name for name in one if name.endswith("/exp_avg")]  # a running mean of the gradients
    assert len(moments) > 40 and max(relative_error(two[name], one[name]) for name in moments) < 1e-4


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_saves_and_stops_all(launch, whole, tmp_path, number):
    """SIGTERM goes to the second of two processes, SIGUSR1 to a single one."""
    kind = (2, 3) if number == signal.SIGTERM else (1, 1)
    argv = [*EXACT, "--train.accumulation", kind[1], "--train.checkpoint_every", 100, "--out", tmp_path / "run"]
    if kind[0] == 2:
        argv += ["--train.log_every", 100]  # so that no log line makes them agree earlier
    codes, output = launch(TRAIN, argv, kind[0], kill_at=0, kill_with=number, kill_rank=kind[0] - 1)
    assert codes == [0] * kind[0], output
    stopped = re.search(rf"stopped by {number.name} at step (\d) of 4, saved in .*step-000000\1: the same", output)
    assert stopped and 1 <= int(stopped[1]) < 4, output
    codes, output = launch(TRAIN, argv, kind[0])
    assert codes == [0] * kind[0] and f"step {stopped[1]} of 4" in output, output
    one, two = state_of(whole(*kind), 4), state_of(tmp_path / "run", 4)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_ctrl_c_prints_a_message_then_saves_and_exits(launch, tmp_path):
    """A terminal sends Ctrl-C to all processes."""
    argv = [
        *SMALL,
        "--train.steps",
        500,
        "--train.log_every",
        1000,
        "--train.checkpoint_every",
        1000,
        "--out",
        tmp_path / "run",
    ]
    codes, output = launch(TRAIN, argv, 2, kill_at=3, kill_with=signal.SIGINT)
    assert codes == [0, 0] and "Traceback" not in output, output
    assert output.count("Ctrl-C: finishing and saving this step; press Ctrl-C again to exit at once") == 1, output
    stopped = re.search(r"stopped by SIGINT at step (\d+) of 500, saved in .*: the same command resumes", output)
    assert stopped and (tmp_path / "run" / "checkpoints" / f"step-{int(stopped[1]):07d}").is_dir(), output


def test_a_second_ctrl_c_exits_while_saving(launch, tmp_path):
    codes, output = launch(TRAIN, [*SMALL, "--out", tmp_path / "run"], die="Ctrl-C twice while saving")
    assert codes == [130] and "Traceback" not in output, output
    assert output.splitlines()[-1] == "error: interrupted; last checkpoint: none yet", output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [".partial-step-0000002"]


def test_ctrl_c_during_imports_prints_one_line(tmp_path):
    command = subprocess.Popen(
        python(ROOT / TRAIN, "--out", tmp_path / "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while "libtorch" not in Path(f"/proc/{command.pid}/maps").read_text():
        assert command.poll() is None
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    assert command.communicate(timeout=60)[0].strip() == "error: interrupted" and command.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_update_that_is_not_finite_is_withheld_and_stops_the_run(launch, whole, tmp_path, processes):
    run, argv = tmp_path / "run", [*EXACT, "--train.accumulation", 1, "--train.log_every", 100]
    codes, output = launch(TRAIN, [*argv, "--out", run], processes, die="the third loss is not a number")
    assert codes == [1] * processes and "Traceback" not in output, output
    message = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "not finite in step 3" in message and "checkpoints/step-0000002. " in message
    batch = json.loads(message.rpartition(": ")[2])
    assert len(set(batch)) == 384 and max(batch) < 1797
    codes, output = launch(TRAIN, [*argv, "--out", run], processes)  # without the cause, no trace is left
    assert codes == [0] * processes, output
    one, two = state_of(whole(processes, 1), 4), state_of(run, 4)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(launch, whole, tmp_path):
    run = shutil.copytree(whole(1, 1), tmp_path / "run")
    weights = run / "checkpoints" / "step-0000004" / "ema" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 4
    weights.write_bytes(content)
    codes, output = launch(TRAIN, [*EXACT, "--train.accumulation", 1, "--out", run])
    assert codes == [0] and "step 2 of 4" in output, output
    assert "step-0000004 is damaged: ema/diffusion_pytorch_model.safetensors is not as it was written" in output
    assert_same_run(whole(1, 1), run)
    assert (run / "checkpoints" / "damaged-step-0000004").is_dir()


def test_a_finished_run_continues_for_more_steps_and_reports_other_processes(launch, whole, tmp_path):
    run = shutil.copytree(whole(2, 3), tmp_path / "run")
    argv = [*EXACT, "--train.accumulation", 1, "--train.steps", 5, "--out", run]
    codes, output = launch(TRAIN, argv)
    assert codes == [0] and "step 4 of 5" in output, output
    assert "processes 2 -> 1, accumulation 3 -> 1" in output and "to rounding" in output
    assert [line["step"] for line in stats_of(run)] == [1, 2, 3, 4, 5]


def test_a_full_disk_keeps_the_last_good_checkpoint(launch, tmp_path):
    run = tmp_path / "run"
    codes, output = launch(TRAIN, [*EXACT, "--out", run], die="files of 100 kB are too large")
    assert codes == [1] and "Traceback" not in output, output
    assert "the checkpoint of step 2 cannot be written" in output and "same command again" in output
    assert list((run / "checkpoints").iterdir()) == []


def test_a_tracker_that_fails_is_switched_off_with_a_warning(launch, tmp_path):
    argv = [*SMALL, "--train.tracker", "tensorboard", "--train.steps", 2, "--out", tmp_path / "run"]
    codes, output = launch(TRAIN, argv, die="the tracker fails")
    assert codes == [0] and output.count("train.tracker tensorboard failed (FileNotFoundError") == 1, output
    assert len(stats_of(tmp_path / "run")) == 2


def test_tensorboard_shows_the_log(launch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    argv = [*SMALL, "--train.tracker", "tensorboard", "--train.steps", 2, "--data.held_out", 20, "--out", run]
    codes, output = launch(TRAIN, argv)
    assert codes == [0], output
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("loss", "loss_by_time/0", "held_out_loss", "grad_norm", "lr", "images_per_second"):
        points = events.Scalars(name)
        line = stats_of(run)[points[-1].step - 1]
        value = line["loss_by_time"][0] if "/" in name else line[name]
        assert points[-1].step == 2 and points[-1].value == pytest.approx(value), name


def test_no_step_waits_for_the_device(launch, tmp_path):
    """In six more steps without a log line the host reads six more tensors: flags that have arrived."""
    counts = []
    for steps in (3, 9):
        argv = [
            *SMALL,
            "--train.steps",
            steps,
            "--train.log_every",
            100,
            "--train.checkpoint_every",
            100,
            "--train.max_grad_norm",
            1.0,
            "--out",
            tmp_path / str(steps),
        ]
        codes, output = launch(TRAIN, argv, die="waiting is counted")
        assert codes == [0], output
        counts.append(int(re.search(r"waited: (\d+)", output)[1]))
    assert counts[1] - counts[0] == 6


@pytest.mark.slow
def test_the_held_out_loss_does_not_depend_on_processes(launch, tmp_path):
    losses = {}
    for processes, accumulation in ((1, 1), (2, 2)):
        run = tmp_path / f"{processes}"
        argv = [
            *SMALL,
            "--data.held_out",
            61,
            "--train.accumulation",
            accumulation,
            "--train.steps",
            2,
            "--train.held_out_every",
            1,
            "--train.ema_decay",
            0.0,
            "--out",
            run,
        ]
        codes, output = launch(TRAIN, argv, processes)
        assert codes == [0] * processes, output
        losses[processes] = [line["held_out_loss"] for line in stats_of(run)]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1][1] < losses[1][0] and 0.5 < losses[1][0] < 3


def test_a_dry_run_prints_the_estimate_and_writes_nothing(tmp_path, capsys):
    with working_folder(tmp_path):
        load_command(TRAIN).main([*SMALL, "--dry-run"])
    said = capsys.readouterr().out
    for name in ("model ", "batch ", "run ", "memory ", "24 GB GPU", "80 GB GPU", "time ", "disk "):
        assert f"{name}" in said
    assert "s a step" in said and "measured on" in said and "not measured" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_warm_start_lists_what_starts_from_scratch(launch, tiny_run, tmp_path):
    """From ATConv to attention, all but mixers and position embedding is copied bitwise.

    The recipe keeps that the null label was trained, without label dropout and after a resume.
    """
    argv = [
        *TINY_RUN,
        "--model.mixer",
        "attention",
        "--train.lr",
        0,
        "--flow.class_dropout_prob",
        0,
        "--init-from",
        tiny_run,
        "--train.batch_size",
        64,
        "--out",
        tmp_path / "run",
    ]
    codes, output = launch(TRAIN, [*argv, "--train.steps", 1])
    assert codes == [0] and f"started from {tiny_run} (EMA, step 4)" in output, output
    assert "mixers of all 2 blocks (3x3 ATConv there, attention here) start from scratch" in output
    there = SiT.from_pretrained(tiny_run / "checkpoints" / "step-0000004" / "ema").state_dict()
    here = SiT.from_pretrained(tmp_path / "run" / "checkpoints" / "step-0000001" / "model").state_dict()
    shared = [name for name in there if ".attn." not in name and name in here]
    assert len(shared) > 20 and [name for name in shared if not torch.equal(there[name], here[name])] == []
    assert recipe_of(tmp_path / "run", 1)["null_label_trained"] is True
    codes, output = launch(TRAIN, [*argv, "--train.steps", 2])
    assert codes == [0] and recipe_of(tmp_path / "run", 2, "model")["null_label_trained"] is True, output


def test_the_recipe_records_empty_classes_and_an_untrained_null_label(launch, fails, digit_folder, tmp_path):
    """Labels start at 1, and one class is held out completely."""
    images = shutil.copytree(digit_folder, tmp_path / "images")
    names = [str(path.relative_to(images)) for path in images.rglob("*.png")]
    labels = [[name, int(name.split("/")[0].split()[1]) + 1] for name in names]
    for i in hold_out(120, 2):  # the images in the order of their names
        labels[names.index(sorted(names)[i])][1] = 11
    (images / "dataset.json").write_text(json.dumps({"labels": labels}))
    argv = [
        *TINY_RUN,
        "--data.images",
        images,
        "--data.image_size",
        16,
        "--data.codec",
        "identity",
        "--model.depth",
        1,
        "--train.batch_size",
        59,
        "--data.held_out",
        2,
        "--flow.class_dropout_prob",
        0,
        "--train.steps",
        1,
        "--preview.cfg",
        1,
        "--out",
        tmp_path / "run",
    ]
    error = fails(load_command(TRAIN).main, argv)
    assert "data.images" in error and "--data.keep_empty_classes true" in error
    codes, output = launch(TRAIN, [*argv, "--data.keep_empty_classes", "true"])
    assert codes == [0] and "warning: no images to train on for 2 classes: 0 ('0'), 11 ('11')" in output, output
    recipe = recipe_of(tmp_path / "run", 1)
    assert recipe["empty_classes"] == [0, 11] and recipe["null_label_trained"] is False
    codes, output = launch(TRAIN, [*argv, "--train.steps", 2])  # an existing run needs no option
    assert codes == [0] and recipe_of(tmp_path / "run", 2)["empty_classes"] == [0, 11], output


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_unreadable_image_stops_training_with_one_line(launch, digit_folder, tmp_path, workers):
    images = shutil.copytree(digit_folder, tmp_path / "images")
    victim = next(images.rglob("*.png"))
    victim.write_bytes(victim.read_bytes()[:60])
    argv = [
        *TINY_RUN,
        "--data.images",
        images,
        "--data.image_size",
        16,
        "--data.codec",
        "identity",
        "--train.batch_size",
        120,
        "--model.depth",
        1,
        "--data.num_workers",
        workers,
        "--out",
        tmp_path / "run",
    ]
    codes, output = launch(TRAIN, argv)
    assert codes == [1] and "Traceback" not in output, output
    assert re.search(
        rf"error: the training data cannot be read: .*{re.escape(victim.name)} .*: fix the file, or give "
        "--data.skip_unreadable true, which skips the file and records it",
        output,
    ), output


def skip_options(images, run, *options):
    return [
        *TINY_RUN,
        "--data.images",
        images,
        "--data.image_size",
        16,
        "--data.codec",
        "identity",
        "--model.depth",
        1,
        "--train.batch_size",
        36,
        "--train.ema_decay",
        "[0.9,0.5]",
        "--data.held_out",
        12,
        "--data.skip_unreadable",
        "true",
        *options,
        "--out",
        run,
    ]


@pytest.fixture(scope="module")
def skipping(launch, digit_folder, tmp_path_factory):
    """Two damaged images, one of them held out, and a run that left them out."""
    images = shutil.copytree(digit_folder, tmp_path_factory.mktemp("skip") / "images")
    victims = [ImageFolder(images, 16).name(index) for index in (5, hold_out(120, 12)[0])]
    for name in victims:
        (images / name).write_bytes((images / name).read_bytes()[:60])
    run = images.parent / "run"
    parse(list(map(str, skip_options(images, run, "--train.lr", 0.5)))).save(run.mkdir() or run, {"images": 1})
    codes, output = launch(TRAIN, skip_options(images, run, "--data.num_workers", 1))
    assert codes == [0], output
    return images, victims, run, output


def test_unreadable_images_are_left_out_and_recorded(skipping):
    _, victims, run, output = skipping
    record = json.loads((run / "unreadable.json").read_text())
    assert sorted(record) == sorted(victims) and all("cannot be read" in reason for reason in record.values())
    said = [output.count(f"warning: {name} {record[name]}: left out, and recorded in {run}") for name in victims]
    assert said == [1, 1], output
    assert f"{run} has no checkpoint yet: it starts from scratch" in output
    assert all(line["loss"] > 0 and line["held_out_loss"] > 0 for line in stats_of(run)[-1:])


def test_a_class_without_readable_images_is_empty(launch, digit_folder, tmp_path):
    images = shutil.copytree(digit_folder, tmp_path / "images")
    for path in (images / "digit 3").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    argv = skip_options(images, tmp_path / "run", "--data.held_out", 0, "--train.batch_size", 120, "--train.steps", 1)
    codes, output = launch(TRAIN, argv)
    assert codes == [0] and "warning: no images to train on for 1 class: 3 ('digit 3')" in output, output
    assert recipe_of(tmp_path / "run", 1)["empty_classes"] == [3]


def test_an_unreadable_image_has_no_influence(launch, skipping, digit_folder, tmp_path):
    """A run that reads its pixels, but is told that it is unreadable, is bitwise the same."""
    whole = shutil.copytree(digit_folder, tmp_path / "images")
    shutil.copy(skipping[0] / skipping[1][1], whole / skipping[1][1])
    argv = skip_options(whole, tmp_path / "run")
    codes, output = launch(TRAIN, argv, die="the fifth image is taken for unreadable")
    assert codes == [0], output
    assert_same_run(skipping[2], tmp_path / "run")
    assert json.loads((tmp_path / "run" / "unreadable.json").read_text()).keys() == set(skipping[1])


@pytest.mark.slow
def test_leaving_out_does_not_depend_on_processes_workers_or_a_kill(launch, skipping, tmp_path):
    argv = skip_options(skipping[0], tmp_path / "run", "--train.accumulation", 3)
    codes, output = launch(TRAIN, argv, 2, die="after the first checkpoint")
    assert codes == [-9, -9], output
    codes, output = launch(TRAIN, argv, 2)
    assert codes == [0, 0] and "2 images were left out as unreadable so far" in output, output
    assert "warning: " not in output
    for one, two in zip(stats_of(skipping[2]), stats_of(tmp_path / "run"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    assert one["held_out_loss"] == pytest.approx(two["held_out_loss"], rel=1e-5)
    records = [(run / "unreadable.json").read_bytes() for run in (skipping[2], tmp_path / "run")]
    assert records[0] == records[1]


def test_a_batch_of_unreadable_images_changes_nothing(launch, digit_folder, tmp_path):
    images = shutil.copytree(digit_folder, tmp_path / "images")
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    argv = skip_options(images, tmp_path / "run", "--data.held_out", 0, "--train.steps", 1)
    codes, output = launch(TRAIN, argv)
    assert codes == [0], output
    (line,) = stats_of(tmp_path / "run")
    assert line["loss"] == 0.0 and line["grad_norm"] == 0.0
    assert len(json.loads((tmp_path / "run" / "unreadable.json").read_text())) == 36


def test_processes_that_see_different_checkpoints_refuse_to_train(launch, whole, tmp_path):
    """The second process finds no checkpoint, as if each node had its own disk."""
    run = shutil.copytree(whole(2, 3), tmp_path / "run")
    argv = [*EXACT, "--train.accumulation", 3, "--train.steps", 5, "--out", run]
    codes, output = launch(TRAIN, argv, 2, die="the second process sees no checkpoint")
    assert codes == [1, 1] and "at different steps, here 4" in output and "at different steps, here 0" in output


def hold(folder, ready, done):
    with exclusive(folder):
        ready.set()
        done.wait(60)


def test_a_run_locked_by_another_process_is_refused(fails, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    context = multiprocessing.get_context("forkserver")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(run, ready, done))
    holder.start()
    try:
        assert ready.wait(60)
        error = fails(load_command(TRAIN).main, [*TINY_RUN, "--train.steps", 6, "--out", run])
        assert f"is in use by process {holder.pid} on " in error
    finally:
        done.set()
        holder.join()


@pytest.mark.parametrize("run", ["file", "file/run"])
def test_a_folder_that_cannot_be_written_is_refused(fails, tmp_path, run):
    """A file is in place of the run's folder, or of a folder above it."""
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in fails(load_command(TRAIN).main, [*TINY_RUN, "--out", tmp_path / run])


def test_a_disk_too_small_for_the_checkpoints_is_refused(fails, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    size = ["--model.depth", 4, "--model.hidden_size", 128]
    error = fails(load_command(TRAIN).main, [*TINY_RUN, *size, "--out", tmp_path / "run"])
    assert re.search(r"run needs 3\d\.\d MB and its disk has 10\.0 MB free", error), error  # 2 x 4 x 4.8
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("processes", "how"),
    [
        (1, "compilation makes graphs, not code"),
        pytest.param(1, None, marks=pytest.mark.slow),
        pytest.param(2, None, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_takes_the_same_steps(launch, tmp_path, processes, how, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "graph_breaks")
    argv = [*TINY_RUN, "--train.accumulation", "2", "--model.depth", "1", "--train.steps", "2"]
    losses = {}
    for compiled in ("true", "false"):
        run = tmp_path / compiled
        codes, output = launch(TRAIN, [*argv, "--train.compile", compiled, "--out", run], processes, die=how)
        assert codes == [0] * processes and (", compiled" in output) == (compiled == "true"), output
        assert "graph break" not in output.lower()
        losses[compiled] = [json.loads(line)["loss"] for line in (run / "stats.jsonl").open()]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)


def test_files_of_a_run(tiny_run):
    stats = [json.loads(line) for line in (tiny_run / "stats.jsonl").open()]
    assert [line["step"] for line in stats] == [1, 2, 3, 4] and all(line["loss"] > 0 for line in stats)
    for picture in (tiny_run / "loss.png", tiny_run / "samples" / "step-0000004.png"):
        assert min(Image.open(picture).size) > 150
    options = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert options["train"]["batch_size"] == 512 and options["model"]["mixer"] == "atconv"
    config = json.loads((tiny_run / "checkpoints" / "step-0000004" / "ema" / "config.json").read_text())
    assert (config["num_classes"], config["in_channels"], config["input_size"]) == (10, 1, 8)  # from the data
    recipe = json.loads((tiny_run / "checkpoints" / "step-0000004" / "ema" / "recipe.json").read_text())
    assert recipe["class_names"] == list("0123456789") and recipe["codec"]["kind"] == "identity"
    assert recipe["null_label_trained"] is True and recipe["empty_classes"] == []


def test_each_average_uses_its_decay(launch, tmp_path):
    argv = [*TINY_RUN, "--train.steps", 1, "--train.ema_decay", "[0.75,0.5]", "--out", tmp_path / "run"]
    codes, output = launch(TRAIN, argv)
    assert codes == [0], output
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000001"
    config = json.loads((checkpoint / "ema" / "config.json").read_text())
    torch.manual_seed(0)
    initial = SiT.from_config(config).state_dict()
    weights = SiT.from_pretrained(checkpoint / "model").state_dict()
    for folder, decay in (("ema", 0.75), ("ema-0.5", 0.5)):
        assert json.loads((checkpoint / folder / "recipe.json").read_text())["ema_decay"] == decay
        for name, averaged in SiT.from_pretrained(checkpoint / folder).state_dict().items():
            torch.testing.assert_close(averaged, decay * initial[name] + (1 - decay) * weights[name], msg=name)
    moved = weights["final_layer.linear.weight"] - initial["final_layer.linear.weight"]
    assert moved.abs().max() > 1e-6


def test_a_finished_run_reports_itself_and_its_folder(tiny_run, capsys):
    load_command(TRAIN).main([*TINY_RUN, "--out", str(tiny_run)])
    said = capsys.readouterr().out
    assert f"{tiny_run} is complete: 4 steps" in said and f"--ckpt {tiny_run}" in said


@pytest.mark.parametrize("here", ["root", "elsewhere"])
def test_the_printed_sampling_command_can_be_copied(tiny_run, capsys, tmp_path, here):
    with working_folder(ROOT if here == "root" else tmp_path):
        load_command(TRAIN).main([*TINY_RUN, "--out", str(tiny_run)])
        command = shlex.split(capsys.readouterr().out.partition("sample: ")[2])
        assert command[0] == "python" and Path(command[1]).is_file() and command[2:] == ["--ckpt", str(tiny_run)]


def test_a_finished_run_renames_a_damaged_later_checkpoint(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-0000004", checkpoints / "step-0000006")
    load_command(TRAIN).main([*TINY_RUN, "--out", str(run)])
    said = capsys.readouterr()
    assert "step-0000006 is damaged: its state.json is of step 4" in said.err
    assert "is complete: 4 steps" in said.out and (checkpoints / "damaged-step-0000006").is_dir()


def test_accelerate_launch_from_another_folder(tmp_path):
    """Two steps of the default run on the embedded digits."""
    command = python("-m", "accelerate.commands.launch", ROOT / TRAIN, "--train.steps", 2, "--train.log_every", 1)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "runs/digits is complete: 2 steps" in done.stdout
    assert (tmp_path / "runs" / "digits" / "loss.png").exists()


def test_a_users_images_train_through_a_vae(launch, vae, tmp_path):
    """The images are in class folders."""
    from sklearn.datasets import load_sample_image

    for name in ("china", "flower"):
        (tmp_path / "images" / name).mkdir(parents=True)
        picture = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for i in range(2):
            picture.crop((i * 90, 40, i * 90 + 200, 240)).save(tmp_path / "images" / name / f"{i}.png")
    options = [
        *TINY_RUN,
        "--data.images",
        tmp_path / "images",
        "--data.image_size",
        32,
        "--data.mirror",
        "true",
        "--train.batch_size",
        4,
        "--train.steps",
        2,
        "--out",
        tmp_path / "run",
        "--data.codec",
        vae,
    ]
    codes, output = launch(TRAIN, options)
    assert codes == [0], output
    weights = json.loads((tmp_path / "run" / "checkpoints" / "step-0000002" / "ema" / "config.json").read_text())
    assert (weights["num_classes"], weights["in_channels"], weights["input_size"]) == (2, 4, 16)
    codes, output = launch("sample/generate.py", ["--ckpt", tmp_path / "run", "--num-samples", 3, "--steps", 2])
    assert codes == [0], output
    picture = Image.open(next((tmp_path / "run").glob("samples/*cfg4*/images/000000.png")))
    assert picture.size == (32, 32) and picture.mode == "RGB"


def latent_options(latents, run, **options):
    options = {"train.batch_size": 20, "train.accumulation": 2, "train.steps": 4, "data.mirror": "true"} | options
    argv = [*TINY_RUN, "--data.latents", latents, "--out", run]
    return argv + [text for name, value in options.items() for text in (f"--{name}", value)]


def test_cached_latents_resume_bitwise_with_other_workers(launch, latents, tmp_path):
    """The run is killed within an epoch of six steps, and the latents are moved before it resumes."""
    codes, output = launch(TRAIN, latent_options(latents, tmp_path / "whole"))
    assert codes == [0] and "120 images of 10 classes" in output, output
    resumed = tmp_path / "resumed"
    launch(TRAIN, latent_options(latents, resumed), die="after the first checkpoint")
    moved = shutil.copytree(latents, tmp_path / "moved")
    codes, output = launch(TRAIN, latent_options(moved, resumed, **{"data.num_workers": 2}))
    assert codes == [0] and "step 2 of 4" in output, output
    whole, again = state_of(tmp_path / "whole", 4), state_of(resumed, 4)
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    config = json.loads((resumed / "checkpoints" / "step-0000004" / "ema" / "config.json").read_text())
    assert (config["num_classes"], config["in_channels"], config["input_size"]) == (10, 4, 16)  # from the index
    codes, output = launch("sample/generate.py", ["--ckpt", resumed, "--num-samples", 2, "--steps", 2])
    assert codes == [0], output


def test_cached_latents_train_like_their_images(launch, latents, digit_folder, vae, tmp_path):
    """In float32 the losses agree up to rounding, with horizontal flips too."""
    losses = []
    for name, options in (
        ("cached", ["--data.latents", latents]),
        ("images", ["--data.images", digit_folder, "--data.image_size", 32, "--data.codec", vae]),
    ):
        codes, output = launch(
            TRAIN,
            [
                *TINY_RUN,
                *options,
                "--data.mirror",
                "true",
                "--train.batch_size",
                40,
                "--train.steps",
                3,
                "--out",
                tmp_path / name,
            ],
        )
        assert codes == [0], output
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "stats.jsonl").open()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3


def test_other_data_are_refused(launch, fails, latents, digit_folder, vae, make_vae, tmp_path):
    run, cached = tmp_path / "run", shutil.copytree(latents, tmp_path / "cached")
    argv = latent_options(cached, run)
    codes, output = launch(TRAIN, argv)
    assert codes == [0], output
    argv = [*argv, "--train.steps", 6]
    main = load_command(TRAIN).main
    assert "was encoded with" in fails(main, [*argv, "--data.codec", make_vae(1)])
    assert "was encoded at 32" in fails(main, [*argv, "--data.image_size", 64])
    assert "kind latents -> digits" in fails(main, [*TINY_RUN, *argv[argv.index("--out") :]])
    shutil.rmtree(cached)
    codes, output = launch("sit_atconv/encode.py", [*encode_argv(digit_folder, vae, cached), "--dtype", "float16"])
    assert codes == [0], output
    assert f"{run} was started with other data (index " in fails(main, argv)
    (cached / "shard-00001.safetensors").unlink()
    assert "shard-00001.safetensors is missing" in fails(main, argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.lr", "fast"], "train.lr"),
        (["--train.learning_rate", "1e-4"], "train.learning_rate"),
        (["--preset", "SiT-ATConv-XXL/2"], "SiT-ATConv-XL/2"),
        (["--train.precision", "fp16"], "use bf16"),
        (["--train.batch_size", "5000"], "batch_size 5000 exceeds the 1797 images"),
        (["--train.accumulation", "3"], "batch_size 64 is not divisible by accumulation 3"),
        (["--train.steps", "0"], "train.steps must be at least 1, not 0"),
        (["--model.patch_size", "3"], "8x8"),
        (["--model.mixer", "mamba"], "'mamba'"),
        (["--model.has_null_label", "false"], "flow.class_dropout_prob"),
        (["--data.images", "nowhere"], "nowhere is not a folder"),
        (["--data.held_out", "1780"], "batch_size 64 exceeds the 1797 images of the data set, 1780 of them held out"),
        (["--data.held_out", "-1"], "data.held_out must not be negative: -1"),
        (["--flow.weighting", "likelihood"], "for the prediction velocity"),
        (["--flow.prediction", "v"], "flow.prediction"),
        (["--train.keep_every", "0"], "train.keep_every must be at least 1, not 0"),
        (["--train.ema_decay", "[0.9,0.9]"], "train.ema_decay must be one or more different numbers"),
        (["--train.tracker", "mlflow"], "train.tracker"),
        (["--preview.every", "0"], "preview.every must be at least 1, not 0"),
        (["--preview.solver", "unipc", "--flow.path", "gvp"], "preview: solver unipc needs the linear interpolant"),
        (["--init-from", "nowhere"], "nowhere is neither a folder here nor a hub id"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_name_the_value_and_the_remedy(fails, argv, message, tmp_path):
    with working_folder(tmp_path):
        assert message in fails(load_command(TRAIN).main, argv)
        assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key_in_yaml_is_named(fails, tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  stepz: 3\n")
    assert "stepz" in fails(load_command(TRAIN).main, ["--config", tmp_path / "mine.yaml"])


def test_a_folder_without_images_is_refused(fails, tmp_path):
    assert "holds no images" in fails(load_command(TRAIN).main, ["--data.images", tmp_path])


def test_resuming_with_other_options_shows_the_difference(fails, tiny_run):
    error = fails(load_command(TRAIN).main, [*TINY_RUN, "--out", tiny_run, "--train.lr", "0.5"])
    assert "train.lr 0.003 -> 0.5" in error


@pytest.mark.parametrize("name", [f"{name}.yaml" for name in configs_of("train")])
def test_shipped_configs_parse(name):
    config = parse(["--config", str(ROOT / "configs" / name), "--train.precision", "bf16"])
    assert config.out.parts[0] == "runs"
    published, train = not name.startswith(("digits", "fashion")) and "onestep" not in name, config.train
    recipe = (train.lr, train.lr_decay, train.warmup_steps, train.weight_decay, train.ema_decay, train.steps)
    assert (recipe == (1e-4, "constant", 0, 0.0, 0.9999, 400_000)) == published
    if name.startswith("imagenet"):
        assert (train.batch_size, config.flow.class_dropout_prob, config.data.image_size) == (256, 0.1, int(name[8:11]))
    if "onestep" in name:
        assert type(config.flow) is MeanFlow and config.model["two_times"] and config.preview.num_steps == [1, 4]
        if not name.startswith("digits"):
            assert config.optimizer[1]["betas"] == [0.9, 0.95] and config.flow.trained_cfg == 2.5
    if name == "ffhq512.yaml":
        assert (train.batch_size, config.flow.class_dropout_prob, config.model["has_null_label"]) == (128, 0.0, False)


@pytest.mark.parametrize("form", ["SiT-{}/2", "SiT-ATConv-{}/2", "SiT-ATConv-{}/2-Hybrid"])
def test_every_preset_has_its_mixer_depth_and_folder(form):
    for size in ("S", "B", "L", "XL"):
        preset = form.format(size)
        config = parse(["--config", str(ROOT / "configs" / "imagenet512.yaml"), "--preset", preset])
        assert config.model["mixer"] == PRESETS[preset]["mixer"]
        assert config.model["depth"] == PRESETS[preset]["depth"]
        assert config.out == Path("runs", "imagenet512-" + preset.lower().replace("/", ""))


@pytest.mark.slow
def test_an_older_run_keeps_the_order_of_its_classes(launch, digit_folder, tmp_path):
    """Class folders 1, 2, 10 were sorted as text in older runs, and are sorted as numbers now."""
    images = tmp_path / "images"
    for name, digit in (("1", 1), ("2", 2), ("10", 3)):
        shutil.copytree(digit_folder / f"digit {digit}", images / name)
    argv = [
        *TINY_RUN,
        "--data.images",
        images,
        "--data.image_size",
        16,
        "--data.codec",
        "identity",
        "--model.depth",
        1,
        "--train.batch_size",
        20,
        "--out",
        tmp_path / "run",
    ]
    codes, output = launch(TRAIN, [*argv, "--train.steps", 1])
    assert codes == [0] and recipe_of(tmp_path / "run", 1)["class_names"] == ["1", "2", "10"], output
    described = json.loads((tmp_path / "run" / "data.json").read_text())
    del described["rules"]
    earlier = described | {"files": ImageFolder(images, 16, rules=1).files_sha256()}
    (tmp_path / "run" / "data.json").write_text(json.dumps(earlier))
    codes, output = launch(TRAIN, [*argv, "--train.steps", 2])
    assert codes == [0] and recipe_of(tmp_path / "run", 2)["class_names"] == ["1", "10", "2"], output


@pytest.fixture(scope="module")
def numbered_digits(digit_folder, tmp_path_factory):
    return write_numbered(digit_folder, tmp_path_factory.mktemp("numbered") / "images")


@pytest.fixture(scope="module")
def numbered_run(launch, numbered_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "run"
    codes, output = launch(TRAIN, [*IMAGES, "--data.images", numbered_digits, "--out", folder])
    assert codes == [0], output
    return folder


@pytest.mark.parametrize("kind", ["zip", "wids", "hf"])
def test_the_same_images_in_another_place_train_the_same_bits(launch, numbered_run, numbered_digits, tmp_path, kind):
    place = same_images(numbered_digits, tmp_path, kind)
    codes, output = launch(TRAIN, [*IMAGES, "--data.images", place, "--out", tmp_path / "run"])
    assert codes == [0], output
    one, two = state_of(numbered_run, 2), state_of(tmp_path / "run", 2)
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    # A run that began with the folder resumes with the other place.
    shutil.copytree(numbered_run, tmp_path / "resumed")
    codes, output = launch(TRAIN, [*IMAGES, "--data.images", place, "--out", tmp_path / "resumed", "--train.steps", 3])
    assert codes == [0] and "step 2 of 3" in output, output
