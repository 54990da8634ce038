"""Samples images from a trained model.

    python sample/generate.py --ckpt RUN --cfg 4.0

For several processes, use `accelerate launch sample/generate.py ...` or `torchrun --nproc_per_node 2
sample/generate.py ...`; the images are the same. After a kill, the same command draws the missing samples.
"""

import sys
from pathlib import Path

from sit_atconv.runtime.commands import (
    ArgumentParser,
    add_import_option,
    at_least,
    finite,
    is_main_process,
    positive,
    run_command,
    user_errors,
)
from sit_atconv.runtime.dtypes import DTYPES
from sit_atconv.runtime.installation import command
from sit_atconv.runtime.tables import import_module_of
from sit_atconv.sampling.guidance import GUIDANCE, SCHEDULES
from sit_atconv.sampling.solvers import LAST_STEPS, SOLVERS, default_solver


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    with user_errors():
        for table in (SOLVERS, GUIDANCE):
            if name := options[table.kind]:
                table.find(import_module_of(name))
        from sit_atconv.checkpoints.weights import locate_weights

        if (std := options.pop("ema_std")) is not None:
            from sit_atconv.checkpoints.post_hoc import averaged_folder

            options["ckpt"] = str(averaged_folder(Path(options["ckpt"]), std))
        source = {name: options[name] for name in ("ema", "model", "vae")}
        locate_weights(options["ckpt"], **source)  # finds errors before the slow import of torch
        from sit_atconv.generation.draw import generate_samples
        from sit_atconv.generation.drawing import GenerateOptions
        from sit_atconv.generation.job import prepare
        from sit_atconv.sampling import Sampler

        sampler = {name: options.pop(name) for name in Sampler.__dataclass_fields__}
        job = prepare(GenerateOptions(sampler=Sampler(**sampler), **options))
        if is_main_process():
            print(*(f"note: {note}\n" for note in job.notes), sep="", end="", file=sys.stderr)
    with user_errors(everywhere=True):  # a disk may be full for one process only
        manifest = generate_samples(job)
    if is_main_process():
        folder, speed = job.folder, ""
        if "evaluations" in manifest:  # unknown if a killed command had drawn all samples
            speed = f", NFE {manifest['evaluations']:.0f}, {manifest['images_per_second']:.3g} images/s"
        print(
            f"{folder.folder}: {len(manifest['labels'])} samples{speed}\npicture: {folder.grid}\n"
            f"all images: {folder.npz if options['npz'] else folder.images}\nsettings: {folder.manifest}"
        )


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("generate"),
        usage="%(prog)s --ckpt RUN [--cfg 4.0] [--classes 3 7] [--num-samples N] [options]",
        description="Sample images from a trained model. Writes PNGs, one npz, a labelled picture and a manifest.",
    )
    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--ckpt",
        required=True,
        help="weights to sample from: a run, a checkpoint, an exported folder, a diffusers pipeline, "
        "a folder of SiT.save_pretrained, a hub id of these, or a published .pt or .safetensors",
    )
    weights.add_argument("--model", metavar="PRESET", help="preset of a published file that does not name its preset")
    weights.add_argument(
        "--vae",
        metavar="PATH",
        help="new folder or hub id of the VAE, if it has moved; it must be the VAE of the training. "
        "For a published file: the VAE of its latents",
    )
    average = weights.add_mutually_exclusive_group()
    average.add_argument(
        "--ema",
        type=finite,
        default=True,
        metavar="DECAY",
        help="use the EMA weights of this decay, if there are several (default: the first)",
    )
    average.add_argument(
        "--ema-std",
        type=positive,
        metavar="STD",
        help="make and use the power function average of this relative width, from the snapshots of a run "
        "(train.snapshot_every); it is kept in RUN/averages",
    )
    average.add_argument("--no-ema", dest="ema", action="store_false", help="use the weights without EMA")

    wanted = parser.add_argument_group("what to draw")
    wanted.add_argument("--num-samples", type=at_least(1), default=100, help="number of images")
    wanted.add_argument(
        "--classes",
        nargs="+",
        default=(),
        metavar="CLASS",
        help="draw these classes in turn, instead of --labels; each is a label (3, label:3) or a class "
        "name (tench, name:3)",
    )
    wanted.add_argument(
        "--labels",
        default="random",
        metavar="random|balanced|FILE",
        help="draw labels uniformly, draw every class equally often, or read the class of each sample "
        "from a text file (a class per line, as for --classes); balanced labels give a lower FID, so "
        "report this option",
    )
    wanted.add_argument("--seed", type=at_least(0), default=0, help="random seed; sample i is a function of (seed, i)")
    wanted.add_argument(
        "--size",
        type=at_least(1),
        nargs="+",
        default=(),
        metavar="PIXELS",
        help="side, or height and width, of the images (default: the training size)",
    )

    guidance = parser.add_argument_group("guidance")
    guidance.add_argument(
        "--guidance",
        default="cfg",
        help=f"kind of guidance: {', '.join(GUIDANCE)}, or your own as MODULE.NAME (docs/extending.md)",
    )
    guidance.add_argument(
        "--cfg",
        type=finite,
        default=None,
        help="guidance scale in v_null + cfg * (v_cond - v_null); 1 is off, 0 ignores the labels "
        "(default: 4; 1 without a trained null label, for jumps, and for weights that have learned guidance)",
    )
    guidance.add_argument(
        "--interval",
        dest="cfg_interval",
        type=finite,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LO", "HI"),
        help="guide only where LO <= t < HI (t = 0 is noise, 1 is data); other steps cost half",
    )
    guidance.add_argument(
        "--cfg-schedule",
        choices=SCHEDULES,
        default="constant",
        help="keep the scale constant, or let it rise with t from 1, with the average cfg",
    )
    guidance.add_argument(
        "--cfg-channels",
        type=at_least(1),
        default=None,
        metavar="N",
        help="guide only the first N latent channels; DiT and SiT published 3 (default: all)",
    )
    guidance.add_argument(
        "--weak", metavar="CKPT", help="autoguidance: a weaker model of the same kind that replaces the null label"
    )

    solver = parser.add_argument_group("solver")
    solvers = [f"{name} ({solver.summary})" for name, solver in SOLVERS.items()]
    adaptive = " or ".join(name for name, solver in SOLVERS.items() if solver.is_adaptive)
    solver.add_argument(
        "--solver",
        default=None,
        help=f"solver: {', '.join(solvers)}, or your own as MODULE.NAME (docs/extending.md). Default: "
        f"{default_solver('linear')} for the linear interpolant, {default_solver('gvp')} for others, "
        f"{default_solver('linear', two_times=True)} for MeanFlow models",
    )
    solver.add_argument(
        "--steps",
        type=at_least(1),
        default=None,
        help=f"number of solver steps (for an ODE, SiT counts points: its 250 are 249 here); {adaptive} ignores it "
        "(default: 25; 1 for jump, 2 for jump-renoise)",
    )
    solver.add_argument(
        "--shift",
        type=positive,
        default=1.0,
        help="shift of the time grid: 1 is uniform, above 1 puts more steps near noise",
    )
    solver.add_argument(
        "--times",
        type=finite,
        nargs="+",
        default=None,
        metavar="T",
        help="explicit time grid from 0 to 1, instead of --steps and --shift",
    )
    solver.add_argument(
        "--diffusion-form",
        default="sigma",
        choices=("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"),
        help="noise that an SDE solver adds, as a function of t",
    )
    solver.add_argument("--diffusion-norm", type=positive, default=1.0, help="factor of this noise")
    solver.add_argument(
        "--last-step",
        choices=LAST_STEPS,
        default="mean",
        help="kind of the last step of an SDE solver; this step adds no noise",
    )
    solver.add_argument("--last-step-size", type=positive, default=0.04, help="length of the last step in time")

    how = parser.add_argument_group("computation and output")
    how.add_argument("--dtype", choices=DTYPES, default="fp32", help="number format of the model's arithmetic")
    how.add_argument(
        "--batch-size",
        type=at_least(1),
        default=64,
        help=f"images per batch and process; changes images by at most one grey level, except with {adaptive}",
    )
    how.add_argument(
        "--compile",
        action="store_true",
        help="compile the model with torch.compile: starts a minute or more later, then runs faster",
    )
    how.add_argument("--latents", action="store_true", help="write the latents too")
    how.add_argument(
        "--no-npz",
        dest="npz",
        action="store_false",
        help="do not write samples.npz, which is as large as all pixels (eval/fid.py reads the PNGs too)",
    )
    how.add_argument("--out", default=None, help="folder of the samples (default: RUN/samples/SETTINGS)")
    add_import_option(how)
    return parser


if __name__ == "__main__":
    run_command(main)
