"""Speed and memory beside bare transformers and other libraries: one module a claim, all by `python -m benchmarks`."""
