"""What is made of finished adapters: merged, resized and extracted ones, whole models, and reports on them.

`deltas` is the algebra of what a layer adds to a weight, `methods` the ways to merge such deltas, pure functions;
`merge` applies them module by module and `report` says what is kept. `ziplora` learns how to merge; `extract` makes a
LoRA of two models' difference, `fuse` a model of a base and adapters; `profile` shows where in a model an adapter acts.
"""
