"""Commands of their own: where time goes, everything that wants a GPU, what Triton's kernels compile to."""
