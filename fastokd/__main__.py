"""``python -m fastokd`` is the same as ``fastokd``."""

from fastokd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
