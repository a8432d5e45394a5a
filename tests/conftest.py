"""One thread a test process: the models are tiny, and the suite runs several processes on few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
