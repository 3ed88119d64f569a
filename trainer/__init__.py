"""The engine: teaches a diffusion model a new subject from a handful of pictures.

It knows no host and no user interface. Start reading at `dreambooth.py`, the recipe.
"""
