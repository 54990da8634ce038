"""The converting command: published files to our folders and back, its output and its errors."""

import contextlib
import dataclasses
import io
import pickle
import shlex
import shutil

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from sit_atconv.checkpoints.exported import save_weights
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.data.codecs import VAECodec
from sit_atconv.models import SiT
from sit_atconv.sampling import SampleStream
from tests.checkpoints.test_published_models import BATCH, assert_same_function, published, repa_model, small
from tests.conftest import TINY_RUN, load_command

CONVERT = "sit_atconv/convert.py"


@pytest.fixture
def convert(capsys):
    """convert(*argv) -> the lines printed."""

    def run(*argv) -> list[str]:
        load_command(CONVERT).main(list(map(str, argv)))
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture(scope="module")
def preset_run(launch, tmp_path_factory):
    """A run of a preset's size, which SiT's form can name."""
    run = tmp_path_factory.mktemp("preset") / "run"
    size = ["--model.depth", 4, "--model.hidden_size", 128, "--model.num_heads", 4, "--train.batch_size", 64]
    codes, output = launch("sit_atconv/train.py", [*TINY_RUN, *size, "--out", run])
    assert codes == [0], output
    return run


@pytest.fixture
def notes(convert, monkeypatch):
    """notes(*argv) -> (the lines printed, the notes on stderr)."""

    def run(*argv):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            lines = convert(*argv)
        return lines, [line for line in stderr.getvalue().splitlines() if line.startswith("note: ")]

    return run


def test_repas_file_is_converted_to_ours_and_back(convert, tmp_path):
    theirs = repa_model("hybrid")
    source = published(theirs, tmp_path / "a.pt", "repa")
    (tmp_path / "names.txt").write_text("".join(f"digit {i}\n" for i in range(10)))
    lines = convert(
        source,
        tmp_path / "new" / "ours",
        "--model",
        "SiT-ATConv-Tiny/2-Hybrid",
        "--vae",
        "identity",
        "--class-names",
        tmp_path / "names.txt",
        "--prediction",
        "velocity",
    )
    assert lines[0] == f"{tmp_path}/new/ours: EMA weights of {source}, 10 classes and a null label"
    assert lines[1] == f"sample: python sample/generate.py --ckpt {tmp_path}/new/ours"
    ours = load_weights(str(tmp_path / "new" / "ours"))
    assert ours.recipe.class_names[3] == "digit 3" and ours.home == tmp_path / "new" / "ours"
    assert_same_function(ours.model, theirs, "repa")
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]

    lines = convert(tmp_path / "new" / "ours", tmp_path / "b.pt", "--to", "repa")
    assert lines[0].startswith(f"{tmp_path}/b.pt: SiT-ATConv-Tiny/2-Hybrid, EMA weights of ") and len(lines) == 3
    assert "projectors" in lines[1]
    assert lines[2] == f"read it back: python -m sit_atconv.convert {tmp_path}/b.pt {tmp_path}/b"
    assert_same_function(load_weights(str(tmp_path / "b.pt"), vae="identity").model, theirs, "repa")


def test_a_run_is_converted_to_sits_form(convert, preset_run, tmp_path):
    lines = convert(preset_run, tmp_path / "a.pt", "--to", "sit", "--no-ema")
    assert "SiT-ATConv-Tiny/2, trained weights of " in lines[0]
    ours, theirs = load_weights(str(preset_run), ema=False), load_weights(str(tmp_path / "a.pt"))
    assert theirs.model.config.input_size == 8 and theirs.model.null_label == 10
    x = BATCH[0][:, :1]
    assert torch.equal(ours.model(x, *BATCH[1:]), theirs.model(x, *BATCH[1:]))


def test_ema_weights_in_sits_form_are_not_loaded_as_trained(convert, preset_run, tmp_path, fails):
    lines = convert(preset_run, tmp_path / "run.pt", "--to", "sit")
    assert lines[1].split()[-1] == f"{tmp_path}/run"
    error = fails(load_command("sit_atconv/convert.py").main, [tmp_path / "run.pt", tmp_path / "out", "--no-ema"])
    assert "holds only EMA weights, of decay" in error and "leave out --no-ema" in error


def test_the_printed_command_writes_to_a_new_folder(convert, preset_run, tmp_path):
    (tmp_path / "run").mkdir()
    assert f"{tmp_path}/run-2" in convert(preset_run, tmp_path / "run.pt", "--to", "sit")[1]


def test_sits_form_records_the_vae_and_tells_if_it_is_gone(convert, preset_run, vae, make_vae, tmp_path):
    here = shutil.copytree(vae, tmp_path / "here")
    weights = load_weights(str(preset_run))
    model = SiT.from_preset("SiT-ATConv-Tiny/2", num_classes=10, input_size=8, learn_sigma=False)
    recipe = dataclasses.replace(weights.recipe, codec=VAECodec(str(here)).describe())
    save_weights(model, recipe, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "a.pt", "--to", "sit")
    assert load_weights(str(tmp_path / "a.pt")).recipe.codec == recipe.codec
    with pytest.raises(ValueError, match=r"a\.pt was trained with another codec than .* \(weights \w+ -> \w+\)"):
        load_weights(str(tmp_path / "a.pt"), vae=str(make_vae(seed=1)))
    here.rename(tmp_path / "there")
    lines = convert(tmp_path / "ours", tmp_path / "b.pt", "--to", "sit")
    assert lines[-1] == f"its VAE is not at {here} any more: give --vae when you use the file"
    assert load_weights(str(tmp_path / "b.pt"), vae=str(tmp_path / "there")).recipe.codec["source"].endswith("there")


def test_printed_commands_run(convert, preset_run, tmp_path):
    """The path has a blank; class names and step are restored from a file and from a pipeline."""
    folder = tmp_path / "my weights"
    for out, form in (("a.pt", "sit"), ("pipe", "pipeline")):
        lines = convert(preset_run, folder / out, "--to", form)
        command = shlex.split(lines[-1].split(": ", 1)[1])
        assert command[:2] == ["python", "-m"] or command[:2] == ["python", "sample/generate.py"]
        if form == "sit":
            assert f"sample: python sample/generate.py --ckpt '{folder}/a'" in convert(*command[3:])
            read = load_weights(str(folder / "a")).recipe
        else:
            assert command[2:] == ["--ckpt", str(folder / "pipe")]
            read = load_weights(str(folder / "pipe")).recipe
        recipe = load_weights(str(preset_run)).recipe
        if form == "sit":  # its row says that it was trained
            recipe = dataclasses.replace(recipe, null_label_trained=recipe.null_label_trained is not False)
        assert read == recipe


def test_a_pipeline_is_converted_to_ours(convert, preset_run, tmp_path, fails):
    convert(preset_run, tmp_path / "pipe", "--to", "pipeline")
    lines = convert(tmp_path / "pipe", tmp_path / "ours")
    assert lines[0] == f"{tmp_path}/ours: EMA weights of {tmp_path}/pipe, 10 classes and a null label"
    ours, run = load_weights(str(tmp_path / "ours")), load_weights(str(preset_run))
    assert ours.recipe == run.recipe
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), run.model.parameters(), strict=True))
    assert "--path is for files" in fails(
        load_command(CONVERT).main, [tmp_path / "pipe", tmp_path / "out", "--path", "gvp"]
    )


def test_unknown_settings_are_reported_as_unknown(notes, tmp_path, fails):
    small("attention").save_pretrained(tmp_path / "bare")
    lines, said = notes(tmp_path / "bare", tmp_path / "ours", "--vae", "identity", "--path", "gvp")
    assert lines[0] == (
        f"{tmp_path}/ours: weights of {tmp_path}/bare (it is not known whether they are EMA weights), "
        "10 classes and a null label"
    )
    assert said == [
        f"note: {tmp_path}/bare does not name its classes: refer to them by number",
        f"note: {tmp_path}/bare does not say how it was trained: assuming --prediction velocity; "
        "to change this, use these options of python -m sit_atconv.convert",
    ]
    again = load_weights(str(tmp_path / "ours"))
    assert again.recipe.average is None and again.recipe.interpolant == "gvp" and not again.notes


def test_class_names_are_read_from_a_text_file(notes, tmp_path, fails):
    source = published(
        small("attention"), tmp_path / "a.pt", model="SiT-Tiny/2", path_type="Linear", prediction="velocity"
    )
    names = tmp_path / "names.txt"
    lines = [f" class {i} " for i in range(8)] + ["cafe\u0301", "caf\u00e9"]
    names.write_text("\ufeff" + "\r\n".join(lines) + "\n\n", encoding="utf-8")
    argv = [source, tmp_path / "out", "--vae", "identity", "--class-names", names]
    assert notes(*argv)[1] == ["note: 'caf\u00e9' names labels 8, 9: choose among them by number"]
    assert load_weights(str(tmp_path / "out")).recipe.class_names == [line.strip() for line in lines]
    for content, message in ((b"a\n\nb\n", "line 2 of --class"), (b"\n", "line 1 of"), (b"\xff\xfe", "not UTF-8")):
        names.write_bytes(content)
        assert message in fails(load_command(CONVERT).main, [source, tmp_path / "other", *argv[2:]])


@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [
        ("euler", FlowMatchEulerDiscreteScheduler()),
        ("unipc", UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
        ("dpm++", DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
    ],
)
def test_pipeline_and_sampling_command_draw_the_same_images(launch, convert, preset_run, tmp_path, solver, scheduler):
    from sit_atconv.pipeline import SiTPipeline

    assert "pipeline" in convert(preset_run, tmp_path / "pipeline", "--to", "pipeline")[0]
    codes, output = launch(
        "sample/generate.py",
        [
            "--ckpt",
            preset_run,
            "--cfg",
            3,
            "--classes",
            4,
            7,
            "--num-samples",
            6,
            "--solver",
            solver,
            "--steps",
            10,
            "--out",
            tmp_path / "samples",
        ],
    )
    assert codes == [0], output
    pipeline = SiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.scheduler = scheduler
    images = pipeline([4, 7] * 3, 3.0, 10, latents=SampleStream(0, range(6)).randn((1, 8, 8))).images
    expected = np.load(tmp_path / "samples" / "samples.npz")["arr_0"].astype(int)
    assert np.abs(np.stack([np.array(image) for image in images]) - expected).max() <= 1


def test_errors_name_value_and_remedy(fails, tmp_path, preset_run):
    main, out = load_command(CONVERT).main, tmp_path / "out"
    source = published(small("attention"), tmp_path / "a.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    for argv, message in [
        ([source], "the following arguments are required: OUT"),
        ([source, out, "--to", "dit"], "invalid choice: 'dit'"),
        ([source, out, "--ema", "0.9", "--no-ema"], "not allowed with argument"),
        ([source, out, "--num-classes", "0"], "'0' is not a whole number of at least 1"),
        ([source, out], "give --model SiT-Tiny/2"),
        ([source, tmp_path / "full", "--model", "SiT-Tiny/2"], "full is not an empty folder"),
        ([source, source, "--model", "SiT-Tiny/2"], "a.pt is not an empty folder"),
        ([preset_run, source, "--to", "sit"], "a.pt exists: give another OUT"),
        ([preset_run, out, "--to", "sit"], "give an OUT that ends in .pt"),
        ([preset_run, tmp_path / "b.pt", "--to", "repa"], "REPA's form needs kernel_act silu"),
        ([preset_run, out, "--model", "SiT-Tiny/2"], "--model SiT-Tiny/2 is for files of published weights"),
        ([preset_run, out, "--path", "gvp"], "--path is for files of published weights"),
        ([preset_run, out, "--ema", "0.5"], "has no EMA of decay 0.5"),
        ([source, out, "--model", "SiT-Tiny/2", "--class-names", tmp_path / "nowhere"], "nowhere"),
    ]:
        assert message in fails(main, argv), argv
    assert not out.exists() and not (tmp_path / "b.pt").exists()


def test_forms_that_cannot_record_a_users_objective_are_refused(convert, preset_run, tmp_path, fails):
    weights, objective = load_weights(str(preset_run)), {"class_path": "mine.Objective", "init_args": {}}
    save_weights(weights.model, dataclasses.replace(weights.recipe, objective=objective), tmp_path / "own")
    for form in ("sit", "repa", "pipeline"):
        error = fails(load_command(CONVERT).main, [tmp_path / "own", tmp_path / "out.pt", "--to", form])
        assert f"--to {form} cannot record that these weights need mine.Objective: use --to ours" in error
    assert not (tmp_path / "out.pt").exists()
    convert(tmp_path / "own", tmp_path / "ours")
    assert load_weights(str(tmp_path / "ours")).recipe.objective == objective


@pytest.mark.parametrize("command", [CONVERT, "sample/generate.py"])
def test_no_code_is_run(fails, tmp_path, command):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"ema": small("atconv").state_dict(), "args": Payload()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    for path in (tmp_path / "a.pt", tmp_path / "b.pt"):
        argv = [path, tmp_path / "out"] if command == CONVERT else ["--ckpt", path, "--out", tmp_path / "out"]
        assert "could run code" in fails(load_command(command).main, argv)
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()
