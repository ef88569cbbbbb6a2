"""Real faults against real nodes: processes that are killed, paused, cut off and starved, and an oracle that judges.

zygote.py     forks a node process in milliseconds, so that sixty kills cost seconds
worker.py     what runs in such a process: one node, a stream of numbered messages, reports to the oracle
oracle.py     a process of its own with an append-only, synced log; checks the invariants I1 to I10
fleet.py      starts and pairs nodes, breaks them, asks the oracle
proxy.py      a TCP proxy that delays, cuts, half-closes and corrupts
netns.py      network namespaces joined by a bridge
scenarios.py  each fault as a function of (fleet, times)
soak.py       a million messages under all of it
__main__.py   the matrix, the soak run, one scenario under one seed
"""
