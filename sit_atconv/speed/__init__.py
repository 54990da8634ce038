"""The parts of the speed comparison that `sit_atconv/benchmark.py` runs."""
