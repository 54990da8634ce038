"""A page in the browser that draws images with a trained model, or with two at the same noise.

    python -m sit_atconv.demo --ckpt RUN [--ckpt RUN2]

It needs Gradio: pip install 'sit-atconv[demo]'. The page works without a network, and only this machine can open it
unless --host says otherwise.
"""

import argparse
import socket
import sys
import threading

from sit_atconv.runtime.commands import ArgumentParser, at_least, finite, leave_at_once, run_command, user_errors
from sit_atconv.runtime.dtypes import DTYPES
from sit_atconv.runtime.installation import command
from sit_atconv.runtime.tables import import_modules


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    with user_errors():
        check_address(options.host, options.port)  # before models are loaded
        page = open_page(options)
        from sit_atconv.generation.live_page import launch

        address = launch(page, options.host, options.port, options.max_waiting)
    print(f"page: {address}\nCtrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        leave_at_once("interrupted")  # threads may be in the middle of a drawing


def check_address(host: str, port: int | None) -> None:
    """Raises ValueError if this machine cannot serve at the address."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"the page cannot be served at {host}, port {port or 'any'} ({reason}): give another --host or --port"
        ) from error


def open_page(options: argparse.Namespace):
    """Loads the models and returns the page, a `gradio.Blocks`.

    Raises:
        ValueError: they cannot be loaded, or do not fit each other.
    """
    from sit_atconv.checkpoints.weights import locate_weights

    source = {name: getattr(options, name) for name in ("ema", "model", "vae")}
    if len(options.ckpt) > 2:
        raise ValueError(f"--ckpt was given {len(options.ckpt)} times: give one or two")
    for ckpt in options.ckpt:
        locate_weights(ckpt, **source)  # finds errors before slow imports
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("this page needs Gradio: pip install 'sit-atconv[demo]'") from error
    from sit_atconv.generation.live import LiveModel
    from sit_atconv.generation.live_page import Limits, make_page
    from sit_atconv.runtime.devices import open_device

    device = open_device(options.device)
    shared = {**source, "dtype": options.dtype, "modules": options.modules}
    models = [LiveModel(ckpt, device, **shared) for ckpt in options.ckpt]
    for note in dict.fromkeys(note for model in models for note in model.weights.notes):
        print(f"note: {note}", file=sys.stderr)
    return make_page(models, Limits(options.max_images, options.max_side, options.max_steps))


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("demo"),
        usage="%(prog)s --ckpt RUN [--ckpt RUN2] [options]",
        description="Serves a web page that draws images: class, guidance, solver, steps and seed are on the "
        "page, with the equivalent call of sample/generate.py. Two checkpoints draw side by side from the same noise.",
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        action="append",
        help="weights to draw with, as for sample/generate.py; give the option twice to compare two",
    )
    parser.add_argument("--model", metavar="PRESET", help="preset of a published file that does not name its preset")
    parser.add_argument("--vae", metavar="PATH", help="new folder or hub id of the VAE, if it has moved")
    average = parser.add_mutually_exclusive_group()
    average.add_argument(
        "--ema", type=finite, default=True, metavar="DECAY", help="EMA weights of this decay (default: the first)"
    )
    average.add_argument("--no-ema", dest="ema", action="store_false", help="use the weights without EMA")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="number format of the model's arithmetic")
    parser.add_argument("--device", default="auto", help="device: auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=at_least(1), help="port to serve (default: the first free one from 7860)")
    parser.add_argument("--max-images", type=at_least(1), default=16, help="maximum number of images of a drawing")
    parser.add_argument("--max-side", type=at_least(1), default=1024, help="maximum height and width in pixels")
    parser.add_argument("--max-steps", type=at_least(1), default=250, help="maximum number of solver steps")
    parser.add_argument(
        "--max-waiting", type=at_least(1), default=20, help="maximum number of drawings that wait in the queue"
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        type=_imported,
        default=[],
        metavar="MODULE",
        help="import your module, which registers parts that the weights need; may be repeated",
    )
    return parser


def _imported(name: str) -> str:
    try:
        import_modules([name])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


if __name__ == "__main__":
    run_command(main)
