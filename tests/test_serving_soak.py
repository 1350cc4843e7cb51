"""The bounds of the soak: a figure that breaks one is a fault, and one that is missing too."""

import asyncio

import pytest

from tests.benchmarks import serving
from tests.helpers.serving import running, served


@pytest.mark.parametrize("part", serving.BOUNDS)
def test_a_figure_beyond_its_bound_is_a_fault_and_so_is_a_missing_one(part):
    bounds = serving.BOUNDS[part]
    good = dict(bounds)
    assert serving.faults(part, good) == []
    for name, most in bounds.items():
        for planted in (most + 0.001, None, float("nan")):
            (fault,) = serving.faults(part, {**good, name: planted})
            assert fault.startswith(f"{part}: {name} is {planted}; expected at most")
        del good[name]
        assert len(serving.faults(part, good)) == 1
        good[name] = most


@pytest.mark.slow
def test_churn_counts_texts_that_differ_and_metrics_are_summed(monkeypatch):
    with running(served("stt", "digits", slots=serving.SLOTS), page=False) as server:
        figures = asyncio.run(serving.churn(server.url, 1.0))
        assert serving.faults("churn", figures) == []
        assert figures["good"] >= 2
        assert serving.metric(server.url, "dsm_slots") == serving.SLOTS
        texts = iter(["wanted", *["another"] * 1_000])

        async def wrong(url: str) -> str:
            await asyncio.sleep(0.2)
            return next(texts)

        monkeypatch.setattr(serving, "_good", wrong)
        figures = asyncio.run(serving.churn(server.url, 0.1))
        assert figures["differ"] == figures["good"] > 0
        assert serving.faults("churn", figures)
