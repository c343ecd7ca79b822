"""Backends: each module turns tensors into native calls and says, in `unavailable()`, why it cannot run if it cannot."""
