"""When nodes count as slower or faster for good: never for noise, soon for a change, again when it is over."""

import random

import pytest
from hypothesis import given, settings, strategies as st

from skippipe.config.recovery_options import ReplanOptions
from skippipe.training.recovery.plans.pace_watch import PaceWatch

NODES = ("oregon-0", "oregon-1", "turin-0", "turin-1", "turin-2")
OPTIONS = ReplanOptions()
SHORT = OPTIONS.model_copy(update={"window": 5, "pause": 20})
REACTION = SHORT.window // 2 + 1 + SHORT.window
"""Steps until the median of a window has moved, and then a window."""


def steps_until_due(watch: PaceWatch[str], paces: list[float], first: int = 1, most: int = 1000) -> int | None:
    """Return the step in which another plan is to be looked for where all steps have these paces."""
    return next((step for step in range(first, first + most) if watch.observe(step, paces)), None)


def steady(node: str, factor: float) -> list[float]:
    return [factor if name == node else 1.0 for name in NODES]


def test_noise_asks_for_no_plan() -> None:
    for seed in range(100):
        generator, watch = random.Random(seed), PaceWatch(NODES, OPTIONS)
        speed = [generator.uniform(0.9, 1.1) for _ in NODES]
        for step in range(1, 121):
            weather = generator.lognormvariate(0.0, 0.5)  # of all nodes
            paces = [own * weather * generator.lognormvariate(0.0, 0.2) for own in speed]
            if generator.random() < 0.1:
                paces[generator.randrange(len(NODES))] *= 50
            assert not watch.observe(step, paces), (seed, step, watch.changed)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.floats(0.88, 1.13), min_size=5, max_size=5), min_size=20, max_size=20), st.floats(0.01, 100)
)
def test_what_stays_within_the_threshold_asks_for_no_plan(noise: list[list[float]], speed: float) -> None:
    watch = PaceWatch(NODES, SHORT)
    assert not any(watch.observe(step, [speed * pace for pace in paces]) for step, paces in enumerate(noise))


@settings(max_examples=40)
@given(st.integers(0, 4), st.floats(2.0, 50.0), st.booleans(), st.floats(0.01, 100), st.integers(0, 20))
def test_a_change_is_noticed_soon_and_its_end_too(
    index: int, factor: float, is_slower: bool, speed: float, calm: int
) -> None:
    factor = factor if is_slower else 1 / factor
    watch, node = PaceWatch(NODES, SHORT), NODES[index]
    usual, changed = [speed] * len(NODES), [speed * pace for pace in steady(node, factor)]
    assert steps_until_due(watch, usual, most=calm) is None
    due = steps_until_due(watch, changed, calm + 1)
    assert due is not None
    assert due - calm <= max(REACTION, 2 * SHORT.window - 1 - calm)
    assert watch.changed == pytest.approx({node: factor})
    assert watch.estimates == pytest.approx(dict(zip(NODES, changed, strict=True)))
    watch.settle(due)
    assert steps_until_due(watch, changed, due + 1, most=60) is None
    over = steps_until_due(watch, usual, due + 61)
    assert over is not None
    assert over - due - 60 <= REACTION
    assert watch.changed == pytest.approx({node: 1 / factor})


def test_a_plan_that_has_replaced_another_stays_for_a_pause() -> None:
    watch = PaceWatch(NODES, OPTIONS, after_change=True)
    assert steps_until_due(watch, steady("turin-1", 3.0), first=500) == 500 + OPTIONS.pause
    watch.settle(600)
    assert steps_until_due(watch, steady("turin-1", 1.0), first=601) == 600 + OPTIONS.pause


def test_a_change_that_passes_asks_for_nothing() -> None:
    watch = PaceWatch(NODES, OPTIONS)
    for begin in range(1, 1001, 100):
        assert steps_until_due(watch, steady("turin-2", 1.0), begin, most=85) is None
        assert steps_until_due(watch, steady("turin-2", 4.0), begin + 85, most=15) is None


def test_a_node_without_tasks_has_the_pace_of_the_others() -> None:
    watch = PaceWatch(NODES, OPTIONS)
    assert steps_until_due(watch, [0.0, 2.0, 2.0, 2.0, 2.2], most=100) is None
    assert watch.estimates == pytest.approx(dict(zip(NODES, (2.0, 2.0, 2.0, 2.0, 2.2), strict=True)))


def test_of_two_nodes_one_is_slower_and_the_other_faster() -> None:
    watch = PaceWatch(NODES[:2], OPTIONS)
    assert steps_until_due(watch, [1.0, 4.0]) == 2 * OPTIONS.window - 1
    assert watch.changed == pytest.approx({"oregon-0": 0.5, "oregon-1": 2.0})


@pytest.mark.parametrize(("other_s", "is_worth_it"), [(9.6, False), (9.4, True), (11.0, False)])
def test_a_plan_has_to_save_a_share(other_s: float, *, is_worth_it: bool) -> None:
    assert PaceWatch(NODES, OPTIONS).is_worth_it(10.0, other_s) is is_worth_it
