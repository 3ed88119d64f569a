"""A run on disk: its folder and checkpoints, its metrics, and all runs for whoever lists them."""
