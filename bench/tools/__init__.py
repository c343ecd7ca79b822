"""The commands: a run, its peak memory, where time goes, everything that wants a GPU, what Triton's kernels compile to."""
