"""Turns published weights into ours, and ours into published forms.

    python -m sit_atconv.convert FILE.pt OUT [--model SiT-XL/2] [--vae ID_OR_FOLDER]
    python -m sit_atconv.convert RUN OUT.pt --to sit
    python -m sit_atconv.convert PIPELINE OUT

What comes out says how to sample from it, as far as its form can.
"""

import itertools
import shlex
import sys
from pathlib import Path

from sit_atconv.data import DEFAULT_VAE
from sit_atconv.runtime.commands import ArgumentParser, at_least, finite, run_command, user_errors
from sit_atconv.runtime.installation import command
from sit_atconv.runtime.names import labels_by_name

OF_FILES = {"interpolant": "--path", "prediction": "--prediction", "class_names": "--class-names",
            "num_classes": "--num-classes"}


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    source, out, form, ema = (options.pop(name) for name in ("source", "out", "to", "ema"))
    with user_errors():
        from sit_atconv.checkpoints.weights import locate_weights

        check_out(out, form)  # answers before torch is imported
        path = locate_weights(source, ema, model=options["model"], vae=options["vae"])
        if options["class_names"]:
            options["class_names"] = read_class_names(Path(options["class_names"]))
        weights = load(source, path, ema, options)
        for note in (*weights.notes, *repeated(weights.recipe.class_names)):
            print(f"note: {note}", file=sys.stderr)
        print(convert(weights, source, out, form))


def check_out(out: Path, form: str) -> None:
    """Raises ValueError where something is in the way, or a file would not be known as one."""
    if form in ("sit", "repa"):
        if out.suffix != ".pt":
            raise ValueError(f"--to {form} writes one file: give an OUT that ends in .pt, not {out}")
        if out.exists():
            raise ValueError(f"{out} exists: give another OUT")
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: give another OUT")


def read_class_names(path: Path) -> list[str]:
    """A name on each line -> the names of labels 0, 1, ..., without outer blanks. (Blank lines may follow the last.)

    Raises:
        ValueError: the file is no text, or a line is empty; the message names it.
        OSError: there is no such file.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--class-names {path} is no UTF-8 text: give a text file with a name on each line") from error
    if not names or "" in names:
        line = names.index("") + 1 if names else 1
        raise ValueError(f"line {line} of --class-names {path} is empty: a name belongs on each line")
    return names


def repeated(class_names: list[str]) -> list[str]:
    """A line on names that several labels have, if there are any."""
    found = [f"{name!r} names labels {', '.join(map(str, labels))}"
             for name, labels in labels_by_name(class_names).items() if len(labels) > 1]
    return [f"{'; '.join(found)}: choose among them by number"] if found else []


def load(source: str, path: Path, ema: bool | float, options: dict):
    """The weights of a file or of a folder without a recipe, by all options, or of anything else, which knows most."""
    from sit_atconv.checkpoints.weights import is_without_recipe, load_weights

    if is_without_recipe(path):
        from sit_atconv.checkpoints.published_models import load_published

        return load_published(path, options.pop("model"), ema=ema, **options)
    for name, option in OF_FILES.items():
        if options[name] is not None:
            raise ValueError(f"{option} is for files of published weights: leave it out, since the weights of {source} "
                             "say this themselves")
    return load_weights(source, ema, vae=options["vae"])


def convert(weights, source: str, out: Path, form: str) -> str:
    """Writes the weights in a form; returns what to tell the user. ValueError: it cannot hold what they need."""
    config, recipe, quoted = weights.model.config, weights.recipe, shlex.quote(str(out))
    needed = recipe.backbone or (recipe.objective or {}).get("class_path")
    if needed and form != "ours":
        raise ValueError(f"--to {form} does not say that these weights need {needed}: convert them to ours")
    null = "without a null label" if not config.has_null_label else (
        "and a null label that was never trained" if recipe.null_label_trained is False else "and a null label")
    kind = {"EMA": "EMA weights", "as trained": "trained weights", None: "weights"}[recipe.average]
    unknown = "" if recipe.ema_known else " (whether they are averaged is not said)"
    what = f"{kind} of {source}{unknown}, {config.num_classes} classes {null}"
    if form in ("sit", "repa"):
        from sit_atconv.checkpoints.published_models import save_published

        out.parent.mkdir(parents=True, exist_ok=True)
        preset = save_published(weights, out, form)
        vae, lines = recipe.codec.get("source", ""), [f"{out}: {preset}, {what}, in {form} form"]
        if Path(vae).is_absolute() and not Path(vae).is_dir():
            lines.append(f"its VAE is not at {vae} any more: give --vae where the file is read")
        else:
            lines.append(f"read it back: {command('convert')} {quoted} {shlex.quote(str(_free_name(out)))}")
        if form == "repa":
            lines.insert(1, "its code builds the model with projectors, which are not in it: load with strict=False")
        return "\n".join(lines)
    if form == "pipeline":
        from sit_atconv.pipeline import export_pipeline

        export_pipeline(weights, out)
        return f"{out}: pipeline with the {what}\nsample: {command('generate')} --ckpt {quoted}"
    from sit_atconv.checkpoints.exported import export_weights

    export_weights(weights, out)
    return f"{out}: {what}\nsample: {command('generate')} --ckpt {quoted}"


def _free_name(out: Path) -> Path:
    """Returns a name beside a file that nothing bears yet: "run" for "run.pt", or "run-2", ..."""
    names = (out.with_name(out.stem + (f"-{number}" if number > 1 else "")) for number in itertools.count(1))
    return next(path for path in names if not path.exists())


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("convert"),
        usage="%(prog)s SOURCE OUT [--model SiT-XL/2] [--to ours|sit|repa|pipeline] [options]",
        description="Turns the weights published for SiT, REPA and ATConv's ports of both into a folder of ours, which "
        "needs no flags to sample from, and ours into those forms.",
    )
    parser.add_argument("source", metavar="SOURCE",
                        help="a file of published weights (.pt, .safetensors), or what --ckpt of sample/generate.py "
                        "takes: a run, a checkpoint, an exported folder, a pipeline, a hub id, a folder of "
                        "SiT.save_pretrained")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder; a new .pt file for sit and repa")
    parser.add_argument("--to", choices=("ours", "sit", "repa", "pipeline"), default="ours",
                        help="ours: a folder of safetensors and recipe; sit, repa: a .pt file as their code writes it "
                        "(ATConv with tanh-GELU fits sit, with SiLU and without learn_sigma repa); pipeline: a "
                        "diffusers pipeline")
    average = parser.add_mutually_exclusive_group()
    average.add_argument("--ema", type=finite, default=True, metavar="DECAY",
                         help="of a run with several averages, the one of this decay instead of the first")
    average.add_argument("--no-ema", dest="ema", action="store_false", help="the weights as trained, not their average")
    parser.add_argument("--vae", metavar="ID_OR_FOLDER",
                        help="where the VAE is now, which must be the one trained with; of a file, the VAE of its "
                        f"latents, or identity for a model of pixels (default: as the file says, or {DEFAULT_VAE})")
    of_files = parser.add_argument_group("what a published file, or a folder of SiT.save_pretrained, may not say")
    of_files.add_argument("--model", metavar="PRESET",
                          help="its depth, width, heads, patch and mixers, e.g. SiT-XL/2 (default: as the file says)")
    of_files.add_argument("--path", dest="interpolant", choices=("linear", "gvp", "vp"),
                          help="the interpolant it was trained along (default: as the file says, or linear)")
    of_files.add_argument("--prediction", choices=("velocity", "noise", "score", "data"),
                          help="what its output stands for (default: as the file says, or velocity)")
    of_files.add_argument("--class-names", metavar="FILE", help="names of labels 0, 1, ..., one a line")
    of_files.add_argument("--num-classes", type=at_least(1), metavar="N",
                          help="classes, without the null label (default: as the file says, or one fewer than labels)")
    return parser


if __name__ == "__main__":
    run_command(main)
