"""Every name under which ranks put something into the store that they share, so that no two uses meet under one key.

skippipe/try                        the number of the present try: it grows when ranks are started again (`arrival`)
skippipe/contacts, contacts/<i>     how many texts say how members can be reached, and each of them (`arrival`)
skippipe/place/<rank>               that a process without a launcher has this rank (`skippipe.training.joining`)
skippipe/places                     how many ranks meet, where no launcher says it (`skippipe.training.joining`)
skippipe/try-<n>/seat/<rank>        which process is a rank in try n, as the launcher counts ranks
skippipe/try-<n>/here/<rank>        that this process has seen all seats taken

Below skippipe/try-<n>:

ended, ended-heard                  why the first rank that ended by itself did so (`context`); how many know
<topic>/<number>/<rank>             what a rank says in the meeting of that number about a topic (`context`)
<topic>/<number>/read               how many ranks have read what all say there; left: how many need no store any more
failure/<rank>                      why a rank stopped (`failure_board`), and left-<rank>: that it knows why others did
failure/given-up                    that a step is given up on purpose
checkpoint/<step>/<part>/<rank>     what a rank did for a checkpoint (`skippipe.checkpoint.report_board`)

torch keeps its own keys for the process groups there, too.
"""

from enum import StrEnum

from torch._C._distributed_c10d import PrefixStore, Store

RUN = "skippipe"
TRY = "try"
CONTACTS = "contacts"
PLACE = "place"
NUM_PLACES = "places"
ENDED = "ended"
GIVEN_UP = "given-up"


class Topic(StrEnum):
    """What ranks tell each other about; all of them meet about the same topics in the same order."""

    OWNER = "owner"
    """Whether the first rank of each disk owns the run directory."""
    PLANS = "plans"
    """The plans of the run, from rank 0."""
    START = "start"
    """What each rank computes on and was asked for."""
    TOKENS = "tokens"
    """Whether each rank has the tokens of its text."""
    SAME_TOKENS = "same-tokens"
    """Which tokens each rank has."""
    ACTIVATION_MEMORY = "activation-memory"
    """What a microbatch keeps in a stage, from rank 0."""
    ROOM = "room"
    """Whether each rank's GPU has the memory."""
    DEVICE = "device"
    """Whether each rank's device can use NCCL."""
    COMPILED = "compiled"
    """Whether each rank has compiled its stage."""
    RUN_DIRECTORY = "run-directory"
    """What this start calls the marks in its run directory, from rank 0."""
    RUN_DIRECTORY_SEEN = "run-directory-seen"
    """The name that each rank found in that mark: equal for ranks that see one disk."""
    FILES_KEY = "files/key"
    """The secret with which ranks give each other files, from rank 0."""
    FILES_PLACE = "files/place"
    """Where each rank gives files."""
    DISK_RECORDS = "disk-records"
    """Whether the first rank of each disk could write the records of the run, and which it has."""
    TOKENIZER = "tokenizer"
    """How large the tokenizer is that other disks get, and whether each has it."""
    DISK_CHECKPOINTS = "disk-checkpoints"
    """Which files of a checkpoint are sound on each disk."""
    DISK_FETCHED = "disk-fetched"
    """Whether each disk has what its ranks need of a checkpoint."""
    CHECKPOINTS = "checkpoints"
    """Of which steps there are checkpoints, as rank 0 sees it."""
    CHECKPOINT_SOUND = "checkpoint-sound"
    """What is wrong with each rank's share of a checkpoint's files."""
    DAMAGED_CHECKPOINTS = "damaged-checkpoints"
    """Whether the run can go on without the damaged ones."""
    CHECKPOINT_LOADED = "checkpoint-loaded"
    """Whether each rank has loaded its part."""
    KEPT_STAGES = "kept-stages"
    """Of which stages that nobody holds each rank has a copy."""
    NUM_PARAMETERS = "num-parameters"
    """How many parameters each rank answers for."""
    RECORDS = "records"
    """Whether rank 0 could open its records."""
    PROFILE_DEVICE = "profile/device"
    """Whether each rank has the device that is to be measured."""
    PROFILE_PLACE = "profile/place"
    """On which machine and network each rank is."""
    PROFILE_COMPUTE = "profile/compute"
    """How fast each rank computes."""
    PROFILE_ADDRESSES = "profile/addresses"
    """Where each rank takes connections that are to be measured."""
    PROFILE_LINKS = "profile/links"
    """The links that each rank has measured."""
    SERVED_RUN = "inference/run"
    """Whether each rank can read the run that is to be served."""
    SERVING = "inference"
    """Where each rank can be reached, and as which node of the plan."""
    SIBLINGS = "siblings"
    """How many processes the launcher of each rank runs on its host."""
    MEMBERSHIP_KEY = "membership/key"
    """The secret with which the members of this start know each other, from rank 0."""
    MEMBERS = "membership/members"
    """Where each rank can be reached as a member."""
    JOINED = "joined"
    """That each rank has the state of its stage, in the first iteration with some that have come."""
    RESTORED = "restored"
    """From which older state each rank has its stage, if it has, and what its disk is called."""
    END = "end"
    """That each rank has done all that it needs the others for."""


class Board(StrEnum):
    """Where ranks leave reports that others may read later, or never."""

    FAILURE = "failure"
    CHECKPOINT = "checkpoint"


def store_of_run(store: Store) -> Store:
    """Return the part of the launcher's store in which all keys of this run lie; no key of ours is outside."""
    return PrefixStore(RUN, store)


def store_of_try(run: Store, number: int) -> Store:
    """Return the part of a run's store in which one try lies."""
    return PrefixStore(f"try-{number}", run)


def store_of_board(store: Store, board: Board) -> Store:
    """Return the part of a run's store in which one board lies."""
    return PrefixStore(board.value, store)
