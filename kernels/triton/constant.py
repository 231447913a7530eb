"""What a kernel knows while it compiles, as one object. No Triton, no torch."""

import hashlib
from dataclasses import fields
from functools import cached_property


class Constant:
    """Base of frozen dataclasses that are constants of a kernel: compared, hashed and named by the
    digest of their fields, which is made once, so that a launch does not hash hundreds of numbers.
    """

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
