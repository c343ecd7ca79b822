"""The backends, a module each: tensors become calls of native code, Triton launches or the reference. See `layout.Backend`."""
