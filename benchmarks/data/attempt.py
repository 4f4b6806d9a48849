"""Make one token cache and print what that took, as JSON; the options of the section `data` are the argument."""

import json
import resource
import sys
import time

from skippipe.config.data_options import DataOptions
from skippipe.data.token_cache import open_cache


def main() -> None:
    """Print the result as the last line."""
    begun_s, begun_thread_s = time.monotonic(), time.thread_time()
    cache = open_cache(DataOptions.model_validate(json.loads(sys.argv[1])), seed=0)
    used = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "peak_gib": used.ru_maxrss / 2**20,
        "wall_s": time.monotonic() - begun_s,
        "cpu_s": used.ru_utime + used.ru_stime,
        "reading_s": time.thread_time() - begun_thread_s,
        "tokens": len(cache.train) + len(cache.validation),
        "fingerprint": cache.fingerprint,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
