"""Evaluation by torch-fidelity: image sets, feature extractors, and metrics of features."""
