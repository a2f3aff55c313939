"""How fast the kernels are, whether they are right, and what a step is made of.

operators.py   the table: every operator's shapes, tolerances, bytes and operations
accuracy.py    error against fp64, next to plain PyTorch's in the same dtype
gate.py        every shipped configuration compiled without a GPU: registers, spills, shared memory
gate_step.py   train.py's whole step as torch compiles it, without a GPU (whole_step.py is its child process, offline.py
               plays the card, launches.py notes what would be launched)
device.py      device timer, copy bandwidth, matrix rate
bench_*.py     pytest-benchmark files
results.py     tables, comparisons and plots of what was measured
tune.py        searches launch configurations        step.py   one training step, by operator
"""
