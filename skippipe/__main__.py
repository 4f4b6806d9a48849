"""`python -m skippipe` is the same as the `skippipe` command."""

import sys

from skippipe.cli import early_signals

early_signals.hear(sys.argv[1:])

from skippipe.cli.main import main  # noqa: E402  # a signal while this is imported is heard

if __name__ == "__main__":
    main()
