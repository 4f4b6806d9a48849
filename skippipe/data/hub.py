"""The hub of Hugging Face: whether it can be reached, asked once and not for long.

Its library asks again for a minute where there is no network, and says so at each try.
"""

import logging
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from skippipe.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIMIT_S = 5.0
"""How long the hub may take for its first answer."""


@cache
def hub_problem() -> str | None:
    """Return why the hub cannot be reached, with its address; None where it can."""
    from huggingface_hub import constants

    logging.getLogger("huggingface_hub").handlers.clear()  # what it says is said by our log already
    return problem_of(constants.ENDPOINT, LIMIT_S)


def hub_problem_for(name: str) -> str | None:
    """Return why the hub cannot be asked for `name`; None where it can, and where `name` is a path of this machine."""
    return None if Path(name).exists() else hub_problem()


def problem_of(address: str, limit_s: float) -> str | None:
    """Return why there is no answer from `address` within `limit_s` seconds; None where there is one, whatever it is.

    A proxy of the environment is used, as in all questions to the hub.
    """
    from huggingface_hub import get_session

    found: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(address, timeout=limit_s)
            found.append(None)
        except Exception as reason:  # of the library and of what it stands on: no route, no name, a bad certificate
            found.append(f"{address} cannot be reached ({(str(reason).splitlines() or [type(reason).__name__])[0]})")

    # The look-up of a name has no limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else f"{address} cannot be reached (no answer in {limit_s:g} s)"


def pretrained_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder, or of the hub; without a network, from this machine's cache of the hub.

    Raises `DataError` where that is impossible.
    """
    from transformers import AutoTokenizer

    problem = hub_problem_for(name)
    place = {} if problem is None else {"local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **place)
    except Exception as reason:  # missing files and bad files raise errors of many kinds
        why = (str(reason).splitlines() or [type(reason).__name__])[0]
        if problem is not None:
            why = f"it is no folder, nothing of it is in this machine's cache, and {problem}"
        raise DataError(f"data.tokenizer: {name!r} cannot be loaded ({why})") from None
    tokenizer.init_kwargs.pop("local_files_only", None)  # or it is saved with the tokenizer
    return tokenizer
