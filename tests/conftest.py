"""For all tests: what a process inherits from whoever starts the suite must not decide it."""

import glob
import os
import signal

# One thread per process: the models are tiny, and two processes' OpenMP threads would fight for two cores. Before torch is
# imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is first imported, by whomever.
if not (glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell's background job ignores Ctrl-C, one under nohup the terminal's end, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
