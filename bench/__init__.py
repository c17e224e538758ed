"""The benchmark suite: run it with `python bench/run.py` (CPU) or `bash bench/gpu.sh` (a CUDA device)."""
