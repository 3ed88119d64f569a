"""Adapter files and the layers in them.

`kohya` reads the files of every program into an `Adapter` of `layers` and writes kohya's; `diffusers_format` converts;
`names` maps any program's name of a module to its path and back; `targets` chooses the modules to train, and
`peft_layers` injects PEFT's layers; `apply` adds an adapter to weights; `metadata` writes and reads file metadata.
"""
