"""The speed comparison, run by `sit_atconv/speed/benchmark.py`."""
