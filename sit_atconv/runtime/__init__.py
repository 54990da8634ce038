"""How a command runs, whatever it does: options and errors, processes, devices, files, plots."""
