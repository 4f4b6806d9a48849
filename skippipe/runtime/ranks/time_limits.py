"""How long ranks wait, for what, and why so long: every limit of the runtime but the one that a user sets.

That one is `comm.timeout_s`: a rank that hears nothing for so long in training takes its peer for lost. None of the
numbers here was tuned: each is chosen for the reason beside it. This module imports nothing.
"""

from typing import Final

# Meetings before a run

COMPILATION_S: Final = 1800.0
"""Seconds until a rank that has not compiled its stage is given up: compiling takes minutes, on a busy host many."""
TOKENISING_S: Final = 86_400.0
"""Seconds until a rank that has not tokenised its text is given up: a large corpus takes a slow host hours."""
DEEPSPEED_BUILD_S: Final = 900.0
"""Seconds that ranks wait beyond the timeout for a host that compiles DeepSpeed's operator, which took it 160 s."""
SERVING_MEETING_S: Final = 120.0
"""Seconds that processes that are to serve a model wait for each other; afterwards the run's own timeout holds."""
PROFILE_S: Final = 120.0
"""Seconds until a silent rank is lost where `skippipe profile` has no experiment: the default of `comm.timeout_s`."""
VISIBLE_FILE_S: Final = 10.0
"""Seconds until a file of rank 0 must be seen by all: network file systems show it to other machines after a while."""
ARRIVAL_WORD_S: Final = 10.0
"""Seconds of waiting for ranks to start after which those that are missing are named: torch alone takes seconds."""

INVITED_S: Final = 3600.0
"""Seconds that a start waits for hosts on which people begin it by hand."""
CALLED_S: Final = 120.0
"""Seconds that `skippipe join` asks again where nobody answers: the other host may be about to start."""
NOTICED_LOSS_S: Final = 20.0
"""Seconds in which members of a run notice, agree on and say that one is lost: twice the default silence."""
JOIN_LOOK_S: Final = 10.0
"""Seconds from one look of a process that waits to be taken in, whether anybody of the run is left, to the next."""
STATE_S: Final = 7200.0
"""Seconds until a process that has come must have the state of its stage: some GB over a slow link take an hour."""

# The end of a run

LAST_WORDS_S: Final = 2.0
"""Seconds that a rank which stops stays to hear why others stop, and to let them read why it does.

The store may end with it. One that is alive answers in milliseconds, on a crowded machine in a second; one that is
not must not hold up the end.
"""
CHECKPOINT_GRACE_S: Final = 5.0
"""Seconds that rank 0 waits for the others' parts of a checkpoint when an error ends the run in the middle of it."""
HEAD_START_S: Final = 0.3
"""Seconds by which rank 0 says what is wrong before another rank ends, upon which torchrun ends them all."""
ORPHAN_GRACE_S: Final = 2.0
"""Seconds in which a process that has lost the store or its agent may end by itself: nobody else can end it."""
ENDED_GRACE_S: Final = 15.0
"""Seconds in which a process may end by itself after another rank has: last words and a checkpoint's grace fit in."""

# Connections of a served model

KEEP_ALIVE_IDLE_S: Final = 10
"""Seconds of silence after which the kernel asks whether the other machine is still there."""
KEEP_ALIVE_INTERVAL_S: Final = 5
"""Seconds from one such question to the next."""
KEEP_ALIVE_PROBES: Final = 4
"""Questions without an answer after which the machine counts as gone: half a minute after its last word."""

# Waits that only end by an event

LISTENER_S: Final = 365 * 86_400.0
"""Seconds that a listening thread waits for a message: for ever; who computes knows when something is overdue."""
ABORT_S: Final = 1e-3
"""Seconds of the wait that is let fail to close a group's connections (`ranks.groups`)."""

# How often is looked

STORE_POLL_S: Final = 0.02
"""Seconds between two looks into the store: a blocking wait would keep this process's other threads from it."""
WATCH_S: Final = 1.0
"""Seconds between two looks of the thread that watches the store and the agent (`ranks.watch`)."""
CHECKPOINT_POLL_S: Final = 0.1
"""Seconds between two questions of all ranks whether a checkpoint is written, which takes them a message each."""
FILE_POLL_S: Final = 0.1
"""Seconds between two looks for a file on shared storage."""
DEVICE_POLL_S: Final = 1e-4
"""Seconds between two questions whether NCCL has received: about what a small message takes."""

# What is worth a word

STORAGE_WORD_S: Final = 30.0
"""Seconds from one word about a checkpoint that training waits for to the next."""
NOTICEABLE_S: Final = 1.0
"""Seconds of waiting for the checkpoint before from which on training says so."""
