"""A subject's pictures, from files to the samples of a step.

`folder` finds picture files, captions and masks; `images` decodes and crops them; `image_check` warns of bad ones;
`captioning` writes captions with BLIP; `class_images` generates class images, which `image_cache` keeps. `latent_cache`
encodes pictures, in the shapes of `buckets`, and captions once per run; `batches` makes each step's samples. The rest
of the engine takes a `Picture`, a `LatentCache` or a `Batch` from here.
"""
