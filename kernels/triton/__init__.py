"""Triton kernels that execute any distillation graph.

``specialize`` turns a plan into constants (``spec``). Kernels unroll these while they compile, so
one source serves all graphs. ``tile`` maps a batch to programs and threads, ``budget`` reads the
cost of a compiled kernel from its machine code. Nothing here imports torch.
"""
