"""How good an adapter is, measured on pictures.

`feature_extractors` opens CLIP and DINO models (single files by `feature_files` and `feature_configs`); `metrics`
computes the papers' metrics from their features and holds the metrics' names; `generator` generates pictures and keeps
them; `evaluator` measures an adapter and picks the best of several. `comparison` and `comparison_report` put adapters
side by side; `score_table` scores pictures that are given.
"""
