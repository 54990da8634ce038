"""Command `python eval/report.py`; its code and usage are in sit_atconv/studies/report_runs.py."""

from sit_atconv.runtime.commands import run_command
from sit_atconv.studies.report_runs import main

if __name__ == "__main__":
    run_command(main)
