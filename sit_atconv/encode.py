"""Encodes a folder of images into latents that training reads, once and for all.

    accelerate launch sit_atconv/encode.py --images IMAGENET/train --out LATENTS [--vae ID_OR_FOLDER] [--image-size 256]
    python sit_atconv/encode.py --verify LATENTS

Labels are those of the images' dataset.json, or of their subfolders, or one for all. Stored are the posterior moments
of each image and of its mirror image. Stopped at any moment, the same command resumes, with any number of processes,
and ends with the same bytes. --extend adds the images that came later.
"""

from pathlib import Path

from sit_atconv.data import DEFAULT_VAE, MAX_MEGAPIXELS
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
        if not Path(options["images"]).is_dir():  # found before torch is imported
            raise ValueError(f"{options['images']} is not a folder of images")
        from sit_atconv.data.encoding import EncodeOptions, encode_images
        from sit_atconv.data.latent_summary import describe_latents
        from sit_atconv.data.latents import CachedLatents
        from sit_atconv.models.presets import PATCHES
        from sit_atconv.runtime.files import gigabytes
        from sit_atconv.training.first_command import training_command

        try:
            index, rate = encode_images(EncodeOptions(**options), PATCHES)
        except KeyboardInterrupt:
            fail("interrupted: the same command goes on from here", code=130)
    if is_main_process():
        out = options["out"]
        left_out = f", {len(index.skipped)} left out" if index.skipped else ""
        speed = f", {rate:.1f} images/s" if rate else ""
        print(f"{out} is complete: {index.num_images} images of {len(index.class_names)} classes in "
              f"{len(index.shards)} shards, {gigabytes(index.num_bytes)}{left_out}{speed}")
        print(*describe_latents(index), sep="\n")
        if options["extend"] and rate:
            print("a run that began with the former images refuses these as other data: start another run from it with "
                  "--init-from")
        print(f"picture: {out / 'preview.png'}\ncounts and settings: {out / 'index.json'}\n"
              f"train: {training_command(index, CachedLatents(out).labels, out)}")


def check(latents: Path) -> None:
    """Reads every byte and says what is wrong; leaves with exit code 1 where anything is."""
    with user_errors():
        from tqdm import tqdm

        from sit_atconv.data.latent_folder import read_index, unfinished_shards, verify
        from sit_atconv.runtime.files import gigabytes

        index = read_index(latents)
        with tqdm(total=index.num_bytes, unit="B", unit_scale=True, desc="verifying") as progress:
            faults = verify(latents, progress.update)
    if faults:
        remedy = "delete the shards named and run the same sit_atconv/encode.py again"
        damaged = any("shard-" in fault for fault in faults)
        fail("\n".join([f"{latents} is damaged; {remedy}" if damaged else f"{latents} has faults", *faults]))
    print(f"{latents} is whole: {index.num_images} images of {len(index.class_names)} classes in "
          f"{len(index.shards)} shards, {gigabytes(index.num_bytes)}, as they were written")
    if begun := unfinished_shards(latents, index):
        print(f"{len(begun)} shards more are of an extension that was stopped: its command completes it")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("encode"),
        usage="%(prog)s --images DIR --out LATENTS [--vae ID_OR_FOLDER] "
        "[--image-size 256] [options]",
        description="Encodes a folder of images into latents that training reads with --data.latents. The same "
        "command again goes on where it was stopped.",
    )
    parser.add_argument("--images", metavar="DIR",
                        help="images in one subfolder for each class, or with a dataset.json, or of one class")
    parser.add_argument("--out", type=Path, metavar="LATENTS", help="folder of the latents")
    parser.add_argument("--vae", default=DEFAULT_VAE, metavar="ID_OR_FOLDER",
                        help="a diffusers AutoencoderKL: hub id, or folder of a downloaded one; or a Codec of yours, "
                        "my_module.MyCodec")
    add_import_option(parser)
    parser.add_argument("--image-size", type=at_least(1), default=256, metavar="PX",
                        help="side of the images after ADM's centre crop")
    parser.add_argument("--verify", type=Path, metavar="LATENTS",
                        help="encode nothing, but check checksums, counts and values of this folder")
    parser.add_argument("--skip-unreadable", action="store_true",
                        help="leave images that cannot be read out, and record them in the index")
    parser.add_argument("--extend", action="store_true",
                        help="add the images that came to DIR since: existing ones keep their shards and labels")
    parser.add_argument("--keep-empty-classes", action="store_true",
                        help="accept classes without images; no sample is drawn of them unless asked for")
    parser.add_argument("--max-megapixels", type=positive, default=MAX_MEGAPIXELS, metavar="MP",
                        help="refuse image files of more megapixels, which may not fit into memory")
    parser.add_argument("--no-mirror", dest="mirror", action="store_false",
                        help="do not encode mirror images too: half the time and room")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16",
                        help="in which the moments are stored")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="images that are encoded together")
    parser.add_argument("--shard-mib", type=positive, default=128, metavar="MIB",
                        help="size of a shard, at most, but never less than a batch")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="tf32",
                        help="of the VAE's arithmetic; tf32 is fp32 but for the convolutions of a GPU")
    parser.add_argument("--slicing", action="store_true", help="encode one image after another, to save memory")
    parser.add_argument("--tiling", action="store_true",
                        help="encode images larger than the VAE was made for in blended tiles: approximate")
    parser.add_argument("--num-workers", type=at_least(0), default=None,
                        help="processes that read images, for each that encodes (default: its cores, at most 8)")
    parser.add_argument("--cpu-threads", type=at_least(1), default=None,
                        help="threads of each process on a CPU (default: its share of the cores)")
    return parser


if __name__ == "__main__":
    run_command(main)
