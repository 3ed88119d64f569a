"""Diffusion models: families, weights, objective and image generation.

`open.open_base` opens a checkpoint file, a folder of diffusers or a host's tensors without a copy and gives
`BaseWeights`, from which the family builds a `DiffusionModel`. A new family is one file in `families/`; the packages
that build on this one ask the family for everything that is true of its models.
"""
