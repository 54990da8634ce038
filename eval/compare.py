"""Compares evaluations in a table and in charts.

    python eval/compare.py RUN RUN ...

The command itself is `sit_atconv/evaluation/compare.py`.
"""

from sit_atconv.evaluation.compare import main
from sit_atconv.runtime.commands import run_command

if __name__ == "__main__":
    run_command(main)
