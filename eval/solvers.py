"""Command `python eval/solvers.py`; its code and usage are in sit_atconv/studies/solvers.py."""

from sit_atconv.runtime.commands import run_command
from sit_atconv.studies.solvers import main

if __name__ == "__main__":
    run_command(main)
