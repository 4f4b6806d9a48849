"""The `skippipe` command."""
