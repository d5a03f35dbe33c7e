"""Megatron's first import goes through mbfn, which silences it and leaves out its compiled kernels."""

import mbfn.megatron  # noqa: F401
