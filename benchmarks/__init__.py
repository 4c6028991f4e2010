"""How fast the kernels are, beside every peer and beside what the machine can do at best.

``python -m benchmarks --help`` lists the sections. Every candidate of a cell takes its turn, round
after round, in one process; the limits are measured in the same run, on the same threads.
"""
