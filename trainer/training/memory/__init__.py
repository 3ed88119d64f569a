"""Memory of a run: an estimate before the first step, and a retry with less when memory runs out."""
