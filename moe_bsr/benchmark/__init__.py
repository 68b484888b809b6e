"""Side-by-side timings: every case in a process of its own, in interleaved runs on one machine.

A case is a model with its precision, allocator and storage (`cases`); its process stays alive and runs a
step or two when asked (`workers`), so that all cases meet the same machine at the same time and only ratios
within one run are compared. `matmuls` times the step's own matrix products alone, the bound of any
implementation; `targets` says what was aimed at and whether it was reached, `tables` shows all of it.
"""
