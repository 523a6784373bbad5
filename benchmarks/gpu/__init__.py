"""What `benchmarks/gpu_check.sh` runs: build, tests, sanitizers and benchmarks on an NVIDIA GPU."""
