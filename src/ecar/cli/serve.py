"""``ecar serve``: the OpenAI Images API and a web page for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ecar.cli.flags import AdaptedModelFlags, ModelOrDefault
from ecar.cli.options import parse
from ecar.serving.config import KEYS_VARIABLE, Limits, check_origins, read_keys, served_name

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve a model: OpenAI's Images API under /v1, a web page at /. Keys: --keys-file, or the environment variable
    ECAR_API_KEYS (commas between)."""

    model: ModelOrDefault = "butterflies"
    """Bundled name, folder or Hub id."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one, and then keys (or --no-auth) are asked for."""
    port: int = 8000
    """Port; 0 takes a free one."""
    name: str | None = None
    """Name of the model in the API; default: the last part of MODEL."""
    keys_file: str | None = None
    """File of API keys, one a line; blank lines and lines that begin with # are skipped."""
    no_auth: bool = False
    """Serve other machines without keys."""
    cors_origin: tuple[str, ...] = ()
    """Origins of other sites' pages that may use the server from a browser, such as https://app.example.com; * is every
    page."""
    critic: str | None = None
    """Critic of the model, for requests with candidates; default: critic.safetensors in its folder."""
    threads: int = 0
    """CPU threads of the engine; 0 leaves the choice to torch."""
    compute: AdaptedModelFlags = field(default_factory=AdaptedModelFlags)
    """How the model is computed. Compiled for every batch size before the server is ready: batches are filled up to 1,
    2, 4, 8, 12, 16, 24, 32, ... rows."""
    limits: Limits = field(default_factory=Limits)
    """What is accepted, and how it is batched."""


OPTIONS = ServeOptions


def run(arguments: Sequence[str]) -> None:
    """Check everything, load the model, listen, serve until SIGTERM or SIGINT."""
    options = parse(ServeOptions, arguments, "serve")
    if not 0 <= options.port <= 65535 or options.threads < 0:
        raise ValueError(f"--port must be in 0..65535 and --threads at least 0, got {options.port}, {options.threads}")
    origins = check_origins(options.cors_origin, "--cors-origin")
    keys = read_keys(options.keys_file)
    if not keys and options.host not in _LOOPBACK and not options.no_auth:
        raise ValueError(f"--host {options.host} lets others in: give --keys-file or {KEYS_VARIABLE}, or --no-auth")

    import torch

    from ecar.refine import critic_of
    from ecar.serving.app import create_app
    from ecar.serving.engine import Engine, own_critic
    from ecar.serving.metrics import Metrics
    from ecar.serving.server import bind, serve

    if options.threads:
        torch.set_num_threads(options.threads)
    model, compute, critic = options.model, options.compute.usable(), options.critic
    adapted = compute.adapter is not None
    if critic is not None and adapted:
        raise ValueError(f"--critic {critic} knows the samples of {model}, not those with --adapter")
    bound, name = bind(options.host, options.port), options.name or served_name(model)
    chooser = None if adapted else (lambda: own_critic(model) if critic is None else critic_of(model, critic))
    engine = Engine(lambda: compute.load(model), options.limits, Metrics(), chooser)
    engine.start()  # a wrong model ends the process here
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"ecar: {name} at http://{shown}:{port} (API: /v1){', keys asked for' if keys else ''}", flush=True)
    serve(create_app(engine, name, keys=keys, cors_origins=origins), engine, bound)
