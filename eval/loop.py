"""What the training loop costs beside what it cannot do without: forward, backward, clipping, AdamW, averages.

    python eval/loop.py --steps 12 [--train.batch_size 32 --preset SiT-ATConv-XL/2 ... any option of train.py]

Trains for real, in a temporary folder, with a clock around each of these parts; waits for the device at each, so that
the shares are true on a GPU too. What remains is drawing noise, data, logging and the loop itself. Prints JSON.
"""

import json
from pathlib import Path

from sit_atconv.commands import ArgumentParser, at_least, run_command

TRAIN = Path(__file__).parents[1] / "sit_atconv" / "train.py"


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        usage="python eval/loop.py [--steps N] [options of sit_atconv/train.py]",
        description="How much of a training step is forward, backward, clipping, AdamW and averages, and how much the "
        "loop adds. All other options are those of sit_atconv/train.py.",
    )
    parser.add_argument("--steps", type=at_least(1), default=20, help="steps to measure")
    options, of_training = parser.parse_known_args(argv)
    from sit_atconv.training.loop_cost import measure_loop

    print(json.dumps(measure_loop(TRAIN, options.steps, of_training), indent=1))


if __name__ == "__main__":
    run_command(main)
