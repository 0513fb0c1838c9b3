"""`python -m lnl_bench` is the command `lnl`."""

from lnl_bench.cli import main

if __name__ == "__main__": main()
