"""What edits cost a server of many clients: generations alone against generations mixed with edits, in turns, with one
process of `ecar serve` and one image a request. Half of the clients edit in the mix: one half of these fill a mask, the
other vary the whole picture.

Edits share batches with generations, so the question is what an image of the mix costs. It is answered in images per
second and in FLOPs: ``gflop`` is of one image by itself, and ``gflops_per_second`` what the server did of it.

    python benchmarks/serving_mixed.py --model butterflies --seconds 20 --rounds 3 --out mixed.json

The client runs on the same machine and takes its share. Prints one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import statistics
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common import machine, write_result
from ecar import Pipeline
from ecar.cost.flops import flops_of
from ecar.pretrained.folders import weights_fingerprint
from serving_load import Client, quantiles, samples, server

KINDS = ("generation", "fill", "vary")
STRENGTH = 0.5  # of a variation, which is the server's default


def picture_and_mask(side: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """A smooth random picture of ``side`` (height, width), and a mask whose transparent left half is drawn."""
    height, width = side
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    mask = Image.new("RGBA", (width, height), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, width // 2, height))
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), mask


def form(fields: dict[str, str], files: dict[str, bytes]) -> tuple[bytes, str]:
    """A multipart body and its content type."""
    boundary = uuid.uuid4().hex
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts += [
        f'name="{name}"; filename="{name}.png"\r\nContent-Type: image/png\r\n\r\n'.encode() + data
        for name, data in files.items()
    ]
    begin = f"--{boundary}\r\nContent-Disposition: form-data; ".encode()
    body = b"".join(begin + part + b"\r\n" for part in parts) + f"--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def png(image: Image.Image) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Editor(Client):
    """A client that edits one picture again and again."""

    def __init__(self, address: str, kind: str, side: tuple[int, int]) -> None:
        super().__init__(address)
        picture, mask = picture_and_mask(side)
        self.files = {"image": png(picture), **({"mask": png(mask)} if kind == "fill" else {})}

    def ask(self, n: int, seed: int, **more: object) -> tuple[int, float]:
        """Status and seconds of an edit with ``n`` results."""
        fields = {"prompt": str(seed % 10), "n": str(n), "seed": str(seed), **{k: str(v) for k, v in more.items()}}
        start = time.perf_counter()
        body, kind = form(fields, self.files)
        self.connection.request("POST", "/v1/images/edits", body, {"Content-Type": kind})
        answer: http.client.HTTPResponse = self.connection.getresponse()
        answer.read()
        return answer.status, time.perf_counter() - start


def loop(address: str, kinds: list[str], side: tuple[int, int], seconds: float) -> dict[str, Any]:
    """One client for each of ``kinds``, which asks again as soon as it is answered."""
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    before, start = batches(address), time.perf_counter()

    def work(number: int, kind: str) -> None:
        client = Client(address) if kind == "generation" else Editor(address, kind, side)
        seed = number * 1_000_000
        while time.perf_counter() < start + seconds:
            status, took = client.ask(1, seed)
            assert status == 200, (kind, status)
            times[kind].append(took)
            seed += 1

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed, after = time.perf_counter() - start, batches(address)
    return {
        "images": {kind: len(found) for kind, found in times.items()},
        "images_per_second": round(sum(map(len, times.values())) / passed, 2),
        "rows_per_batch": round((after[0] - before[0]) / max(1.0, after[1] - before[1]), 2),
        "seconds": {kind: quantiles(found) for kind, found in times.items() if found},
    }


def batches(address: str) -> tuple[float, float]:
    """Rows in all batches so far, and batches."""
    rows, count = (sum(samples(address, f"ecar_batch_size_{part}").values()) for part in ("sum", "count"))
    return rows, count


def cost(pipe: Pipeline) -> dict[str, float]:
    """GFLOP of one image of each kind by itself, with encoder and decoder."""
    side = pipe.model.config.image_side
    assert side is not None
    picture, mask = picture_and_mask(side)
    calls = {
        "generation": lambda: pipe([0], seeds=[0]),
        "fill": lambda: pipe.edit(picture, mask=mask, label=0),
        "vary": lambda: pipe.vary(picture, label=0, strength=STRENGTH),
    }
    return {kind: round(flops_of(call) / 1e9, 4) for kind, call in calls.items()}


def paid(run: dict[str, Any], gflop: dict[str, float]) -> dict[str, Any]:
    """The same run, with FLOPs: mean of an image, and those of a second."""
    images = sum(run["images"].values())
    mean = sum(gflop[kind] * count for kind, count in run["images"].items()) / max(1, images)
    rate = round(mean * run["images_per_second"], 2)
    return {**run, "gflop_per_image": round(mean, 4), "gflops_per_second": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="butterflies")
    parser.add_argument("--clients", type=int, default=16, help="4 at least")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each closed loop")
    parser.add_argument("--rounds", type=int, default=3, help="of both sides, in turns")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.clients < 4:
        parser.error("--clients must be at least 4: two that generate, and one for each kind of edit")
    pipe = Pipeline.from_pretrained(args.model, device="cpu")
    gflop, side = cost(pipe), pipe.model.config.image_side
    assert side is not None
    edits = args.clients // 2
    sides = {
        "generations": ["generation"] * args.clients,
        "mixed": ["generation"] * (args.clients - edits) + ["fill", "vary"] * (edits // 2) + ["fill"] * (edits % 2),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    load_before = round(os.getloadavg()[0], 2)
    with server(args.model) as (address, _):
        loop(address, sides["mixed"], side, 1.0)  # warm
        for _ in range(args.rounds):
            for name, kinds in sides.items():
                runs[name].append(paid(loop(address, kinds, side, args.seconds), gflop))
                print(name, json.dumps(runs[name][-1]), flush=True)
    pairs = list(zip(runs["mixed"], runs["generations"], strict=True))
    ratios = {
        key: round(statistics.median(mixed[key] / alone[key] for mixed, alone in pairs), 3)
        for key in ("images_per_second", "gflop_per_image", "gflops_per_second")
    }
    record = {
        "command": f"python benchmarks/serving_mixed.py --model {args.model} --clients {args.clients} "
        f"--seconds {args.seconds:g} --rounds {args.rounds}",
        "model": args.model, "weights": weights_fingerprint(args.model), "machine": machine(), "cpus": os.cpu_count(),
        "load_before": load_before, "gflop": gflop, **runs, "mixed_over_generations": ratios,
    }  # fmt: skip
    write_result(record, args.out)


if __name__ == "__main__":
    main()
