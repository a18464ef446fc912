"""The same app as replicas of Ray Serve, on one machine or many:

serve run ecar.cli.ray_app:build model=fashion replicas=2

Our engine batches inside each replica; Ray starts replicas, shares requests out, and replaces what died.
"""

from __future__ import annotations

import sys
from typing import Any

from ray import serve

from ecar.serving.config import KEYS_VARIABLE, Limits, check_origins, read_keys, served_name

ARGUMENTS = {"model", "device", "dtype", "threads", "replicas", "gpus", "cpus", "cors_origin"}


@serve.ingress()
class Replica:
    """One engine and its app.

    Args:
        model: bundled name, folder or Hub id.
        device, dtype, threads: as of ``ecar serve``.
        keys: API keys; empty: none is asked for.
        origins: of pages that may use it.
    """

    def __init__(
        self, model: str, device: str, dtype: str, threads: int, keys: list[str], origins: tuple[str, ...]
    ) -> None:
        import torch

        from ecar.cli.options import torch_dtype, usable_dtype
        from ecar.sampling.pipeline import Pipeline
        from ecar.serving.engine import Engine, own_critic
        from ecar.serving.metrics import Metrics

        if threads:
            torch.set_num_threads(threads)
        self.name, self.keys, self.origins = served_name(model), keys, origins
        number = torch_dtype(usable_dtype(dtype, device))
        self.engine = Engine(
            lambda: Pipeline.from_pretrained(model, device=device, dtype=number), Limits(), Metrics(),
            lambda: own_critic(model),
        )  # fmt: skip
        self.engine.start()

    def __serve_build_asgi_app__(self) -> Any:
        from ecar.serving.app import create_app

        # Ray sets x-request-id itself; two would be joined into one.
        return create_app(self.engine, self.name, keys=self.keys, request_ids=False, cors_origins=self.origins)

    def check_health(self) -> None:
        """Ray asks; RuntimeError makes it replace this replica."""
        if self.engine.state == "failed":
            raise RuntimeError("the engine failed too often")


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application for ``serve run`` or a Serve config file. API keys are those in ``ECAR_API_KEYS`` here, where it
    is built: Ray does not hand the environment on to replicas.

    Args:
        arguments: model, device, dtype, threads as of ``ecar serve``; replicas (a number, or least-most: Ray then
            follows the load); gpus and cpus of each replica; cors_origin (commas between).

    Raises:
        ValueError: an unknown argument, or a value that is none.
    """
    from ecar.cli.options import check_dtype

    unknown = sorted(set(arguments) - ARGUMENTS)
    if unknown:
        raise ValueError(f"unknown arguments {', '.join(unknown)}; choose from {', '.join(sorted(ARGUMENTS))}")
    arguments = {name: str(value) for name, value in arguments.items()}  # a config file has numbers
    dtype = arguments.get("dtype", "fp32")
    check_dtype(dtype)
    limits = Limits()
    least, _, most = arguments.get("replicas", "1").partition("-")
    if not least.isdigit() or not (most or "1").isdigit() or not 1 <= int(least) <= int(most or least):
        raise ValueError(f"replicas must be a number, at least 1, or two as in 1-4; got {arguments['replicas']!r}")
    origins = arguments.get("cors_origin")
    allowed = check_origins(origins.split(","), "cors_origin") if origins is not None else ()
    keys = read_keys(None)
    if not keys:
        print(f"{KEYS_VARIABLE} is empty: whoever reaches the server may use it", file=sys.stderr)
    options: dict[str, Any] = {
        # Above what the engine takes, so that its own 429 answers, in the envelope, and not Ray's.
        "max_ongoing_requests": 2 * (limits.max_queue + 2 * limits.max_batch),
        "ray_actor_options": {
            "num_gpus": float(arguments.get("gpus", 0)), "num_cpus": float(arguments.get("cpus", 1)),
        },
    }  # fmt: skip
    if most:
        options["autoscaling_config"] = {
            "min_replicas": int(least), "max_replicas": int(most), "target_ongoing_requests": limits.max_batch,
        }  # fmt: skip
    else:
        options["num_replicas"] = int(least)
    deployment = serve.deployment(name="ecar", **options)(Replica)
    return deployment.bind(
        arguments.get("model", "butterflies"),
        arguments.get("device", "auto"),
        dtype,
        int(arguments.get("threads", 0)),
        keys,
        allowed,
    )
