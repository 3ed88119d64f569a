"""How much memory a run takes: a plan before the first step, and less of it when memory runs out."""
