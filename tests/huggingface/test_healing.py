"""Training along a choice of layers: the stages and routes that `import --heal` makes of it."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, strategies as st
from pretrained_models import write_pretrained
from training_runs import ALONE

from skippipe.checkpoint.huggingface.healing import ROUTES_OF_EIGHT, healing_pipeline
from skippipe.checkpoint.layer_choice import LayerChoice, write_choice
from skippipe.cli.main import skippipe
from skippipe.config.experiment_file import load_run
from skippipe.errors import InputError
from skippipe.planning.sharing import choose_plans
from skippipe.training.loop import train

PLACE = Path("choice.json")
SHORT = (
    "training.max_steps=2",
    "training.num_microbatches=8",
    "training.sequence_length=16",
    "data.max_bytes=200_000",
    "pipeline.planner.max_evaluations=20",
)


def choice_of(layers: list[int], num_layers: int, **blocks: Any) -> LayerChoice:
    """Return the choice of whole layers, but for `blocks`."""
    content = {"attention": tuple(layers), "feed_forward": tuple(layers), **blocks}
    return LayerChoice(
        model="m",
        checkpoint="c",
        policy="best",
        keep=0.5,
        share_computed=0.5,
        perplexity=None,
        num_layers=num_layers,
        **content,
    )


def test_neighbouring_layers_make_a_stage() -> None:
    assert healing_pipeline(choice_of([0, 1, 2, 6, 7, 9, 13], 14), PLACE) == {
        "num_stages": 7,
        "layers_per_stage": [3, 3, 2, 1, 1, 3, 1],
        "protected_stages": [2, 4, 6],
        "route_lengths": {7: 1, 5: 2, 4: 5},
    }


@given(
    st.integers(2, 40).flatmap(lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1), min_size=1)))
)
def test_the_shortest_routes_run_the_choice_and_layer_0(drawn: tuple[int, set[int]]) -> None:
    num_layers, kept = drawn
    if len(kept | {0}) == num_layers:
        with pytest.raises(InputError, match="nothing to heal"):
            healing_pipeline(choice_of(sorted(kept), num_layers), PLACE)
        return
    pipeline = healing_pipeline(choice_of(sorted(kept), num_layers), PLACE)
    counts = pipeline["layers_per_stage"]
    assert sum(counts) == num_layers
    ends = [sum(counts[: stage + 1]) for stage in range(len(counts))]
    on_route = (0, *pipeline["protected_stages"])
    assert {layer for stage in on_route for layer in range(ends[stage] - counts[stage], ends[stage])} == kept | {0}
    lengths = pipeline["route_lengths"]
    assert (min(lengths), max(lengths)) == (len(on_route), len(counts))
    assert sum(lengths.values()) == sum(ROUTES_OF_EIGHT.values())


def test_what_cannot_be_healed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer 2 only the attention runs, but whole layers"):
        healing_pipeline(choice_of([0, 1], 3, attention=(0, 1, 2)), PLACE)
    write_pretrained(tmp_path / "given", num_hidden_layers=4)
    write_choice(choice_of([0, 1, 3], 5), tmp_path / "choice.json")
    result = CliRunner().invoke(skippipe, _import(tmp_path))
    assert "chosen for a model of 5 layers" in str(result.exception or result.output)
    assert not (tmp_path / "run").exists()


def test_an_imported_model_trains_along_its_choice(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "given", num_hidden_layers=8)
    write_choice(choice_of([0, 2, 4, 6, 7], 8), tmp_path / "choice.json")
    shares = "pipeline.route_lengths={7: 2, 4: 6}"
    result = CliRunner().invoke(skippipe, [*_import(tmp_path), *SHORT, shares])
    assert result.exit_code == 0, result.output
    run = load_run(tmp_path / "run")
    assert run.pipeline.route_lengths == {7: 2, 4: 6}  # what is given wins
    plans = choose_plans(run, None)
    assert len(plans.main.nodes) == 7
    assert sorted(len(microbatch.route) for microbatch in plans.main.microbatches) == [4] * 6 + [7] * 2
    assert not train(run, plans, ALONE).stopped


def _import(folder: Path) -> list[str]:
    return ["import", str(folder / "given"), str(folder / "run"), "--heal", str(folder / "choice.json")]
