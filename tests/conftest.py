"""What holds for all tests."""

import os

# In one run of the tests, threads that had just been made went round in circles inside the memory pool of MKL
# (mm_account_ptr_by_tid) for ten minutes, after a test had changed their number. The tests do without the pool.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")

# torch.compile keeps what it compiled between runs and looks it up by the graph alone: after a change to what an operator
# returns (its fake implementation) it would find what was compiled for the operator as it was.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
