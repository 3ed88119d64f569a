"""Adapter files and the layers in them.

`kohya` reads the files of every program into an `Adapter` of `layers` and writes kohya's; `diffusers_format` converts;
`names` leads from any program's name of a module to its path and back; `targets` chooses the modules that are trained,
and `peft_layers` how PEFT holds them; `apply` adds an adapter to weights; `metadata` is what files state of themselves.
"""
