"""Command that encodes a folder of images into cached latents for training.

    accelerate launch sit_atconv/encode.py --images IMAGENET/train --out LATENTS [--vae ID_OR_FOLDER] [--image-size 256]
    python sit_atconv/encode.py --verify LATENTS

Labels come from a dataset.json or from subfolders; without both, all images have one label. Stored are the posterior
moments of each image and of the horizontally flipped image. If the command is stopped at any moment, the same command
resumes, with any number of processes, and ends with the same bytes. --extend adds images that are new in the folder.
"""

from pathlib import Path

from sit_atconv.data import DEFAULT_VAE, IMAGES_AS, MAX_MEGAPIXELS, is_named, may_exist
from sit_atconv.runtime.commands import (
    ArgumentParser,
    add_import_option,
    at_least,
    fail,
    is_main_process,
    positive,
    run_command,
    user_errors,
)
from sit_atconv.runtime.dtypes import DTYPES
from sit_atconv.runtime.installation import command


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    if latents := options.pop("verify"):
        if is_main_process():
            check(latents)
        return
    for name in ("images", "out"):
        if options[name] is None:
            parser.error(f"give --{name}")
    with user_errors():
        if not (is_named(options["images"]) or may_exist(options["images"])):  # before the slow import of torch
            raise ValueError(f"{options['images']} does not exist: give {IMAGES_AS}")
        from sit_atconv.data.encoding import EncodeOptions, encode_images
        from sit_atconv.data.latent_summary import describe_latents
        from sit_atconv.data.latents import CachedLatents
        from sit_atconv.models.presets import PATCHES
        from sit_atconv.runtime.files import gigabytes
        from sit_atconv.training.first_command import training_command

        try:
            index, rate = encode_images(EncodeOptions(**options), PATCHES)
        except KeyboardInterrupt:
            fail("interrupted: run the same command again to resume", code=130)
    if is_main_process():
        out = options["out"]
        left_out = f", {len(index.skipped)} left out" if index.skipped else ""
        speed = f", {rate:.1f} images/s" if rate else ""
        print(
            f"{out} is complete: {index.num_images} images of {len(index.class_names)} classes in "
            f"{len(index.shards)} shards, {gigabytes(index.num_bytes)}{left_out}{speed}"
        )
        print(*describe_latents(index), sep="\n")
        if options["extend"] and rate:
            print(
                "a run that was started with the former images refuses these as other data: start a new run from it "
                "with --init-from"
            )
        print(
            f"picture: {out / 'preview.png'}\ncounts and settings: {out / 'index.json'}\n"
            f"train: {training_command(index, CachedLatents(out).labels, out)}"
        )


def check(latents: Path) -> None:
    """Verifies a folder by reading every byte, prints its faults, and exits with code 1 if there are any."""
    with user_errors():
        from tqdm import tqdm

        from sit_atconv.data.latent_folder import ENCODE_AGAIN, read_index, unfinished_shards, verify
        from sit_atconv.runtime.files import gigabytes

        index = read_index(latents)
        with tqdm(total=index.num_bytes, unit="B", unit_scale=True, desc="verifying") as progress:
            faults = verify(latents, progress.update)
    if faults:
        damaged = any("shard-" in fault for fault in faults)
        first = f"is damaged; delete the shards named below and {ENCODE_AGAIN}" if damaged else "has faults"
        fail("\n".join([f"{latents} {first}", *faults]))
    print(
        f"{latents} is intact: {index.num_images} images of {len(index.class_names)} classes in "
        f"{len(index.shards)} shards, {gigabytes(index.num_bytes)}, with correct checksums"
    )
    if begun := unfinished_shards(latents, index):
        print(f"{len(begun)} more shards belong to an extension that was stopped: run its command again to complete it")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("encode"),
        usage="%(prog)s --images PLACE --out LATENTS [--vae ID_OR_FOLDER] [--image-size 256] [options]",
        description="Encodes a folder of images into latents that training reads with --data.latents. If the command "
        "was stopped, run it again to resume.",
    )
    parser.add_argument(
        "--images",
        metavar="PLACE",
        help="a folder, .zip or .tar of images: one subfolder for each class, or a dataset.json, or all of one class; "
        "wids:PLACE, the tar archives of a WebDataset; hf:NAME[:SPLIT], a Hugging Face data set; or idx:FOLDER",
    )
    parser.add_argument("--out", type=Path, metavar="LATENTS", help="folder to write the latents to")
    parser.add_argument(
        "--vae",
        default=DEFAULT_VAE,
        metavar="ID_OR_FOLDER",
        help="hub id or folder of a diffusers AutoencoderKL or AutoencoderDC, or your own Codec, my_module.MyCodec",
    )
    add_import_option(parser)
    parser.add_argument(
        "--image-size",
        type=at_least(1),
        default=256,
        metavar="PX",
        help="side of the images in pixels, after ADM's centre crop",
    )
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="LATENTS",
        help="check the checksums, counts and values of a folder of latents instead of encoding",
    )
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out images that cannot be read, and record them in the index",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="add the new images of PLACE; existing images keep their shards and labels",
    )
    parser.add_argument(
        "--keep-empty-classes",
        action="store_true",
        help="accept classes without images; they are sampled only on request",
    )
    parser.add_argument(
        "--max-megapixels",
        type=positive,
        default=MAX_MEGAPIXELS,
        metavar="MP",
        help="refuse image files with more megapixels, which may not fit into memory",
    )
    parser.add_argument(
        "--no-mirror",
        dest="mirror",
        action="store_false",
        help="do not encode horizontally flipped images: half the time and disk space",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="number format of the stored moments",
    )
    parser.add_argument(
        "--pixels",
        choices=("none", "uint8", "jpeg"),
        default="none",
        help="also store the crops, for training with an encoder: uint8 takes 3 bytes a pixel, jpeg (quality 95) about "
        "0.5 to 1; without them training can read the images again (--data.pixels)",
    )
    parser.add_argument(
        "--features",
        metavar="ENCODER",
        help="also store the tokens of this image encoder in float16, for training with --auxiliary Alignment: "
        "dinov2-vit-b or another name that --auxiliary.encoder takes",
    )
    parser.add_argument(
        "--features-weights", metavar="FILE", help="weights of that encoder (default: timm's, or the shipped ones)"
    )
    parser.add_argument(
        "--features-grid",
        type=at_least(1),
        metavar="N",
        help="side of the grid of tokens (default: half of the latents' side, the tokens of a model with patch size 2)",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="number of images that are encoded together")
    parser.add_argument(
        "--shard-mib",
        type=positive,
        default=128,
        metavar="MIB",
        help="maximum size of a shard in MiB, but at least one batch",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(DTYPES),
        default="tf32",
        help="number format of the VAE's arithmetic; tf32 is fp32 with TF32 convolutions on a GPU",
    )
    parser.add_argument("--slicing", action="store_true", help="encode one image after another to save memory")
    parser.add_argument(
        "--tiling",
        action="store_true",
        help="encode images larger than the VAE was made for in tiles and blend them: approximate",
    )
    parser.add_argument(
        "--num-workers",
        type=at_least(0),
        default=None,
        help="number of processes that read images, for each process that encodes (default: its "
        "number of cores, at most 8)",
    )
    parser.add_argument(
        "--cpu-threads",
        type=at_least(1),
        default=None,
        help="number of threads of each process on a CPU (default: its share of the cores)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
