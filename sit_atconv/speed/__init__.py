"""The parts of the speed comparison that `sit_atconv/speed/benchmark.py` runs."""
