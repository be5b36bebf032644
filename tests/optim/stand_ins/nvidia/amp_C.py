"""Stands for a compiled module of NVIDIA's apex: that it is there is all that is looked at."""
