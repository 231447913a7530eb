"""Base class of the kernels' compile-time constants. No Triton, no torch."""

import hashlib
from dataclasses import fields
from functools import cached_property
from typing import Any, ClassVar


class Constant:
    """Base of frozen dataclasses that are constants of a kernel.

    Objects are compared, hashed and named by the digest of their fields. The digest is cached, so a
    launch does not hash hundreds of numbers.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @cached_property
    def digest(self) -> str:
        values = [getattr(self, field.name) for field in fields(self)]
        return hashlib.sha256(repr(values).encode()).hexdigest()[:24]

    @cached_property
    def _hash(self) -> int:
        return hash(self.digest)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is type(self) and self.digest == other.digest)

    def __repr__(self) -> str:
        return f"{type(self).__name__}_{self.digest}"
