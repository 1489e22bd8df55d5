"""Closed forms from the papers, as functions that can be called and checked.

``ste``: straight-through estimators on a two-layer network (Yin et al. 2019); ``regret``: bounds
of training with quantized weights and gradients (Hou, Zhang, Kwok 2019).
"""
