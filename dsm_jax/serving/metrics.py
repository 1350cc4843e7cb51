"""Count what the server does, for Prometheus: moshi-server's names, and our own."""

import time
from collections.abc import Container, Iterator, Sequence
from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from dsm_jax.runtime.compile import compilations

_STEP_S = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.12, 0.2, 0.5)
_LATENCY_S = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
_SESSION_FRAMES = (2, 25, 125, 250, 500, 750, 1125, 1500, 2250, 3000, 4500)  # as moshi-server has them
# The names of moshi-server's metrics begin with the kind of the module.
_MOSHI = {"stt": "asr", "tts": "py"}
_MOSHI_FRAMES = {"asr": "asr_connection_num_steps", "py": "py_model_connection_num_steps"}


class Metrics:
    """The server's metrics.

    Args:
      version: of the library.
    """

    def __init__(self, version: str):
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float] = _LATENCY_S, labels: Sequence[str] = ()) -> Any:
            return Histogram(name, text, ("model", *labels), buckets=buckets, registry=self.registry)

        self.started = Counter(
            "dsm_sessions_started", "sessions that were admitted", ("model", "dialect"), registry=self.registry
        )
        self.ended = Counter("dsm_sessions_ended", "sessions that ended", ("model", "reason"), registry=self.registry)
        self.refused = Counter("dsm_refused", "requests that were refused", ("reason",), registry=self.registry)
        self.sessions = Gauge("dsm_sessions", "sessions now", ("model", "dialect"), registry=self.registry)
        self.step = histogram("dsm_step_seconds", "duration of a step", _STEP_S)
        self.rows = histogram("dsm_step_rows", "sessions in a step", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
        self.latency = histogram("dsm_frame_latency_seconds", "arrival of a frame's samples to its output")
        self.first_sound = histogram("dsm_first_audio_seconds", "start of a session in its slot to its first sound")
        self.queue = histogram("dsm_queue_seconds", "wait of a recording for a slot")
        self.frames = histogram("dsm_session_frames", "frames that a session heard or made", _SESSION_FRAMES)
        self.audio = Counter("dsm_audio_seconds", "audio heard or made", ("model",), registry=self.registry)
        self.words = Counter("dsm_words", "words heard or said", ("model",), registry=self.registry)
        self.models: list[Any] = []
        self._device, self._version, self._begin = jax.devices()[0].device_kind, version, time.time()
        self.registry.register(_Live(self))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def merged(self, histogram: Any, models: Container[str]) -> tuple[float, dict[str, float]]:
        """Return the sum of a histogram over models, and the cumulative count of each bucket by its upper bound."""
        total, buckets = 0.0, {"+Inf": 0.0}
        for metric in histogram.collect():
            for sample in metric.samples:
                if sample.labels.get("model") not in models:
                    continue
                if sample.name.endswith("_sum"):
                    total += sample.value
                elif sample.name.endswith("_bucket"):
                    bound = sample.labels["le"]
                    buckets[bound] = buckets.get(bound, 0.0) + sample.value
        return total, dict(sorted(buckets.items(), key=lambda bucket: float(bucket[0])))


class _Live(Collector):
    """Metrics that are read off the models when they are asked for, and those under moshi-server's names."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def describe(self) -> Iterator[Any]:
        """Return no descriptions: the names depend on the models."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """Return the current values."""
        metrics = self._metrics
        info = InfoMetricFamily("dsm_up", "version and device")
        info.add_metric([], {"version": metrics._version, "device": metrics._device})
        yield info
        yield CounterMetricFamily("dsm_compiles", "programs compiled; flat once the server is ready", compilations())
        slots = GaugeMetricFamily("dsm_slots", "slots", labels=("model",))
        used = GaugeMetricFamily("dsm_slots_used", "slots that are held", labels=("model",))
        buffered = GaugeMetricFamily(
            "dsm_buffered_seconds", "audio that waits, of the worst session", labels=("model",)
        )
        by_kind: dict[str, list[Any]] = {}
        for served in metrics.models:
            slots.add_metric([served.name], served.engine.total)
            used.add_metric([served.name], served.engine.used)
            by_kind.setdefault(_MOSHI[served.kind], []).append(served)
            if served.kind == "stt":
                buffered.add_metric([served.name], max((s.waiting for s in served.engine.sessions), default=0.0))
        yield from (slots, used, buffered)
        for kind, models in by_kind.items():
            yield from self._moshi(kind, models)

    def _moshi(self, kind: str, models: list[Any]) -> Iterator[Any]:
        """Return the metrics that dashboards of moshi-server ask for."""
        open_channels = GaugeMetricFamily(f"{kind}_open_channels", "sessions now", labels=("handler",))
        open_channels.add_metric(["all"], sum(served.engine.used for served in models))
        yield open_channels
        names = {served.name for served in models}
        started = sum(
            sample.value
            for metric in self._metrics.started.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["model"] in names
        )
        connect = GaugeMetricFamily(f"{kind}_connect", "sessions that were admitted", labels=("handler",))
        connect.add_metric(["all"], started)
        yield connect
        seconds, steps = self._metrics.merged(self._metrics.step, names)
        duration = HistogramMetricFamily(f"{kind}_model_step_duration", "duration of a step")
        duration.add_metric([], buckets=list(steps.items()), sum_value=seconds)
        yield duration
        total, frames = self._metrics.merged(self._metrics.frames, names)
        of_session = HistogramMetricFamily(_MOSHI_FRAMES[kind], "frames that a session heard or made")
        of_session.add_metric([], buckets=list(frames.items()), sum_value=total)
        yield of_session
        if kind == "py":
            for name in ("py_total_steps", "py_active_steps"):  # a step is taken for sessions alone
                family = GaugeMetricFamily(name, "steps", labels=("handler",))
                family.add_metric(["all"], steps["+Inf"])
                yield family
