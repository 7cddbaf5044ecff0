"""Hotpath in the external gateway harness (folder $BENCH: mock upstream, load generators, accounting).

    python -m tests.bench.conf > hotpath.json             direct, the harness's skeleton lim-base, and hotpath
    python3 $BENCH/bench.py run --conf hotpath.json --repeat 5
    python3 $BENCH/bench.py report
    python -m tests.bench.money                           was every call settled at the mock's price?
    python -m tests.bench.legs DIR                        CPU by role of a running `hotpath up` (what dominates)

Results and data directories are the harness's: $BENCH_OUT, else bench-out in the temporary directory.
"""
