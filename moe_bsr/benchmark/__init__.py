"""Benchmarks: side-by-side timings, measured memory, cost sweeps, and methods compared on one machine.

A case is a model with its precision, allocator and storage (`cases`). Each case has a process of its own, which stays
alive and runs a few steps on request (`workers`). Cases take turns, so that all of them see the same state of the
machine. Only ratios within one run are compared. `matmuls` times a step's matrix products alone, which bounds the speed
of any implementation. `targets` has the goals and judges whether they are reached. `tables` formats all of it.
"""
