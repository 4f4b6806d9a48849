"""How a solve divides its budget between annealing searches."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from small_problems import make_problem

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.search.local_search import LocalSearch
from skippipe_scheduler.search.portfolio import PortfolioSearch
from skippipe_scheduler.search.tuning import PORTFOLIO
from skippipe_scheduler.slots.slot_model import SlotModel
from skippipe_scheduler.slots.solution import Solution


@pytest.mark.parametrize(("microbatches", "hottest"), [(20, 1.0), (160, PORTFOLIO.most_temperature_of_large)])
def test_a_large_schedule_is_never_annealed_hot(
    monkeypatch: pytest.MonkeyPatch, microbatches: int, hottest: float
) -> None:
    """However much time there is: more of it made worse plans, because a hot search leaves a good start."""
    temperatures = []
    improve = LocalSearch.improve

    def noting(
        search: LocalSearch,
        budget: Budget,
        goal_s: float = 0.0,
        report: Callable[[Solution], None] | None = None,
        temperature: float = 1.0,
    ) -> Solution:
        assert search.large == (microbatches > 20)
        temperatures.append(temperature)
        return improve(search, budget, goal_s, report, temperature)

    monkeypatch.setattr(LocalSearch, "improve", noting)
    slot_model = SlotModel(make_problem(0, [2] * 5, 5, microbatches, swaps=0, fixed=False))
    tuning = replace(PORTFOLIO, steps_per_task=1)  # so that every annealing is a full one
    PortfolioSearch([slot_model], Budget(0.0, 20_000), 0, num_workers=1, tuning=tuning).run()
    assert max(temperatures) == hottest
