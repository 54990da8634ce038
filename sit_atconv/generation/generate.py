"""Samples images from a trained model.

    python sample/generate.py --ckpt RUN --cfg 4.0

Several processes: `accelerate launch sample/generate.py ...` or `torchrun --nproc_per_node 2 sample/generate.py ...`;
the images are the same. The same command again completes what a kill left unfinished.
"""

import sys

from sit_atconv.runtime.commands import (
    ArgumentParser,
    at_least,
    finite,
    is_main_process,
    positive,
    run_command,
    user_errors,
)
from sit_atconv.runtime.installation import command


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    with user_errors():
        from sit_atconv.checkpoints.weights import locate_weights

        source = {name: options[name] for name in ("ema", "model", "vae")}
        locate_weights(options["ckpt"], **source)  # answers before torch is imported
        from sit_atconv.generation.draw import generate_samples
        from sit_atconv.generation.job import GenerateOptions, prepare
        from sit_atconv.sampling import Sampler

        sampler = {name: options.pop(name) for name in Sampler.__dataclass_fields__}
        job = prepare(GenerateOptions(sampler=Sampler(**sampler), **options))
        if is_main_process():
            print(*(f"note: {note}\n" for note in job.notes), sep="", end="", file=sys.stderr)
    with user_errors(everywhere=True):  # a disk may be full for one process alone
        manifest = generate_samples(job)
    if is_main_process():
        folder, speed = job.folder, ""
        if "evaluations" in manifest:  # unknown where a killed command had drawn all of them
            speed = f", {manifest['evaluations']:.0f} evaluations each, {manifest['images_per_second']:.3g} images/s"
        print(f"{folder.folder}: {len(manifest['labels'])} samples{speed}\npicture: {folder.grid}\n"
              f"all images: {folder.npz if options['npz'] else folder.images}\nsettings: {folder.manifest}")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("generate"),
        usage="%(prog)s --ckpt RUN [--cfg 4.0] [--classes 3 7] [--num-samples N] [options]",
        description="Samples images from a trained model: PNGs, one npz, a labelled picture and a manifest.",
    )
    weights = parser.add_argument_group("weights")
    weights.add_argument("--ckpt", required=True,
                         help="a run, a checkpoint, an exported folder, a diffusers pipeline, a folder of "
                         "SiT.save_pretrained, a hub id of any of these, or a published .pt or .safetensors")
    weights.add_argument("--model", metavar="PRESET", help="preset of a published file that does not name its own")
    weights.add_argument("--vae", metavar="PATH",
                         help="folder or hub id of the VAE, where it has moved; it must be the one trained with. For a "
                         "published file, the VAE of its latents")
    average = weights.add_mutually_exclusive_group()
    average.add_argument("--ema", type=finite, default=True, metavar="DECAY",
                         help="of several averages this one (default: the first)")
    average.add_argument("--no-ema", dest="ema", action="store_false", help="the weights as trained, not their average")

    wanted = parser.add_argument_group("what to draw")
    wanted.add_argument("--num-samples", type=at_least(1), default=100, help="how many images")
    wanted.add_argument("--classes", nargs="+", default=(), metavar="CLASS",
                        help="classes to draw in turn, instead of --labels: a label (3, label:3) or a class name "
                        "(tench, name:3)")
    wanted.add_argument("--labels", default="random", metavar="random|balanced|FILE",
                        help="draw labels uniformly, draw every class equally often, or read a class for each sample "
                        "from a text file, written as for --classes; FID is lower with balanced labels: report which")
    wanted.add_argument("--seed", type=at_least(0), default=0, help="sample i is a function of (seed, i)")
    wanted.add_argument("--size", type=at_least(1), nargs="+", default=(), metavar="PIXELS",
                        help="side, or height and width (default: as trained)")

    guidance = parser.add_argument_group("guidance")
    guidance.add_argument("--cfg", type=finite, default=None,
                          help="guidance scale: v_null + cfg * (v_cond - v_null); 1 is off, 0 ignores the labels "
                          "(default: 4, or 1 without a trained null label)")
    guidance.add_argument("--interval", dest="cfg_interval", type=finite, nargs=2, default=(0.0, 1.0),
                          metavar=("LO", "HI"),
                          help="guide where LO <= t < HI (t = 0 is noise, 1 data); elsewhere half the work is saved")
    guidance.add_argument("--cfg-schedule", choices=("constant", "linear", "cosine"), default="constant",
                          help="a scale that rises with t, from 1, and is cfg on average")
    guidance.add_argument("--cfg-channels", type=at_least(1), default=None, metavar="N",
                          help="guide the first N channels only; DiT and SiT published 3")
    guidance.add_argument("--weak", metavar="CKPT",
                          help="autoguidance: a weaker model of the same kind in the place of the null label")

    solver = parser.add_argument_group("solver")
    solver.add_argument("--solver", default=None,
                        choices=("euler", "heun", "dopri5", "unipc", "dpm++", "sde-euler", "sde-heun"),
                        help="default: unipc on the linear path, which unipc and dpm++ need, and heun on others; both "
                        "heun evaluate the model twice a step; dopri5 is adaptive, chooses its steps for the batch and "
                        "ignores --steps; the sde add noise on the way")
    solver.add_argument("--steps", type=at_least(1), default=25,
                        help="intervals of the grid (SiT counts points: its 250 are 249 here, but for an SDE)")
    solver.add_argument("--shift", type=positive, default=1.0, help="above 1, more of them near noise; 1 is uniform")
    solver.add_argument("--times", type=finite, nargs="+", default=None, metavar="T",
                        help="all times from 0 to 1, instead of --steps and --shift")
    solver.add_argument("--diffusion-form", default="sigma",
                        choices=("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"),
                        help="how much noise an sde solver adds, as a function of t")
    solver.add_argument("--diffusion-norm", type=positive, default=1.0, help="its factor")
    solver.add_argument("--last-step", choices=("none", "mean", "tweedie", "euler"), default="mean",
                        help="an SDE's last step, without noise")
    solver.add_argument("--last-step-size", type=positive, default=0.04, help="how long that is in time")

    how = parser.add_argument_group("how")
    how.add_argument("--dtype", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32",
                     help="of the model's arithmetic")
    how.add_argument("--batch-size", type=at_least(1), default=64,
                     help="images at a time; changes none, except with dopri5")
    how.add_argument("--compile", action="store_true",
                     help="compile the model with torch.compile: a minute or more at the start, faster afterwards")
    how.add_argument("--latents", action="store_true", help="write latents too, before they are decoded")
    how.add_argument("--no-npz", dest="npz", action="store_false",
                     help="leave samples.npz out, which is as large as all pixels (eval/fid.py reads the PNGs too)")
    how.add_argument("--out", default=None, help="folder of the samples (default: RUN/samples/SETTINGS)")
    return parser


if __name__ == "__main__":
    run_command(main)
