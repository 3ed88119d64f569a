"""A run on disk: its folder, checkpoints and metrics; and a list of all runs."""
