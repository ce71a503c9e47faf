"""Counters for Prometheus: requests by status, and how busy each model is."""

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from nanochat.serving.models import Models

KNOWN_PATHS = ("/v1/", "/act", "/detect", "/attention", "/simulator", "/metrics", "/health")


class Metrics:
    """count: of the guard, for each request."""

    def __init__(self, models: Models):
        self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter("nanochat_requests", "Requests", ["path", "status"], registry=self.registry)
        self.seconds = prometheus.Histogram(
            "nanochat_request_seconds",
            "Seconds from the request to the end of its answer",
            ["path"],
            registry=self.registry,
        )
        self.models = models
        self.registry.register(self)

    def count(self, path: str, status: int, seconds: float) -> None:
        # any path can be asked for: those that are not there must not fill the memory
        path = path if status not in (404, 405) and path.startswith(KNOWN_PATHS) else "other"
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def collect(self):
        gauges = {
            "nanochat_running": ("Answers in the making", lambda batcher: len(batcher.running)),
            "nanochat_queued": ("Requests that wait", lambda batcher: batcher.queued),
            "nanochat_pictures_bytes": ("Bytes of pictures' vectors that are kept", lambda batcher: batcher.seen.bytes),
            "nanochat_prefixes_bytes": (
                "Bytes of keys and values that are kept",
                lambda batcher: batcher.engine.prefixes.bytes,
            ),
        }
        counters = {
            "nanochat_pictures_known": ("Pictures that were looked at before", lambda batcher: batcher.seen.hits),
            "nanochat_pictures_new": ("Pictures that were encoded", lambda batcher: batcher.seen.misses),
            "nanochat_prompt_tokens": ("Tokens of prompts", lambda batcher: batcher.prompt_tokens),
            "nanochat_cached_tokens": ("Tokens of prompts that were known", lambda batcher: batcher.cached_tokens),
            "nanochat_new_tokens": ("Tokens of answers", lambda batcher: batcher.new_tokens),
        }
        for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in table.items():
                family = kind(name, text, labels=["model"])
                for served in self.models.served.values():
                    family.add_metric([served.name], value(served.batcher))
                yield family

    def text(self) -> bytes:
        return prometheus.generate_latest(self.registry)
