"""A simulated run on failing nodes: every shard is done once or given up, and little work is lost."""

from __future__ import annotations

from benchmarks.corpus_simulation import HOUR, Case, simulate


def test_every_shard_is_done_once_or_is_poison() -> None:
    found = simulate(Case(60, 2 * HOUR, driver_mtbf=HOUR / 2, poisonous=3), nodes=40, shards_per_node=50)
    assert (found["once"], found["given_up"], found["more_than_once"]) == (40 * 50 - 3, 3, 0)
    assert found["node_failures"] > 5
    assert found["driver_failures"] > 0
    assert found["commands"] == found["driver_failures"] + 1
    # Expected: 30 s of 2 h to nodes, 30 s of 0.5 h to drivers, 3 x 10 x 30 s of 120,000 s to poison: 2.8%.
    assert 0.005 < found["lost"] < 0.04


def test_without_failures_nothing_is_lost() -> None:
    found = simulate(Case(60, 1e12, driver_mtbf=1e12, poisonous=0), nodes=10, shards_per_node=20)
    assert found["once"] == 200
    assert found["lost"] == 0
    assert 0.9 < found["busy"] < 1
