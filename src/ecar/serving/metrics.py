"""Prometheus metrics. A registry per server: tests and replicas make several in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Everything that the server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.queue_depth = Gauge("ecar_queue_depth", "Images that wait for their first stage", registry=r)
        self.in_progress = Gauge("ecar_images_in_progress", "Images between their first and last stage", registry=r)
        self.ready = Gauge("ecar_ready", "1 while requests are accepted", registry=r)
        self.memory = Gauge("ecar_device_memory_bytes", "Memory of the accelerator in use; 0 on CPU", registry=r)
        self.images = Counter("ecar_images", "Images finished", registry=r)
        self.previews = Counter("ecar_previews", "Previews decoded", registry=r)
        self.dropped = Counter("ecar_images_dropped", "Images not finished", ["reason"], registry=r)
        self.rejected = Counter("ecar_requests_rejected", "Requests refused", ["reason"], registry=r)
        self.restarts = Counter("ecar_engine_restarts", "Restarts of the engine after a crash", registry=r)
        self.not_finite = Counter("ecar_images_not_finite", "Images that became NaN or infinite", registry=r)
        self.batch_size = Histogram("ecar_batch_size", "Images of a batch", ["stage"], buckets=_ROWS, registry=r)
        self.stage_seconds = Histogram("ecar_stage_seconds", "Time of a batch", ["stage"], buckets=_SECONDS, registry=r)
        self.wait = Histogram("ecar_queue_wait_seconds", "Arrival to first stage", buckets=_SECONDS, registry=r)
        self.first_preview = Histogram(
            "ecar_first_preview_seconds", "Arrival to first preview", buckets=_SECONDS, registry=r
        )
        self.image_seconds = Histogram("ecar_image_seconds", "Arrival to finished image", buckets=_SECONDS, registry=r)
        self.responses = Counter("ecar_http_responses", "Answers", ["status"], registry=r)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
