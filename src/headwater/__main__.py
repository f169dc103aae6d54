"""`python -m headwater`, for launchers that start modules: `torchrun --nproc-per-node 2 -m headwater train ...`."""

from headwater.cli import main

main()
