"""What an epoch leaves behind in the allocator, which goes back to the system."""

import ctypes


def return_freed_memory() -> None:
    """Give back what is free between the pieces in use, where the C library can (glibc).

    Each thread of an epoch's connections allocates in an arena of its own. What it frees at the end stays there, about
    1 MiB a change of membership, since the threads of the next epoch mostly have other arenas.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
