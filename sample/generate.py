"""Samples images from a trained model.

    python sample/generate.py --ckpt RUN --cfg 4.0

The command itself is `sit_atconv/generation/generate.py`.
"""

from sit_atconv.generation.generate import main
from sit_atconv.runtime.commands import run_command

if __name__ == "__main__":
    run_command(main)
