"""Measures how many evaluations of the model each solver needs.

    python eval/solvers.py --ckpt RUN --cfg 2 --out FOLDER

The command itself is `sit_atconv/studies/solvers.py`.
"""

from sit_atconv.runtime.commands import run_command
from sit_atconv.studies.solvers import main

if __name__ == "__main__":
    run_command(main)
