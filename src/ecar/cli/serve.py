"""``ecar serve``: the OpenAI Images API and a web page for a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from ecar.cli.options import check_dtype, parse, torch_dtype, usable_dtype
from ecar.serving.config import Limits, check_origins, check_public_url

KEYS_VARIABLE = "ECAR_API_KEYS"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve a model: OpenAI's Images API under /v1, a web page at /. Keys: --keys-file, or the environment variable
    ECAR_API_KEYS (commas between)."""

    model: Annotated[str, tyro.conf.Positional] = "fashion"
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
    public_url: str | None = None
    """Address under which clients reach the server, for the urls of --url-ttl behind a proxy; default: the host that a
    request names."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, mps."""
    dtype: str = "fp32"
    """fp32 or bf16."""
    compile: bool = False
    """Compile the model for every batch size before the server is ready (a minute or more; on CPU it needs g++): then
    faster. Batches are filled up to 1, 2, 4, 8, 12, 16, 24, 32, ... rows."""
    cuda_graphs: bool = False
    """Record the head's passes as CUDA graphs and replay them: for few images on a GPU."""
    decoder: str | None = None
    """Another decoder: one trained by ecar tokenizer --freeze-encoder; or, of an AutoencoderKL, folder or Hub id of a
    tiny one (diffusers' AutoencoderTiny, such as TAESD)."""
    adapter: str | None = None
    """Folder of a LoRA adapter of MODEL (ecar train --lora-rank)."""
    critic: str | None = None
    """Critic of the model, for requests with candidates; default: critic.safetensors in its folder."""
    threads: int = 0
    """CPU threads of the engine; 0 leaves the choice to torch."""
    limits: Limits = field(default_factory=Limits)
    """What is accepted, and how it is batched."""


def run(arguments: Sequence[str]) -> None:
    """Check everything, load the model, listen, serve until SIGTERM or SIGINT."""
    options = parse(ServeOptions, arguments, "serve")
    check_dtype(options.dtype)
    if not 0 <= options.port <= 65535 or options.threads < 0:
        raise ValueError(f"--port must be in 0..65535 and --threads at least 0, got {options.port}, {options.threads}")
    options.limits.check()
    origins = check_origins(options.cors_origin, "--cors-origin")
    public_url = None if options.public_url is None else check_public_url(options.public_url)
    if public_url and not options.limits.url_ttl:
        raise ValueError("--public-url: no urls are told without --url-ttl SECONDS; give both or none")
    keys = read_keys(options.keys_file)
    if not keys and options.host not in _LOOPBACK and not options.no_auth:
        raise ValueError(f"--host {options.host} lets others in: give --keys-file or {KEYS_VARIABLE}, or --no-auth")

    import torch

    from ecar.sampling.pipeline import Pipeline
    from ecar.serving.app import create_app
    from ecar.serving.engine import Engine
    from ecar.serving.metrics import Metrics
    from ecar.serving.server import bind, serve

    if options.threads:
        torch.set_num_threads(options.threads)

    options = replace(options, dtype=usable_dtype(options.dtype, options.device))

    def load() -> Pipeline:
        pipe = Pipeline.from_pretrained(
            options.model, device=options.device, dtype=torch_dtype(options.dtype), compile=options.compile,
            cuda_graphs=options.cuda_graphs, adapter=options.adapter, decoder=options.decoder, critic=options.critic,
        )  # fmt: skip
        if options.critic is not None:
            _ = pipe.critic  # read now: a wrong file ends the process
        return pipe

    bound = bind(options.host, options.port)
    engine = Engine(load, options.limits, Metrics())
    engine.start()  # a wrong MODEL ends the process here
    name = options.name or served_name(options.model)
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"ecar: {name} at http://{shown}:{port} (API: /v1){', keys asked for' if keys else ''}", flush=True)
    app = create_app(engine, name, keys=keys, cors_origins=origins, public_url=public_url)
    serve(app, engine, bound)


def served_name(model: str) -> str:
    """A bundled name or Hub id as it is; of a folder, its own name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def read_keys(file: str | None) -> list[str]:
    """API keys of the file and the environment.

    Raises:
        ValueError: the file cannot be read or holds no key.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = [line.strip() for line in Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--keys-file {file}: cannot be read ({type(error).__name__})") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"--keys-file {file}: no key in it")
        keys += found
    return keys
