"""What an epoch leaves behind, in Python's memory and in the allocator, goes back to the system."""

import ctypes
import gc


def keep_loaded_objects() -> None:
    """Leave what is loaded by now out of all later collections of garbage.

    These are a million objects, of which none goes while a run lasts. Looking through them takes 0.2 to 0.3 s, and all
    others would wait for that.
    """
    gc.freeze()


def return_freed_memory() -> None:
    """Free what refers to itself in a circle, and give back what is free between the pieces in use (glibc alone can).

    Each thread of an epoch's connections allocates in an arena of its own. What it frees at the end stays there, about
    1 MiB a change of membership, since the threads of the next epoch mostly have other arenas.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
