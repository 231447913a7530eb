"""Write ``digits.npz`` again from scikit-learn's ``load_digits``: ``python -m bench.make_digits``.

``levels`` is uint8 [1797, 8, 8] with the source's grey levels 0..16, ``targets`` uint8 [1797].
"""

import numpy as np

from fastokd.data.digits import FILE


def main() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez_compressed(
        FILE, levels=digits.images.astype(np.uint8), targets=digits.target.astype(np.uint8)
    )
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
