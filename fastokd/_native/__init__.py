"""The compiled CPU library, if it was built, and ``build_info.json``, which says how, or why not.
Loaded by ``fastokd.ops.cpu``.
"""
