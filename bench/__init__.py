"""flexdga_bench: what Dynamic Group Attention costs and gains here, on this machine.

`flexdga-bench` is the command; `flexdga_bench.cli.main` the same as a function.
"""
