"""The bill, whatever is killed (issue: the guardian and the ledger; I1, I2, I3).

python -m tests.e2e.money [--times 10]     every kill point and every lost answer of Redis, whole and streamed, so
                                           many times; then NATS and Redis killed, and Redis put back from a copy
                                           one second old. Each part ends with `prove`: the journal equals the
                                           balances, and after `hotpath reconcile` the books equal the bill.
"""
