"""Turns published weights into ours, and ours into published forms.

    python -m sit_atconv.convert FILE.pt OUT [--model SiT-XL/2] [--vae ID_OR_FOLDER]
    python -m sit_atconv.convert RUN OUT.pt --to sit

What comes out says how to sample from it, as far as its form can.
"""

import shlex
from pathlib import Path

from sit_atconv.commands import ArgumentParser, at_least, finite, run_command, user_errors
from sit_atconv.data import DEFAULT_VAE

OF_FILES = {"interpolant": "--path", "prediction": "--prediction", "class_names": "--class-names",
            "num_classes": "--num-classes"}


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    source, out, form, ema = (options.pop(name) for name in ("source", "out", "to", "ema"))
    with user_errors():
        from sit_atconv.checkpointing.weights import locate_weights

        check_out(out, form)  # answers before torch is imported
        path = locate_weights(source, ema, model=options["model"], vae=options["vae"])
        if options["class_names"]:
            options["class_names"] = Path(options["class_names"]).read_text(encoding="utf-8-sig").splitlines()
        weights = load(source, path, ema, options)
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


def load(source: str, path: Path, ema: bool | float, options: dict):
    """The weights of a published file, by all options, or of anything else, which needs none."""
    if path.is_file():
        from sit_atconv.checkpointing.published_models import load_published

        return load_published(path, options.pop("model"), ema=ema, **options)
    for name, option in OF_FILES.items():
        if options[name] is not None:
            raise ValueError(f"{option} is for files of published weights: leave it out, since the weights of {source} "
                             "say this themselves")
    from sit_atconv.checkpointing.weights import load_weights

    return load_weights(source, ema)


def convert(weights, source: str, out: Path, form: str) -> str:
    """Writes the weights in a form; returns what to tell the user."""
    config, decay = weights.model.config, weights.recipe.ema_decay
    null = "and a null label" if config.has_null_label else "without a null label"
    what = f"{'trained weights' if decay is None else 'EMA weights'} of {source}, {config.num_classes} classes {null}"
    if form in ("sit", "repa"):
        from sit_atconv.checkpointing.published_models import save_published

        out.parent.mkdir(parents=True, exist_ok=True)
        preset = save_published(weights, out, form)
        vae = " --vae identity" if weights.recipe.codec["kind"] == "identity" else ""
        hint = "its code builds the model with projectors, which are not in it: load with strict=False" \
            if form == "repa" else f"read it back: python -m sit_atconv.convert {shlex.quote(str(out))} OUT{vae}"
        return f"{out}: {preset}, {what}, in {form} form\n{hint}"
    if form == "pipeline":
        from sit_atconv.pipeline import export_pipeline

        export_pipeline(weights, out)
        return f"{out}: pipeline with the {what}"
    from sit_atconv.checkpointing.weights import export_weights

    export_weights(weights, out)
    return f"{out}: {what}\nsample: python sample/generate.py --ckpt {shlex.quote(str(out))}"


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m sit_atconv.convert",
        usage="python -m sit_atconv.convert SOURCE OUT [--model SiT-XL/2] [--to ours|sit|repa|pipeline] [options]",
        description="Turns the weights published for SiT, REPA and ATConv's ports of both into a folder of ours, which "
        "needs no flags to sample from, and ours into those forms.",
    )
    parser.add_argument("source", metavar="SOURCE",
                        help="a file of published weights (.pt, .safetensors), or what --ckpt of sample/generate.py "
                        "takes: a run, a checkpoint, an exported folder, a hub id")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder; a new .pt file for sit and repa")
    parser.add_argument("--to", choices=("ours", "sit", "repa", "pipeline"), default="ours",
                        help="ours: a folder of safetensors and recipe; sit, repa: a .pt file as their code writes it "
                        "(ATConv with tanh-GELU fits sit, with SiLU and without learn_sigma repa); pipeline: a "
                        "diffusers pipeline")
    average = parser.add_mutually_exclusive_group()
    average.add_argument("--ema", type=finite, default=True, metavar="DECAY",
                         help="of a run with several averages, the one of this decay instead of the first")
    average.add_argument("--no-ema", dest="ema", action="store_false", help="the weights as trained, not their average")
    of_files = parser.add_argument_group("what a published file may not say of itself")
    of_files.add_argument("--model", metavar="PRESET",
                          help="its depth, width, heads, patch and mixers, e.g. SiT-XL/2 (default: as the file says)")
    of_files.add_argument("--vae", metavar="ID_OR_FOLDER",
                          help="the VAE of its latents, or identity for a model of pixels "
                          f"(default: {DEFAULT_VAE})")
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
