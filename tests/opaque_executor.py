"""A toy executor: the reference behind the registered operator, as a kernel would be.

``evaluate(impl="reference")`` differentiates the formula directly and never calls the operator; this one makes
``_GraphFunction``, the operator's fake implementations and its gradients run wherever the reference does.
"""

from fastokd.ops import register_executor
from fastokd.ops.reference import ReferenceExecutor


class OpaqueExecutor(ReferenceExecutor):
    name = "opaque"


EXECUTOR = OpaqueExecutor()


def register() -> str:
    """Registers it and returns its name."""
    register_executor("opaque", __name__)
    return "opaque"
