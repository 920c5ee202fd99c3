"""Attention over a plan: the dense definition, kernels, the exchange of keys, and the autograd function that
joins them.
"""
