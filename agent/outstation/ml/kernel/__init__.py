"""Compiled statistics: a C library that gives the same bits as NumPy; without it, NumPy computes everything."""
