"""What bench.py measures with: requests, engines, the machine's limits, and one module for each subcommand."""
