"""Choice of results to label next."""

from __future__ import annotations

import numpy as np

from outstation.ml.performance.label_candidates import UnlabelledResults, choose


def results(n: int, **changes: object) -> UnlabelledResults:
    members = {
        "batch": np.arange(n),
        "doubt": np.linspace(0, 0.5, n),
        "drift": np.zeros(n),
        "predicted": ["rare" if i == 3 else "usual" for i in range(n)],
    }
    return UnlabelledResults(**{**members, **changes})  # type: ignore[arg-type]


def test_reasons_take_turns_and_each_gives_its_strongest() -> None:
    drift = np.zeros(100)
    drift[50] = 0.9
    chosen = choose(results(100, drift=drift), {"rare": 0, "usual": 40}, 4, seed=1)
    assert [each.reason for each in chosen] == ["uncertain", "drifted", "rare", "random"]
    assert [each.index for each in chosen[:3]] == [99, 50, 3]


def test_a_list_of_one_result_of_each_task_has_all_reasons() -> None:
    unlabelled = results(100, drift=np.full(100, 0.5))
    chosen = [choose(unlabelled, {"rare": 0, "usual": 40}, 1, seed=1, turn=turn)[0] for turn in range(4)]
    assert [each.reason for each in chosen] == ["uncertain", "drifted", "rare", "random"]


def test_neighbours_of_one_batch_are_chosen_once_for_a_reason() -> None:
    chosen = choose(results(40, batch=np.arange(40) // 20, predicted=[None] * 40), {}, 40, seed=1)
    assert sum(each.reason == "uncertain" for each in chosen) == 2


def test_no_result_is_chosen_twice_and_the_list_ends() -> None:
    chosen = choose(results(10), {}, 100, seed=1)
    assert sorted(each.index for each in chosen) == list(range(10))
    assert choose(results(0, predicted=[]), {}, 5, seed=1) == []


def test_numbers_without_a_score_get_random_ones() -> None:
    chosen = choose(results(20, doubt=np.full(20, np.nan), predicted=[None] * 20), {}, 5, seed=1)
    assert {each.reason for each in chosen} == {"random"}
    assert chosen == choose(results(20, doubt=np.full(20, np.nan), predicted=[None] * 20), {}, 5, seed=1)
