"""`skippipe validate`: check any config, cluster, problem, plan or choice file without running it."""

import json
from pathlib import Path

import click

from skippipe.cli.user_path import UserPath
from skippipe.errors import InputError


@click.command("validate")
@click.argument("paths", metavar="FILE...", nargs=-1, required=True, type=UserPath())
def command(paths: tuple[Path, ...]) -> None:
    """Check each FILE; the first offence ends the command with exit code 2."""
    for path in paths:
        kind = validate_file(path)
        click.echo(f"{path}: valid {kind}")


def validate_file(path: Path) -> str:
    """Check one file, by its content, and return what kind of file it is; raise `InputError` otherwise."""
    if path.suffix == ".json":
        return _validate_json(path)
    if path.suffix in {".yaml", ".yml"}:
        return _validate_yaml(path)
    raise InputError(f"{path}: expected a .yaml, .yml or .json file")


def _validate_json(path: Path) -> str:
    from skippipe.checkpoint import layer_choice
    from skippipe_scheduler.files import read_json
    from skippipe_scheduler.plan import plan
    from skippipe_scheduler.plan.validate import load_plan
    from skippipe_scheduler.problem import problem

    file_format = read_json(path, InputError).get("format")
    if file_format == plan.FORMAT:
        load_plan(path)
        return "plan"
    if file_format == problem.FORMAT:
        problem.load_problem(path)
        return "problem"
    if file_format == layer_choice.FORMAT:
        layer_choice.read_choice(path)
        return "choice"
    formats = f"{plan.FORMAT!r}, {problem.FORMAT!r} or {layer_choice.FORMAT!r}"
    raise InputError(f"{path}: format is {json.dumps(file_format)}, expected {formats}")


def _validate_yaml(path: Path) -> str:
    from skippipe.config.experiment_file import load_experiment
    from skippipe_scheduler.problem.cluster import is_cluster_file, load_cluster

    if is_cluster_file(path):
        load_cluster(path)
        return "cluster"
    experiment = load_experiment(path)
    load_cluster(Path(experiment.cluster))
    return "experiment"
