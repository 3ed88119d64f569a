"""Diffusion models: families, weights, objective and image generation.

`open.open_base` opens a checkpoint file, a diffusers folder or a host's tensors without a copy and returns
`BaseWeights`, from which the family builds a `DiffusionModel`. A new family is one file in `families/`; other packages
get everything that is specific to its models from the family.
"""
