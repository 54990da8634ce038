"""Converts published weights to our format, and ours to published formats.

    python -m sit_atconv.convert FILE.pt OUT [--model SiT-XL/2] [--vae ID_OR_FOLDER]
    python -m sit_atconv.convert RUN OUT.pt --to sit
    python -m sit_atconv.convert PIPELINE OUT
    python -m sit_atconv.convert FILE.pth OUT --model attnet_t2

The result records how to sample from it, as far as its format can.
"""

import itertools
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv.data import DEFAULT_VAE
from sit_atconv.runtime.commands import ArgumentParser, at_least, finite, run_command, user_errors
from sit_atconv.runtime.installation import command
from sit_atconv.runtime.names import labels_by_name

if TYPE_CHECKING:
    from sit_atconv.checkpoints.exported import Weights

OF_FILES = {
    "interpolant": "--path",
    "prediction": "--prediction",
    "class_names": "--class-names",
    "num_classes": "--num-classes",
}


FILES = {"sit": (".pt",), "repa": (".pt",), "attnet": (".pth", ".pt")}  # forms of one file, and how its name ends


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    source, out, form, ema = (options.pop(name) for name in ("source", "out", "to", "ema"))
    card = {name: options.pop(name) for name in ("licence", "scores")}
    with user_errors():
        if form != "pipeline" and any(card.values()):
            raise ValueError(
                "--license and --scores are for the card of a pipeline: add --to pipeline, or leave them out"
            )
        from sit_atconv.checkpoints.weights import locate_weights

        check_out(out, form)  # before torch is imported, which takes seconds
        if form == "attnet" or (options["model"] or "").startswith("attnet_"):
            print(convert_attnet(source, out, form, options))
            return
        path = locate_weights(source, ema, model=options["model"], vae=options["vae"])
        if options["class_names"]:
            options["class_names"] = read_class_names(Path(options["class_names"]))
        weights = load(source, path, ema, options)
        repeated = [
            f"{name!r} names labels {', '.join(map(str, labels))}: choose among them by number"
            for name, labels in labels_by_name(weights.recipe.class_names).items()
            if len(labels) > 1
        ]
        for note in (*weights.notes, *repeated):
            print(f"note: {note}", file=sys.stderr)
        print(convert(weights, source, out, form, **card))


def check_out(out: Path, form: str) -> None:
    """Raises ValueError if OUT exists and is not an empty folder, or lacks the suffix of a file."""
    if form in FILES:
        if out.suffix not in FILES[form]:
            endings = " or ".join(FILES[form])
            raise ValueError(f"--to {form} writes one file: give an OUT that ends in {endings} instead of {out}")
        if out.exists():
            raise ValueError(f"{out} exists: give another OUT")
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: give another OUT")


def read_class_names(path: Path) -> list[str]:
    """Reads the names of labels 0, 1, ... from a text file with one name per line.

    Blanks around a name and empty lines at the end are ignored.

    Raises:
        ValueError: the file is not text, or a line is empty; the message names it.
        OSError: there is no such file.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--class-names {path} is not UTF-8 text: give a text file with one name per line") from error
    if not names or "" in names:
        line = names.index("") + 1 if names else 1
        raise ValueError(f"line {line} of --class-names {path} is empty: write one name per line")
    return names


def convert_attnet(source: str, out: Path, form: str, options: dict) -> str:
    """Converts weights of AttNet and returns lines for the user. ValueError: an option is for SiT."""
    from sit_atconv.classification.conversion import export_attnet, import_attnet

    for name, option in {**OF_FILES, "vae": "--vae"}.items():
        if options[name] is not None and (form == "attnet" or name != "class_names"):
            raise ValueError(f"{option} is not for AttNet: leave it out")
    if form == "attnet":
        return export_attnet(source, out)
    if form != "ours":
        raise ValueError(f"--to {form} is for SiT, and {options['model']} is an AttNet: leave --to out")
    names = options["class_names"]
    return import_attnet(source, options["model"], out, read_class_names(Path(names)) if names else None)


def load(source: str, path: Path, ema: bool | float, options: dict) -> "Weights":
    """Loads weights. ValueError: options of published files are given for weights with a recipe."""
    from sit_atconv.checkpoints.weights import is_without_recipe, load_weights

    if is_without_recipe(path):
        from sit_atconv.checkpoints.published_models import load_published

        return load_published(path, options.pop("model"), ema=ema is not False, **options)
    for name, option in OF_FILES.items():
        if options[name] is not None:
            raise ValueError(
                f"{option} is for files of published weights: leave it out, since the weights of {source} record this"
            )
    return load_weights(source, ema, vae=options["vae"])


def convert(weights: "Weights", source: str, out: Path, form: str, **card) -> str:
    """Writes the weights and returns lines for the user. ValueError: the form cannot express the weights."""
    config, recipe, quoted = weights.model.config, weights.recipe, shlex.quote(str(out))
    needed = recipe.backbone or (recipe.objective or {}).get("class_path")
    if needed and form != "ours":
        raise ValueError(f"--to {form} cannot record that these weights need {needed}: use --to ours")
    null = (
        "without a null label"
        if not config.has_null_label
        else ("and a null label that was never trained" if recipe.null_label_trained is False else "and a null label")
    )
    kind = {"EMA": "EMA weights", "as trained": "trained weights", None: "weights"}[recipe.average]
    unknown = "" if recipe.ema_known else " (it is not known whether they are EMA weights)"
    what = f"{kind} of {source}{unknown}, {config.num_classes} classes {null}"
    if form in ("sit", "repa"):
        from sit_atconv.checkpoints.published_models import save_published

        out.parent.mkdir(parents=True, exist_ok=True)
        preset = save_published(weights, out, form)
        vae, lines = recipe.codec.get("source", ""), [f"{out}: {preset}, {what}, in {form} form"]
        if Path(vae).is_absolute() and not Path(vae).is_dir():
            lines.append(f"its VAE is not at {vae} any more: give --vae when you use the file")
        else:
            lines.append(f"read it back: {command('convert')} {quoted} {shlex.quote(str(_free_name(out)))}")
        if form == "repa":
            lines.insert(
                1, "REPA's code builds the model with projectors, which this file lacks: load it with strict=False"
            )
        return "\n".join(lines)
    if form == "pipeline":
        from sit_atconv.pipeline import export_pipeline

        export_pipeline(weights, out, **card)
        what = f"pipeline with the {what}"
    else:
        from sit_atconv.checkpoints.exported import export_weights

        export_weights(weights, out)
    written = [f"card for the hub: {out / 'README.md'}"] if form == "pipeline" else []
    return "\n".join([f"{out}: {what}", *written, f"sample: {command('generate')} --ckpt {quoted}"])


def _free_name(out: Path) -> Path:
    """Returns a path next to a file that does not exist yet: "run" for "run.pt", or "run-2", ..."""
    names = (out.with_name(out.stem + (f"-{number}" if number > 1 else "")) for number in itertools.count(1))
    return next(path for path in names if not path.exists())


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("convert"),
        usage="%(prog)s SOURCE OUT [--model SiT-XL/2] [--to ours|sit|repa|pipeline|attnet] [options]",
        description="Converts the weights published for SiT, REPA and ATConv's ports of both to a folder that needs no "
        "further options for sampling, and our weights to those formats.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="the weights to convert: a file of published weights (.pt, .safetensors), or any --ckpt "
        "of sample/generate.py: a run, a checkpoint, an exported folder, a pipeline, a hub id, a "
        "folder of SiT.save_pretrained",
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the folder to write, new or empty; for sit and repa a new .pt file"
    )
    parser.add_argument(
        "--to",
        choices=("ours", "sit", "repa", "pipeline", "attnet"),
        default="ours",
        help="the format to write. ours: a folder of safetensors and recipe; sit, repa: a .pt file for "
        "their code (for ATConv, sit needs tanh-GELU, and repa SiLU and no learn_sigma); pipeline: a "
        "diffusers pipeline with a card for the hub; attnet: a file for AttNet's code, from a classifier's run "
        "(default: ours)",
    )
    average = parser.add_mutually_exclusive_group()
    average.add_argument(
        "--ema",
        type=finite,
        default=True,
        metavar="DECAY",
        help="use the EMA weights with this decay, if the run has several (default: the first)",
    )
    average.add_argument(
        "--no-ema", dest="ema", action="store_false", help="use the weights as trained instead of the EMA weights"
    )
    parser.add_argument(
        "--vae",
        metavar="ID_OR_FOLDER",
        help="the hub id or present folder of the VAE that the model was trained with, or identity for "
        f"a model of pixels (default: as the weights record it, or {DEFAULT_VAE})",
    )
    card = parser.add_argument_group("options of the card, README.md of a pipeline")
    card.add_argument(
        "--license",
        dest="licence",
        metavar="ID",
        help="licence of the weights, as the hub abbreviates it: apache-2.0, cc-by-nc-4.0, ... (default: not stated)",
    )
    card.add_argument(
        "--scores",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="records of eval/fid.py of samples of these weights, beside those in RUN/samples and RUN/quality",
    )
    of_files = parser.add_argument_group(
        "options for a published file or a folder of SiT.save_pretrained, which may not record them"
    )
    of_files.add_argument(
        "--model",
        metavar="PRESET",
        help="the preset of the model: depth, width, heads, patch and mixers, e.g. SiT-XL/2 "
        "(default: as the file records it); attnet_xxs ... attnet_t4 for weights of AttNet, which become a folder "
        "that timm loads",
    )
    of_files.add_argument(
        "--path",
        dest="interpolant",
        choices=("linear", "gvp", "vp"),
        help="the interpolant of the training (default: as the file records it, or linear)",
    )
    of_files.add_argument(
        "--prediction",
        choices=("velocity", "noise", "score", "data"),
        help="the meaning of the model's output (default: as the file records it, or velocity)",
    )
    of_files.add_argument(
        "--class-names", metavar="FILE", help="a text file with the names of labels 0, 1, ..., one per line"
    )
    of_files.add_argument(
        "--num-classes",
        type=at_least(1),
        metavar="N",
        help="the number of classes without the null label (default: as the file records it, or one "
        "fewer than its labels)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
