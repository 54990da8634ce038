"""Power function averages: their weights, their inner products, and other widths from kept averages."""

import shutil

import numpy as np
import pytest
import torch

from sit_atconv.checkpoints.post_hoc import averaged_folder, make_averages
from sit_atconv.checkpoints.power_averages import exponent_of, inner_products, power_decay, solve, weights_of_steps
from sit_atconv.checkpoints.snapshots import list_snapshots, snapshot_path
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.models import SiT
from sit_atconv.runtime.files import sha256_of
from sit_atconv.training.average import main as average
from sit_atconv.training.ema import Averages
from tests.conftest import TINY_RUN, load_command, relative_error


@pytest.mark.parametrize(("std", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(std, exponent):
    g = exponent_of(std)
    assert g == pytest.approx(exponent, abs=0.01)
    assert (g + 1) / ((g + 2) ** 2 * (g + 3)) == pytest.approx(std**2, rel=1e-12)


@pytest.mark.parametrize("std", [0, 0.3])
def test_widths_that_no_power_function_has_are_refused(std):
    with pytest.raises(ValueError, match=r"above 0 and below 0\.289, not"):
        exponent_of(std)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_the_weights_of_steps_follow_from_the_decays(std):
    steps = 300
    decays = np.array([power_decay(std, step) for step in range(steps)])
    products = [(1 - decays[k]) * np.prod(decays[k + 1 :]) for k in range(steps)]
    weights = weights_of_steps(std, steps)
    assert np.abs(weights - products).max() < 1e-10 and weights.sum() == pytest.approx(1, abs=1e-12)
    center = np.arange(steps) + 0.5
    mean = weights @ center
    assert np.sqrt(weights @ (center - mean) ** 2) / steps == pytest.approx(std, rel=1e-2)


def test_inner_products_are_the_integrals():
    of, others = [(100, 0.05), (70, 0.1), (40, 0.2)], [(90, 0.08), (40, 0.2), (100, 0.05)]
    nodes, sizes = np.polynomial.legendre.leggauss(200)

    def p(tau, step, std):
        g = exponent_of(std)
        return (g + 1) * tau**g / step ** (g + 1)

    for a, row in zip(of, inner_products(of, others), strict=True):
        for b, found in zip(others, row, strict=True):
            end = min(a[0], b[0])
            tau = (nodes + 1) * end / 2
            assert found == pytest.approx(sizes @ (p(tau, *a) * p(tau, *b)) * end / 2, rel=1e-10)


def test_a_kept_average_is_found_again():
    kept = [(step, std) for step in range(10, 101, 10) for std in (0.05, 0.1)]
    coefficients, error = solve(kept, (70, 0.1))
    assert np.abs(coefficients - (np.arange(20) == kept.index((70, 0.1)))).max() < 1e-6 and error < 1e-6


@pytest.mark.parametrize("std", [0.06, 0.075, 0.09])
def test_other_widths_equal_the_direct_average(std):
    """On weights that drift and jitter, as those of training do."""
    generator = np.random.default_rng(0)
    steps, every = 2000, 50
    values = 1 - np.exp(-np.arange(steps) / 400)[:, None] + 0.1 * generator.standard_normal((steps, 30))
    kept = [(step, width) for step in range(every, steps + 1, every) for width in (0.05, 0.1)]
    averages = np.stack([weights_of_steps(width, step) @ values[:step] for step, width in kept])
    coefficients, error = solve(kept, (steps, std))
    direct = weights_of_steps(std, steps) @ values
    assert np.linalg.norm(coefficients @ averages - direct) / np.linalg.norm(direct) < 1e-3 and error < 0.02


def test_the_profile_averages_weights_by_the_power_function():
    net = SiT.from_preset("SiT-ATConv-Tiny/2", depth=1, hidden_size=8, num_heads=1, num_classes=2)
    averages, steps = Averages(net, [0.1, 0.2], profile="power"), 40
    bias, seen = net.final_layer.linear.bias, []
    for step in range(steps):
        with torch.no_grad():
            bias.normal_()
        seen.append(bias.detach().clone().double())
        averages.update(step, torch.tensor(True))
    for std, tensors in averages.tensors().items():
        expected = torch.from_numpy(weights_of_steps(std, steps)) @ torch.stack(seen)
        assert relative_error(tensors["final_layer.linear.bias"], expected) < 1e-5


POWER = [
    *["--train.ema_profile", "power", "--train.log_every", "50", "--train.lr", "1e-3", "--model.depth", "1"],
    *["--train.batch_size", "64"],
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, launch):
    """A run with snapshots of two widths, and the same training with another width."""
    folder = tmp_path_factory.mktemp("power")
    argv = [*TINY_RUN, *POWER, "--train.steps", "48", "--train.checkpoint_every", "50"]
    kept = ["--train.ema_decay", "[0.05,0.1]", "--train.snapshot_every", "4"]
    for name, options in {"kept": kept, "direct": ["--train.ema_decay", "0.07"]}.items():
        codes, output = launch("sit_atconv/train.py", [*argv, *options, "--out", folder / name])
        assert codes == [0], output
    return folder


def test_the_command_makes_the_average_of_a_direct_run(runs, tmp_path, capsys):
    average([str(runs / "kept"), "--std", "0.07", "0.05", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "std-0.07: average of width 0.07 at step 48 from 24 kept averages" in printed
    made, direct = load_weights(str(tmp_path / "out" / "std-0.07")), load_weights(str(runs / "direct"))
    assert (made.recipe.step, made.recipe.ema_decay) == (48, 0.07)
    trained = load_weights(str(runs / "kept"), ema=False).model
    for name, expected in direct.model.state_dict().items():
        moved = relative_error(trained.get_parameter(name), expected)  # the average differs from the last weights
        assert relative_error(made.model.get_parameter(name), expected) < max(1e-3, 0.05 * moved), name
    own = load_weights(str(runs / "kept")).model.state_dict()
    kept = load_weights(str(tmp_path / "out" / "std-0.05")).model.state_dict()
    assert all(relative_error(kept[name], own[name]) < 1e-5 for name in own)


def test_generate_makes_the_average_of_a_width(runs, tmp_path, launch):
    argv = ["--num-samples", "2", "--steps", "1", "--cfg", "1", "--ema-std", "0.07"]
    codes, output = launch("sample/generate.py", ["--ckpt", runs / "kept", *argv, "--out", tmp_path / "one"])
    assert codes == [0], output
    (folder,) = (runs / "kept" / "averages").iterdir()
    assert folder.name == "step-0000048-std-0.07" and averaged_folder(runs / "kept", 0.07) == folder
    made, (direct,) = load_weights(str(folder)), make_averages(runs / "kept", [0.07])
    assert made.recipe.ema_decay == 0.07
    assert all(torch.equal(p, direct.weights.model.get_parameter(name)) for name, p in made.model.named_parameters())


def test_a_run_from_scratch_forgets_the_snapshots_and_averages_of_the_former_one(tmp_path, launch):
    """Both are found by their step alone, and would be mixed with those of the new run."""
    argv = [*TINY_RUN, *POWER, "--train.ema_decay", "[0.05,0.1]", "--out", tmp_path / "run"]
    for every, lr, kept in ((2, "1e-3", [2, 4]), (3, "1e-2", [3, 4])):
        codes, output = launch("sit_atconv/train.py", [*argv, "--train.snapshot_every", every, "--train.lr", lr])
        assert codes == [0], output
        assert [each.step for each in list_snapshots(tmp_path / "run")[::2]] == kept
        folder = averaged_folder(tmp_path / "run", 0.07)
        (made,) = make_averages(tmp_path / "run", [0.07])
        assert load_weights(str(folder)).identity() == identity_of(made.weights.model, tmp_path / f"exported-{every}")
        shutil.rmtree(tmp_path / "run" / "checkpoints")


def identity_of(model, folder) -> str:
    model.save_pretrained(folder)
    return sha256_of(*folder.glob("*.safetensors"))


def test_snapshots_may_take_half_the_space(runs, tmp_path, launch):
    sizes = {}
    for dtype in ("fp32", "fp16"):
        argv = [*TINY_RUN, *POWER, "--train.steps", "2", "--train.snapshot_every", "2", "--train.ema_decay", "0.1"]
        codes, output = launch(
            "sit_atconv/train.py", [*argv, "--train.snapshot_dtype", dtype, "--out", tmp_path / dtype]
        )
        assert codes == [0], output
        sizes[dtype] = snapshot_path(tmp_path / dtype, 2).stat().st_size
    assert 0.5 <= sizes["fp16"] / sizes["fp32"] < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--std", "0.4"], "above 0 and below 0.289, not 0.4"),
        (["--std", "0.1", "--step", "3"], "is of step 4, after step 3"),
        (["--std", "0.1", "--out", "{runs}"], "is not an empty folder: give another --out"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(runs, tmp_path, fails, options, message):
    options = [option.format(runs=runs) for option in options]
    assert message in fails(average, [runs / "kept", "--out", tmp_path / "out", *options])


def test_runs_without_snapshots_and_damaged_ones_are_one_line(runs, tmp_path, fails):
    assert "has no snapshots: give the folder of a run, trained with --train.ema_profile power" in fails(
        average, [runs / "direct", "--std", "0.1", "--out", tmp_path / "out"]
    )
    (tmp_path / "snapshots").mkdir()
    snapshot_path(tmp_path, 4).write_bytes(b"short")
    with pytest.raises(ValueError, match="is damaged: delete it"):
        list_snapshots(tmp_path)


def test_snapshots_of_another_profile_are_refused(fails):
    train = load_command("sit_atconv/train.py").main
    assert "keeps power function averages" in fails(train, ["--train.snapshot_every", "5"])
    assert "below 0.289, not 0.9999" in fails(train, ["--train.ema_profile", "power", "--train.ema_decay", "0.9999"])


@pytest.mark.slow
def test_a_run_that_was_killed_at_a_snapshot_keeps_the_same_ones(launch, tmp_path):
    argv = [*TINY_RUN, *POWER, "--train.ema_decay", "[0.05,0.1]", "--train.snapshot_every", "1"]
    assert launch("sit_atconv/train.py", [*argv, "--out", tmp_path / "whole"])[0] == [0]
    codes, _ = launch("sit_atconv/train.py", [*argv, "--out", tmp_path / "run"], die="after the first checkpoint")
    assert codes == [-9]
    codes, output = launch("sit_atconv/train.py", [*argv, "--out", tmp_path / "run"])
    assert codes == [0], output
    folders = (tmp_path / name / "snapshots" for name in ("whole", "run"))
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert len(one) == 4 and one == two
