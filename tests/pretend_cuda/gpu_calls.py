"""A rehearsal of ``bench.gpu`` on the pretend device: ``gpu_calls.py JSON`` with its arguments."""

import json
import sys

from bench.gpu.entry import main
from pretend_cuda import device

if __name__ == "__main__":
    with device.comparisons_hold():
        code = main(json.loads(sys.argv[1]))
    device.finish(code)
