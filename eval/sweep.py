"""Command `python eval/sweep.py`; its code and usage are in sit_atconv/studies/sweep.py."""

from sit_atconv.runtime.commands import run_command
from sit_atconv.studies.sweep import main

if __name__ == "__main__":
    run_command(main)
