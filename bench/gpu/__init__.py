"""Everything that wants a GPU, from one entry: ``python -m bench.gpu``. One file a part;
``entry.py`` runs them.
"""
