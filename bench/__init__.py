"""How fast the kernels are beside plain PyTorch and beside what they were, and what a step is made of.

gate/          every shipped configuration, and train.py's whole step, compiled without a GPU
check/         `make gpu-check`: all that only a GPU can tell, part by part
bench_*.py     pytest-benchmark files; results.py: their tables and comparisons
baseline.py    the model in plain PyTorch; versus_plain.py, quality.py: train.py beside it
step.py, determinism.py, overheads.py, sandbox.py: one training step, and what stands around it
"""
