"""Evaluation on torch-fidelity: image sets, feature extractors, and the metrics computed from features."""
