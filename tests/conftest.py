"""For all tests: one thread per process. The models are tiny, and two processes' OpenMP threads would fight for two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
