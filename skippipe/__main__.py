"""`python -m skippipe` is the same as the `skippipe` command."""

from skippipe.cli.main import main

if __name__ == "__main__":
    main()
