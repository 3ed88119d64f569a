"""What every other package needs; independent of diffusion.

Contains the two-part errors, the events that the engine reports, files that appear whole or not at all,
random numbers as pure functions, devices and precisions, the processes of a run, its throughput, prompts as text, and
contact sheets and text tables.
"""
