"""Test suite: all drift tests of a window, over consecutive windows."""
