"""Evaluation of adapters on generated pictures.

`feature_extractors` opens CLIP and DINO models (single files by `feature_files` and `feature_configs`); `metrics`
computes the papers' metrics from their features and defines the metrics' names; `generator` generates pictures and
keeps them; `evaluator` measures an adapter and picks the best of several. `comparison` and `comparison_report` compare
adapters; `score_table` scores given pictures.
"""
