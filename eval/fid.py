"""Measures FID, Inception Score, precision, recall and KID of samples against a reference.

    python eval/fid.py --samples SAMPLES --reference REFERENCE

The command itself is `sit_atconv/evaluation/fid.py`.
"""

from sit_atconv.evaluation.fid import main
from sit_atconv.runtime.commands import run_command

if __name__ == "__main__":
    run_command(main)
