"""The secret that all processes of a run share, and the keys that are made from it."""

import hashlib
import os
from functools import lru_cache
from typing import Final

from skippipe.errors import ConfigError

SECRET: Final = "SKIPPIPE_SECRET"
"""Environment variable with the secret of a run, the same on all its hosts."""
_SHORTEST_SECRET = 16


def own_secret() -> str | None:
    """Return the secret that this process was started with, None where it has none."""
    return os.environ.get(SECRET) or None


@lru_cache(maxsize=16)
def derived_key(secret: str, purpose: str) -> bytes:
    """Derive a key of 32 bytes for one purpose, by scrypt (about 50 ms: guessing secrets is to be slow).

    A key says nothing about the secret, nor about the key for another purpose.

    Raises:
        ConfigError: the secret is too short.
    """
    if len(secret) < _SHORTEST_SECRET:
        raise ConfigError(
            f"the run's secret has {len(secret)} characters, at least {_SHORTEST_SECRET} are needed; "
            "`python -c 'import secrets; print(secrets.token_hex())'` makes one"
        )
    return hashlib.scrypt(secret.encode(), salt=purpose.encode(), n=2**14, r=8, p=1, dklen=32)
