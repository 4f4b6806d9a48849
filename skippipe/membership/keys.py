"""What shows that a process belongs to the run: a key pair that all members make from the run's secret."""

import hashlib
from functools import lru_cache
from typing import NamedTuple

import zmq
from zmq.utils import z85

from skippipe.errors import ConfigError

_SALT = b"skippipe.membership/1"
_SHORTEST_SECRET = 16


class RunKeys(NamedTuple):
    """The CURVE key pair of one run, both keys in Z85 (40 bytes).

    All members use the same pair, as server and as client. The public key never leaves them and never crosses the
    network in clear: without it no handshake can begin, so a stranger can neither join nor read. Hence no ZAP handler
    is needed, which would run under Python's lock and hold up reconnections while a process computes.
    """

    public: bytes
    secret: bytes


@lru_cache(maxsize=8)
def run_keys(secret: str) -> RunKeys:
    """Derive the key pair of a run from its secret, by scrypt (about 50 ms: guessing secrets is to be slow).

    Raises:
        ConfigError: the secret is too short.
    """
    if len(secret) < _SHORTEST_SECRET:
        raise ConfigError(
            f"the run's secret has {len(secret)} characters, at least {_SHORTEST_SECRET} are needed; "
            "`python -c 'import secrets; print(secrets.token_hex())'` makes one"
        )
    derived = hashlib.scrypt(secret.encode(), salt=_SALT, n=2**14, r=8, p=1, dklen=32)
    private = z85.encode(derived)
    return RunKeys(public=zmq.curve_public(private), secret=private)
