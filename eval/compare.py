"""Command `python eval/compare.py`; its code and usage are in sit_atconv/evaluation/compare.py."""

from sit_atconv.evaluation.compare import main
from sit_atconv.runtime.commands import run_command

if __name__ == "__main__":
    run_command(main)
