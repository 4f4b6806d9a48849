"""An experiment with other values of some keys."""

from collections.abc import Mapping

from pydantic import ValidationError

from skippipe.config.experiment import Experiment

Changes = Mapping[str, object]
"""New values of keys, section and name with a dot between them."""


def changed(experiment: Experiment, changes: Changes) -> Experiment:
    """Return the experiment with these changes; raise `ValidationError` where they do not go with the rest."""
    content = experiment.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        content[section][name] = value
    return Experiment.model_validate(content)


def is_possible(experiment: Experiment, changes: Changes) -> bool:
    """Return whether the changes go with the rest of the experiment."""
    try:
        changed(experiment, changes)
    except ValidationError:
        return False
    return True


def in_words(changes: Changes) -> str:
    """Return the changes as one would write them on a command line."""
    written = {key: str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    return " ".join(f"{key}={value}" for key, value in written.items())
