"""Command `python eval/speed.py`; its code and usage are in sit_atconv/speed/speed.py."""

from sit_atconv.runtime.commands import run_command
from sit_atconv.speed.speed import main

if __name__ == "__main__":
    run_command(main)
