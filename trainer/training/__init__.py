"""The parts of the recipe in `dreambooth`.

Contains what is trained (`trainable`, `adapter`), `optimizers`, averaged weights (`averaging`), `text_conditioning`,
checks before the run (`preflight`), `previews` and `validation` during it, the files after it (`export`); a run on disk
(`runs`), a plan of the memory it takes (`memory`), and recommended settings (`presets`).
"""
