"""The inner loop of the search, compiled with numba: plain arrays and loops, no objects.

Everywhere `p` is the problem's `Instance`, `s` a `Schedule`, `w` the `Work` memory, `q` its `Queue`, `d` that of a
dispatch, and `m` a microbatch (`arrays` says what they hold). A *slot* is the place of one replica of one stage; the
placement says which node fills it.

anneal        large neighbourhood search under simulated annealing: the steps of the search
moves         what a step takes out, and how it changes routes
insertion     how whole microbatches get into a schedule, and out of it
rerouting     the fastest replicas for a route
dispatching   a schedule event by event, among all shared transfers
timing        exact times and the score of a schedule; reduction_time that of gradients
loads         routes and placement under bounds instead of exact times
tasks         the chain of a microbatch; random numbers
constants     the numbers that steer all this; jit: how it is compiled
"""
