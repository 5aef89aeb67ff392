"""Fused kernels for coupling and its inverse, bit-equal to the plain tensor code, and the choice between the two.

`choice` says which of the two runs on a device, `fused` launches the kernels, and `triton_kernels` holds them: the one
module that imports Triton, itself imported only where a kernel is launched.
"""
