"""What every other package needs and what knows nothing of diffusion.

Gives the errors with their two parts, the events that the engine reports, files that appear whole or not at all,
random draws as pure functions, devices and precisions, the processes of a run, its throughput, prompts as text, and
contact sheets and text tables.
"""
