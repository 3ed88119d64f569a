"""Every setting, once: its type, range, default, unit and help.

Flags, TOML keys, the inputs of nodes and their tooltips, docs/settings.md and the metadata of adapter files derive from
the fields of these classes. A field that does not change what is learned is marked `affects_result=False` and stays out
of the run's fingerprint; one that holds a path is marked `path=True`.
"""
