"""Times ATConv and attention side by side.

    python eval/speed.py

The command itself is `sit_atconv/speed/speed.py`.
"""

from sit_atconv.runtime.commands import run_command
from sit_atconv.speed.speed import main

if __name__ == "__main__":
    run_command(main)
