"""Kernels for GPUs, in Triton. Their modules can be imported only where Triton is installed."""
