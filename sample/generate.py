"""Samples images from a trained model.

    python sample/generate.py --ckpt RUN --cfg 4.0

Several processes: `accelerate launch sample/generate.py ...` or `torchrun --nproc_per_node 2 sample/generate.py ...`;
the images are the same. The same command again completes what a kill left unfinished.
"""


from sit_atconv.commands import ArgumentParser, at_least, finite, is_main_process, user_errors


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    with user_errors():
        from sit_atconv.checkpointing.weights import locate_weights

        locate_weights(options["ckpt"], options["ema"])  # answers before torch is imported
        from sit_atconv.generation import GenerateOptions, generate_samples

        folder, manifest = generate_samples(GenerateOptions(**options))
    if is_main_process():
        print(f"{folder.folder}: {len(manifest['labels'])} samples, {manifest['images_per_second']:.1f} images/s\n"
              f"picture: {folder.grid}\nall images: {folder.npz}\nsettings: {folder.manifest}")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        usage="python sample/generate.py --ckpt RUN [--cfg 4.0] [--classes 3 7] [--num-samples N] [options]",
        description="Samples images from a trained model: PNGs, one npz, a labelled picture and a manifest.",
    )
    parser.add_argument("--ckpt", required=True, help="a run, a checkpoint, an exported folder, or a hub id")
    parser.add_argument("--cfg", type=finite, default=4.0,
                        help="guidance scale: v_null + cfg * (v_cond - v_null); 1 is off, 0 ignores the labels")
    parser.add_argument("--cfg-channels", type=at_least(1), default=None, metavar="N",
                        help="guide the first N channels only; DiT and SiT published 3")
    parser.add_argument("--num-samples", type=at_least(1), default=100, help="how many images")
    parser.add_argument("--classes", type=int, nargs="+", default=(), metavar="LABEL",
                        help="these labels in turn, instead of --labels")
    parser.add_argument("--labels", choices=("random", "balanced"), default="random",
                        help="uniform, or every class equally often; FID is lower with balanced labels, say which")
    parser.add_argument("--seed", type=at_least(0), default=0, help="sample i is a function of (seed, i)")
    parser.add_argument("--solver", choices=("euler", "heun", "dopri5"), default="euler",
                        help="heun evaluates the model twice a step; dopri5 is adaptive, chooses its steps for the "
                        "batch and ignores --steps")
    parser.add_argument("--steps", type=at_least(1), default=50, help="uniform steps in time")
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="the weights as trained, not their average")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the model's arithmetic")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images at a time; does not change them")
    parser.add_argument("--compile", action="store_true",
                        help="compile the model with torch.compile: a minute or more at the start, faster afterwards")
    parser.add_argument("--out", default=None, help="folder of the samples (default: RUN/samples/SETTINGS)")
    return parser


if __name__ == "__main__":
    main()
