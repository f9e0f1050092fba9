"""The metrics at /metrics. Each app has a registry of its own, so that a process can have several apps."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_SAMPLES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 4096)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry, "namespace": "dave_fast"}
        self.requests = Counter("requests", "HTTP requests, by route and status.", ("route", "status"), **own)
        self.answers = Counter("answers", "Explanations, by model and what ended them.", ("model", "ended_by"), **own)
        self.errors = Counter("errors", "Explanations that failed, by kind of error.", ("kind",), **own)
        self.deadline_misses = Counter("deadline_misses", "Answers after their deadline, or without a sample.", **own)
        self.cancelled = Counter("cancelled", "Explanations whose client went away.", **own)
        self.queue_wait = Histogram(
            "queue_wait_seconds", "From admission to the first micro-batch.", buckets=_SECONDS, **own
        )
        self.latency = Histogram("latency_seconds", "From admission to the answer.", buckets=_SECONDS, **own)
        self.samples = Histogram("samples", "Samples an answer.", buckets=_SAMPLES, **own)
        self.batch_fill = Histogram("batch_fill", "Rows of a micro-batch over its capacity.", buckets=_SHARES, **own)
        self.device_time = Histogram(
            "device_seconds", "Seconds a micro-batch, by worker.", ("engine",), buckets=_SECONDS, **own
        )
        self.rows = Counter("rows", "Rows (image, sample) computed, by worker.", ("engine",), **own)
        self.queued_requests = Gauge("queued_requests", "Requests that are not ended.", **own)
        self.queued_rows = Gauge("queued_rows", "Rows that wait to be computed.", **own)
        self.queued_bytes = Gauge("queued_bytes", "Bytes that the requests need, by the formula.", **own)
        self.held_bytes = Gauge("held_bytes", "Bytes that the account of memory holds.", **own)
        self.most_bytes = Gauge("most_bytes", "Bytes that the account of memory may hold.", **own)
