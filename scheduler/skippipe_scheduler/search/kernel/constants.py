"""Every number that steers the compiled search, with its unit, its meaning and where it comes from.

They are constants, because compiled code takes them in as such; a change compiles the kernel anew. *Study* means that
the value is from the first study of reference-20, regions-18 and regions-64, of which no runs are kept; *chosen* means
judgement, of which nothing is recorded.
"""

from typing import Final

# What one step of the large neighbourhood search does (`anneal`).
EXCHANGE_TASKS: Final = 0.06
"""Share of the steps on small schedules that exchange two neighbouring tasks of a slot. Chosen."""
EXCHANGE_NODES: Final = 0.3
"""Share of the other steps that exchange the nodes of two slots, where the placement is free. Chosen."""
ONLY_EXCHANGE_NODES: Final = 0.3
"""Share of these after which no microbatch is taken out. Chosen."""
CHANGE_ROUTES: Final = 0.62
"""Share of the steps that change routes of what they took out; the others only insert it elsewhere. Chosen."""
CHANGE_TWICE: Final = 0.3
"""Share of these that apply a second move. Chosen."""
LONGEST_FIRST: Final = 0.4
"""Share of the steps that insert the longest round trip first instead of in a random sequence. Chosen."""
SHORTEST_WAIT: Final = 0.5
"""Shortest of the longest waits of a task for its node, in mean backward times. Study: a few seconds work best."""
WAIT_DOUBLINGS: Final = 5
"""So many longest waits, each twice the one before: 0.5, 1, 2, 4 and 8 mean backward times. Study."""

EXCHANGE_RELAYS: Final = 0.5
"""Share of the steps, where nodes relay, that exchange what two microbatches leave out. Chosen."""

# What a step takes out (`moves.select_destroyed`).
USUAL_SELECTION: Final = 6
"""Microbatches that a usual step takes out at most; 2 at least. Study."""
USUAL: Final = 0.97
"""Share of the usual steps; the others take out up to `arrays.MOST_CHOSEN` - 2. Chosen."""
LATE: Final = 0.35
"""Share of the steps that take out microbatches that finish late. The kinds are the study's, these shares chosen."""
OF_ONE_ORIGIN: Final = 0.55
"""Up to this share those of one origin."""
SHARING_A_SLOT: Final = 0.8
"""Up to this share those that share a slot; from there on any."""
SPARE_LATE: Final = 2
"""Late microbatches are drawn from so many more than the step takes out. Chosen."""
USUAL_VISITORS: Final = 8
"""Microbatches that are taken out at most after an exchange of nodes; 2 at least. Chosen."""
FOREIGN_VISIT: Final = 0.2
"""Share of the moves between stages that take any slot instead of a visit of another microbatch. Chosen."""

# How the annealing goes on (`anneal`).
RETURN_TO_BEST: Final = 400
"""Steps; a refused step whose number is a multiple of this returns to the best schedule. Chosen."""
RETIME_EVERY: Final = 300
"""Steps in place after which all tasks start as early as possible again. Chosen: until then a schedule gets looser."""
CERTAIN_SHARE: Final = 0.95
"""In place, an insertion ends where its microbatch would end after the acceptable score, less this share of what now
comes on top of the iteration time. Chosen: that part hardly changes in one step."""

# How whole microbatches are inserted (`insertion`).
FEW_ATTEMPTS: Final = 80
"""Attempts to place a microbatch before it is given up, where that is allowed. Chosen."""
MANY_ATTEMPTS: Final = 2000
"""Attempts before it is placed behind everything else. Chosen: hardly ever reached."""

REROUTE: Final = 0.1
"""Share of the steps on routes that insert through the cheapest replicas (`rerouting`). Measured on 128 nodes, 20 s,
two seeds: 217.5 and 211.8 s; with 0 221.8 and 217.5; with 0.3 219.4 and 214.3."""
LABELS: Final = 8
"""Replicas of a stage from which they go on, the cheapest. Measured: 24 give nothing more on 128 to 1,000 nodes."""
LINK_COST: Final = 1.5
"""What a second of a transfer costs, in seconds of waiting, when replicas are chosen ..."""
WORK_COST: Final = 0.5
"""... and a second of work. Measured, first schedules of four seeds each: 408 s on 1,000 nodes, 326 on 300 and 282 on
128, beside 424, 331 and 283 where all cost the same; flat between 1 and 2, and 0.3 and 0.5."""

# What makes one schedule better than another (`timing.score_s`).
ORIGIN_WEIGHT: Final = 0.1
"""Weight of the origins' mean last finish beside the iteration time, which alone is a plateau. Study: small weights."""
MEAN_WEIGHT: Final = 0.03
"""Weight of the mean finish of all microbatches. Study."""

# The loads (`loads`).
POWER: Final = 12
"""Exponent of the soft maximum, which `loads._power` multiplies out. Chosen: of 20 equal loads it is 1.28 times one."""
REDUCTION_WEIGHT: Final = 1.0
"""Weight of the slowest gradient reduction. Measured on 100 nodes in 10 regions: what begins last is hardly hidden."""
MOST_NEAREST: Final = 62
"""Replicas up to which a ring is looked for by the nearest next: as many as a mask has bits."""
RESCALE_EVERY: Final = 4096
"""Steps after which the loads are counted anew. Chosen: rounding errors stay far below a difference that matters."""

EPSILON_S: Final = 1e-9
"""Seconds that count as nothing between two starts: rounding."""
SAME_SCORE_S: Final = 1e-11
"""Seconds by which scores must differ to tell two schedules apart."""
NO_LIMIT_S: Final = 1e300
"""A limit in seconds that nothing exceeds, though unlike infinity it gives up after `FEW_ATTEMPTS`."""
