"""The bounds of the soak: a figure that breaks one is a fault, and one that is missing too."""

import asyncio
import random

import pytest

from dsm_jax.serving.moshi import routes as moshi
from dsm_jax.serving.moshi import wire
from tests.benchmarks import mutations, serving
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


def test_mutated_messages_differ_and_come_from_their_seed():
    data = mutations.SOCKETS["/api/asr-streaming"][0]
    made = [mutations.mutated(data, random.Random(seed)) for seed in range(200)]
    assert sum(message != data for message in made) > 190
    assert made[7] == mutations.mutated(data, random.Random(7))
    assert mutations.mutated(b"", random.Random(1)) is not None


@pytest.mark.slow
def test_mutated_messages_are_answered_and_faults_are_counted(monkeypatch):
    models = served("stt", "digits", slots=serving.SLOTS), served("tts", "digits-tts", slots=serving.SLOTS)
    with running(*models, page=False) as server:

        async def good() -> str:
            return await serving._good(server.url)

        figures = asyncio.run(mutations.attack(server.url, 60, good))
        assert serving.faults("mutations", {"used_slots": 0, "memory_mb": 0, **figures}) == []
        assert figures["messages"] >= 60
        assert figures["status_400"] + figures["good"] >= 2

        def broken(data: bytes, kinds: object) -> wire.Init:
            raise RuntimeError("planted")

        monkeypatch.setattr(moshi.wire, "decode", broken)
        texts = iter(["one", "two", *["one"] * 1_000])

        async def changing() -> str:
            return next(texts)

        figures = asyncio.run(mutations.attack(server.url, 20, changing))
        assert figures["faults"] >= 1
        assert figures["differ"] == 1
