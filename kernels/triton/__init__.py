"""Triton kernels that execute any distillation graph: forward, backward, and both in one.

A plan is lowered to constants (``spec``) and unrolled while a kernel compiles, so that there is one
source for all graphs. How a batch is laid over threads is in ``tile``, what the result costs is
read from machine code in ``budget``. Nothing here imports torch.
"""
