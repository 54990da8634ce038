"""Configuration from YAML and the command line."""

import json
import shutil
import sys

import pytest
import yaml

from sit_atconv.data import sources
from sit_atconv.data.image_rules import RULES
from sit_atconv.data.sources import describe_data
from sit_atconv.training.config import TrainConfig, parse, resolve_precision
from tests.conftest import ROOT


def test_the_default_is_the_digits_configuration():
    config, named = parse([]), parse(["--config", str(ROOT / "configs/digits.yaml")])
    assert config.data.images == "digits" and config.options == named.options
    assert (config.model["hidden_size"], config.model["mixer"], config.train.lr) == (128, "atconv", 3e-3)


def test_defaults_are_the_published_recipe_of_sit(tmp_path):
    (tmp_path / "empty.yaml").write_text("{}")
    config = parse(["--config", str(tmp_path / "empty.yaml")])
    train = config.train
    assert (train.lr, train.weight_decay, train.ema_decay, train.batch_size) == (1e-4, 0.0, 0.9999, 256)
    assert train.max_grad_norm is None and train.learning_rate(0) == train.learning_rate(399_999) == 1e-4
    assert config.flow.class_dropout_prob == 0.1


def test_a_shipped_configuration_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = parse(["--config", "imagenet512", "--preset", "SiT-B/2", "--train.precision", "bf16"])
    assert named.data.image_size == 512 and str(named.out) == "runs/imagenet512-sit-b2"
    assert named == parse(["--config=configs/imagenet512.yaml", "--preset", "SiT-B/2", "--train.precision", "bf16"])
    assert parse(["--config", "{train: {steps: 3}}"]).train.steps == 3  # jsonargparse also takes YAML text


def test_yaml_overrides_the_preset_and_the_command_line_overrides_both(tmp_path):
    config = parse(["--preset", "SiT-S/4"])
    assert (config.model["mixer"], config.model["depth"], config.model["patch_size"]) == ("attention", 12, 4)
    (tmp_path / "mine.yaml").write_text("preset: SiT-ATConv-S/2\nmodel:\n  depth: 3\n  kernel_size: 5\n")
    config = parse(["--config", str(tmp_path / "mine.yaml"), "--model.kernel_size", "7"])
    shape = {name: config.model[name] for name in ("hidden_size", "depth", "kernel_size", "mixer")}
    assert shape == {"hidden_size": 384, "depth": 3, "kernel_size": 7, "mixer": "atconv"}


def test_a_saved_configuration_reads_back_unchanged(tmp_path):
    config = parse(["--model.mixer", "[attention,atconv,atconv,attention]", "--train.lr", "1e-5"])
    config.save(tmp_path)
    again = parse(["--config", str(tmp_path / "config.yaml")])
    assert again.options == config.options and again.model["mixer"] == ["attention", "atconv", "atconv", "attention"]
    assert again.changes(tmp_path) == []
    other = parse(["--config", str(tmp_path / "config.yaml"), "--train.seed", "4", "--train.steps", "9"])
    assert other.changes(tmp_path) == ["train.seed 0 -> 4"]


OWN = """
from dataclasses import dataclass
from sit_atconv.flow import FlowMatching, Objective

@dataclass(frozen=True)
class Scaled(FlowMatching):
    \"\"\"Args:
        scale: factor of the loss.
    \"\"\"
    scale: float = 2.0

@dataclass(frozen=True)
class Other(Objective):
    class_dropout_prob: float = 0.0
    def draw(self, shape, generator): ...
    def loss(self, model, data, y, draw, null_label): ...
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a user's module of objectives to the working directory."""
    (tmp_path / "own_objectives.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("own_objectives", None)


@pytest.mark.parametrize(
    "argv",
    [
        ["--flow", "own_objectives.Scaled", "--flow.scale", "3", "--flow.path", "gvp"],
        ["--flow.scale", "3", "--flow.path", "gvp", "--flow", "own_objectives.Scaled"],
    ],
)
def test_a_users_objective_and_its_options_in_any_order(own, argv, tmp_path):
    config = parse([*argv, "--out", str(tmp_path)])
    assert (config.flow.scale, config.flow.path, config.flow.class_dropout_prob) == (3.0, "gvp", 0.2)
    assert config.objective is None and config.prediction == "velocity"  # path and prediction are enough to sample
    config.save(tmp_path)
    again = parse(["--config", str(tmp_path / "config.yaml")])
    assert again.options == config.options and type(again.flow) is type(config.flow)


@pytest.mark.parametrize(
    "argv",
    [
        ["--flow", "own_objectives.Other", "--flow.path", "gvp"],
        ["--flow.path", "gvp", "--flow", "own_objectives.Other"],
        ["--optimizer.lr", "1"],
        ["--flow.strength", "1"],
    ],
)
def test_an_option_that_the_chosen_class_lacks_is_an_error(own, argv, capsys):
    with pytest.raises(SystemExit):
        parse(argv)
    name = next(argument for argument in argv if "." in argument and argument.startswith("--"))[2:]
    assert f"error: {name} is no option of" in capsys.readouterr().err


def test_help_shows_the_options_of_the_chosen_classes(own, capsys):
    for argv, shown in (
        (["--flow", "own_objectives.Scaled"], "--flow.scale"),
        ([], "--flow.time_shift"),
        (["--optimizer", "SGD"], "--optimizer.momentum"),
        ([], "--optimizer.betas"),
    ):
        with pytest.raises(SystemExit) as left:
            parse([*argv, "--help"])
        assert left.value.code == 0 and shown in capsys.readouterr().out


def test_an_option_that_an_older_config_lacks_had_its_default(tmp_path):
    config = parse(["--out", str(tmp_path)])
    config.save(tmp_path)
    old = {name: value for name, value in config.options.items() if name not in ("optimizer", "auxiliary")}
    del old["train"]["ema_profile"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert parse(["--out", str(tmp_path)]).changes(tmp_path) == []
    assert parse(["--optimizer.eps", "1e-6"]).changes(tmp_path) == ["optimizer.init_args.eps None -> 1e-06"]
    with_path = {**old, "flow": {"class_path": "sit_atconv.flow.FlowMatching", "init_args": old["flow"]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(with_path))
    assert parse(["--out", str(tmp_path)]).changes(tmp_path) == []


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 0.5, 0.25]), ("cosine", [0.5, 1, 0.5, 0.146])],
)
def test_learning_rate(decay, expected):
    train = TrainConfig(steps=5, lr=1.0, warmup_steps=1, lr_decay=decay)
    assert [train.learning_rate(step) for step in (0, 1, 3, 4)] == pytest.approx(expected, abs=1e-3)


def test_precision_is_resolved_for_the_machine(monkeypatch):
    assert resolve_precision("bf16") == "bf16" and resolve_precision("auto") in ("fp32", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="use bf16"):
        resolve_precision("fp16")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert resolve_precision("auto") == "bf16"
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)
    assert resolve_precision("auto") == "fp32"


@pytest.mark.parametrize(
    "option", [{"lr": -1.0}, {"ema_decay": 1.0}, {"max_grad_norm": 0.0}, {"seed": -1}, {"cpu_threads": 0}, {"steps": 0}]
)
def test_values_out_of_range_are_named(option):
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=rf"train\.{name}.*{value}"):
        TrainConfig(**option)


@pytest.mark.parametrize("content", [b"", b"- a list\n", b"\x00\x00"])
def test_a_damaged_config_of_a_run_is_reported(tmp_path, content):
    config = parse(["--out", str(tmp_path)])
    config.save(tmp_path, {})
    (tmp_path / "checkpoints" / "step-0000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged.*give another --out"):
        config.check_resumable({})


def test_checkpoints_without_a_config_are_not_resumed(tmp_path):
    (tmp_path / "checkpoints" / "step-0000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has checkpoints and no config\.yaml"):
        parse(["--out", str(tmp_path)]).check_resumable({})


@pytest.fixture
def folder_run(digit_folder, tmp_path):
    """folder_run(rules, **described) -> (options of a run with a checkpoint on a folder of images, that folder).

    Its data.json describes the images under these rules, with the entries of `described` replaced.
    """

    def make(rules: int = RULES, **described) -> tuple[list[str], str]:
        images = shutil.copytree(digit_folder, tmp_path / "images")
        argv = [
            "--data.images",
            str(images),
            "--data.image_size",
            "16",
            "--data.codec",
            "identity",
            "--out",
            str(tmp_path / "run"),
        ]
        config = parse(argv)
        (config.out / "checkpoints" / "step-0000001").mkdir(parents=True)
        config.save(config.out, describe_data(*config.data.open(rules)) | described)
        return argv, images

    return make


def test_options_that_accept_faulty_data_may_change(folder_run):
    argv, _ = folder_run()
    config = parse(
        [*argv, "--data.skip_unreadable", "true", "--data.keep_empty_classes", "true", "--data.max_megapixels", "300"]
    )
    config.check_resumable(describe_data(*config.data.open(config.data_rules())))


def test_other_data_are_refused_with_a_remedy(folder_run):
    argv, images = folder_run()
    next(images.rglob("*.png")).unlink()
    config = parse(argv)
    with pytest.raises(ValueError, match=r"images 120 -> 119.*put back.*--data.skip_unreadable.*--init-from .* --out"):
        config.check_resumable(describe_data(*config.data.open(config.data_rules())))


def test_another_codec_is_refused_with_its_own_remedy(folder_run):
    argv, _ = folder_run(codec={"kind": "autoencoder_kl"})
    config = parse(argv)
    with pytest.raises(ValueError, match=r"codec\.kind autoencoder_kl -> identity.*: resume with those, or start"):
        config.check_resumable(describe_data(*config.data.open(config.data_rules())))


def test_a_run_without_a_checkpoint_accepts_any_data(folder_run):
    argv, images = folder_run()
    next(images.rglob("*.png")).unlink()
    config = parse([*argv, "--train.lr", "0.5"])
    (config.out / "checkpoints" / "step-0000001").rmdir()
    assert config.data_rules() is None
    config.check_resumable(describe_data(*config.data.open(config.data_rules())))


def test_a_run_keeps_the_rules_by_which_its_data_were_read(folder_run, monkeypatch):
    argv, _ = folder_run()
    config, described = parse(argv), parse(argv).out / "data.json"
    now = json.loads(described.read_text())
    described.write_text(json.dumps({**now, "rules": RULES}))
    assert config.data_rules() == RULES
    described.write_text(json.dumps({key: value for key, value in now.items() if key != "rules"}))
    assert config.data_rules() == 1  # a run older than the rules
    opened, images = [], config.data.open()[0]
    monkeypatch.setattr(sources.ImageFolder, "open", lambda name, **options: opened.append(options) or images)
    config.data.open(config.data_rules())
    config.data.open()
    assert [(options["rules"], options["keep_empty_classes"]) for options in opened] == [(1, True), (None, False)]


def test_an_older_run_keeps_the_order_of_its_classes(digit_folder, tmp_path):
    """Class folders 1, 2, 10 were sorted as text in older runs, and are sorted as numbers now."""
    for name in ("1", "2", "10"):
        shutil.copytree(digit_folder / "digit 1", tmp_path / "images" / name)
    config = parse(
        [
            "--data.images",
            str(tmp_path / "images"),
            "--data.image_size",
            "16",
            "--data.codec",
            "identity",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    assert config.data.open(config.data_rules())[0].class_names == ("1", "2", "10")
    (config.out / "checkpoints" / "step-0000001").mkdir(parents=True)
    earlier = {key: value for key, value in describe_data(*config.data.open(1)).items() if key != "rules"}
    config.save(config.out, earlier)
    data, codec = config.data.open(config.data_rules())
    assert data.class_names == ("1", "10", "2")
    config.check_resumable(describe_data(data, codec))


@pytest.mark.parametrize("option", ["data.images", "data.latents", "data.codec"])
def test_a_missing_path_is_named_with_its_option(digit_folder, option):
    options = {"data.images": str(digit_folder)} | {option: "./gone/away"}
    if option == "data.latents":
        del options["data.images"]
    config = parse([text for name, value in options.items() for text in (f"--{name}", value)])
    with pytest.raises(ValueError, match=rf"^{option}: .*gone/away"):
        config.data.open()
