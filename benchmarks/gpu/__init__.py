"""What `benchmarks/gpu_check.sh` runs beside the tests: a script for each table of times."""
