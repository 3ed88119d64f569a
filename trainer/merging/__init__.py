"""Working with finished adapters: merging, resizing, extracting, fusing into models, and reports.

`deltas` is the algebra of weight deltas, `methods` the ways to merge such deltas, pure functions;
`merge` applies them module by module and `report` measures what is kept. `ziplora` learns how to merge; `extract` makes
a LoRA of two models' difference, `fuse` a model of a base and adapters; `profile` shows which parts of a model an
adapter changes.
"""
