"""Helpers shared by all commands: options and errors, processes, devices, files, plots."""
