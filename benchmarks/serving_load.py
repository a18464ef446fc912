"""Load `ecar serve` with a real process and real connections, all on one machine (the client takes its share of it):

- throughput of six clients that ask for ten images each, against the offline batch sampler, in turns;
- sixteen clients of one image each against one client: what batching gives;
- seconds to the first preview against seconds to the image;
- requests at four times what the server can do: statuses, latencies, memory;
- clients that vanish in mid-stream: stages computed for them in vain, the pixels of those that stay, and with
  ``--soak-seconds`` the server's memory while clients come and vanish at random.

python benchmarks/serving_load.py --out results/serving/float32.json
python benchmarks/serving_load.py --dtype bf16 --compile --out results/serving/bfloat16_compiled.json
python benchmarks/serving_load.py --only vanishing --soak-seconds 600 --out vanishing.json
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from common import machine, write_result

LONG = {"num_inference_steps": [64, 64]}  # long stages: there is time to vanish in the first


class Client:
    """A connection that is kept."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.connection = http.client.HTTPConnection(address, timeout=300)

    def post(self, **body: object) -> http.client.HTTPResponse:
        """The answer's head; its body is still to be read."""
        self.connection.request(
            "POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"}
        )
        return self.connection.getresponse()

    def ask(self, n: int, seed: int, **more: object) -> tuple[int, float]:
        """Status and seconds of a request for ``n`` images."""
        start = time.perf_counter()
        answer = self.post(prompt=str(seed % 10), n=n, seed=seed, **more)
        answer.read()
        return answer.status, time.perf_counter() - start

    def stream(self, seed: int, previews: int) -> tuple[float, float]:
        """Seconds to the first preview and to the image."""
        start, first = time.perf_counter(), None
        answer = self.post(prompt=str(seed % 10), seed=seed, stream=True, partial_images=previews)
        while line := answer.readline():
            if first is None and b"partial_image" in line:
                first = time.perf_counter() - start
        assert first is not None
        return first, time.perf_counter() - start


@contextmanager
def server(model: str, *options: object) -> Iterator[tuple[str, int]]:
    """``ecar serve`` at a free port: its address and process id."""
    command = [sys.executable, "-m", "ecar", "serve", model, "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://(\S+)", process.stdout.readline())
        assert found is not None, "the server did not start"
        while get(found[1], "/ready")[0] != 200:
            time.sleep(0.05)
        yield found[1], process.pid
    finally:
        process.terminate()
        process.wait(60)


def get(address: str, path: str) -> tuple[int, str]:
    """Status and text."""
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def closed_loop(address: str, clients: int, n: int, seconds: float) -> dict[str, Any]:
    """Clients that ask again as soon as they are answered: images per second, latencies."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        client, seed = Client(address), number * 1_000_000
        while time.perf_counter() < end:
            status, took = client.ask(n, seed)
            assert status == 200, status
            times.append(took)
            seed += n

    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(times) * n / (time.perf_counter() - start)
    return {"clients": clients, "n": n, "images_per_second": round(rate, 2), **quantiles(times)}


def quantiles(times: list[float]) -> dict[str, Any]:
    """Of seconds."""
    if len(times) < 2:
        return {"requests": len(times)}
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"requests": len(times), "p50": round(cuts[49], 4), "p99": round(cuts[98], 4)}


def overload(address: str, pid: int, rate: float, n: int, seconds: float) -> dict[str, Any]:
    """Requests at fixed times, whether or not earlier ones are answered."""
    statuses: Counter[int] = Counter()
    accepted: list[float] = []
    refused: list[float] = []
    memory: list[float] = []
    idle: list[Client] = []
    broken: list[str] = []

    def ask(seed: int) -> None:
        kept = idle.pop() if idle else None
        client = kept or Client(address)
        try:
            try:
                status, took = client.ask(n, seed)
            except ConnectionError:
                if kept is None:
                    raise
                client = Client(address)  # a server may close a connection that was idle for seconds
                status, took = client.ask(n, seed)
        except OSError as error:
            broken.append(repr(error))
            return
        statuses[status] += 1
        (accepted if status == 200 else refused).append(took)
        idle.append(client)

    threads, start, next_look = [], time.perf_counter(), 0.0
    for number in range(int(rate / n * seconds)):
        due = start + number * n / rate
        while (now := time.perf_counter()) < due:
            time.sleep(min(0.02, due - now))
        if now - start >= next_look:
            memory.append(resident(pid))
            next_look += seconds / 12
        threads.append(threading.Thread(target=ask, args=(number,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    memory.append(resident(pid))
    return {
        "images_per_second_asked": round(rate, 1), "n": n, "seconds": seconds, "statuses": dict(statuses),
        "broken_connections": broken, "accepted": quantiles(accepted), "refused": quantiles(refused),
        "memory_mib": memory,
    }  # fmt: skip


def vanish(address: str, seed: int, n: int, wait: float) -> None:
    """Ask for a stream, and reset the connection ``wait`` seconds after its first byte."""
    host, port = address.split(":")
    body = json.dumps({"prompt": str(seed % 10), "n": n, "seed": seed, "stream": True, **LONG}).encode()
    lines = ("POST /v1/images/generations HTTP/1.1", "Host: x", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}"))
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        # Closing without a farewell, as a process that dies with data unread.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        connection.recv(1000)
        time.sleep(wait)


def samples(address: str, name: str) -> dict[str, float]:
    """The samples of a metric whose lines begin with ``name``, by line."""
    lines = [line.rsplit(" ", 1) for line in get(address, "/metrics")[1].splitlines() if line.startswith(name)]
    return {key: float(value) for key, value in lines}


def settle(address: str) -> None:
    """Wait until nothing is computed and nothing waits."""
    while any(samples(address, name) != {name: 0.0} for name in ("ecar_images_in_progress", "ecar_queue_depth")):
        time.sleep(0.02)


def vanishing(address: str, clients: int) -> dict[str, Any]:
    """Clients vanish one after another, each with one image in the same batches as an image of a client that stays.

    A row is counted in ``ecar_batch_size`` with every stage that it takes part in. The client that stays has one row
    per stage; what is above that was computed for the one that vanished.
    """
    stages = len(samples(address, "ecar_batch_size_sum")) or 1
    extra: list[float] = []
    same, largest = 0, 0
    for number in range(clients):
        seed = 1000 + 2 * number
        alone = pixels(address, seed)
        settle(address)
        before = sum(samples(address, "ecar_batch_size_sum").values())
        wait = 0.05 * random.Random(number).random()
        gone = threading.Thread(target=vanish, args=(address, seed + 1, 1, wait))
        gone.start()
        together = pixels(address, seed)
        gone.join()
        settle(address)
        computed = sum(samples(address, "ecar_batch_size_sum").values()) - before
        extra.append(computed - stages)
        difference = max(abs(a - b) for a, b in zip(alone, together, strict=True))
        same, largest = same + (difference == 0), max(largest, difference)
    return {
        "clients": clients, "stages": stages, "row_stages_computed_for_a_vanished_client": dict(Counter(extra)),
        "mates_with_equal_pixels": same, "largest_difference_of_a_mate": largest,
    }  # fmt: skip


def pixels(address: str, seed: int) -> bytes:
    """The decoded image of a request."""
    answer = Client(address).post(prompt=str(seed % 10), seed=seed, **LONG)
    data = json.loads(answer.read())["data"][0]["b64_json"]
    return Image.open(io.BytesIO(base64.b64decode(data))).tobytes()


def soak(address: str, pid: int, seconds: float, clients: int = 8) -> dict[str, Any]:
    """Clients that come again and again, half of which vanish at a random moment; memory over time."""
    end, counts = time.monotonic() + seconds, Counter[str]()

    def work(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < end:
            if dice.random() < 0.5:
                vanish(address, dice.randrange(10**6), dice.randint(1, 4), 0.3 * dice.random())
                counts["vanished"] += 1
            else:
                counts[str(Client(address).ask(dice.randint(1, 4), dice.randrange(10**6))[0])] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        memory.append(resident(pid))
        time.sleep(seconds / 20)
    settle(address)
    dropped = samples(address, 'ecar_images_dropped_total{reason="cancelled"}')
    return {"seconds": seconds, "requests": dict(counts), "memory_mib": memory, "images_dropped": sum(dropped.values())}


def resident(pid: int) -> float:
    """MiB of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def offline(model: str, images: int, dtype: str, compiled: bool) -> float:
    """Images per second of the batch sampler (batches of 64), in a process of its own, after a warm-up."""
    code = (
        "import sys, time; from ecar import Pipeline; from ecar.cli.options import torch_dtype\n"
        "more = {'dtype': torch_dtype(sys.argv[3]), 'compile': sys.argv[4] == 'True'}\n"
        "pipe, n = Pipeline.from_pretrained(sys.argv[1], **more), int(sys.argv[2])\n"
        "pipe([i % 10 for i in range(64)]); start = time.perf_counter()\n"
        "pipe([i % 10 for i in range(n)]); print(n / (time.perf_counter() - start))"
    )
    command = [sys.executable, "-c", code, model, str(images), dtype, str(compiled)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout)


def scenario_vanishing(args: argparse.Namespace) -> dict[str, Any]:
    """Both scenarios of clients that vanish, with a server of their own."""
    with server(args.model, *serve_options(args)) as (address, pid):
        closed_loop(address, 1, 1, 1.0)
        found: dict[str, Any] = {"vanishing": vanishing(address, args.vanishing_clients)}
        if args.soak_seconds:
            found["soak"] = soak(address, pid, args.soak_seconds)
    return found


def serve_options(args: argparse.Namespace) -> list[str]:
    """Of ``ecar serve``."""
    return ["--dtype", args.dtype, *(["--compile"] if args.compile else [])]


def command_line(args: argparse.Namespace, *more: str) -> str:
    """How to make the record again."""
    given = {
        "rounds": args.rounds, "seconds": args.seconds, "overload-seconds": args.overload_seconds,
        "vanishing-clients": args.vanishing_clients, "soak-seconds": args.soak_seconds,
    }  # fmt: skip
    settings = [f"--model {args.model}", *(f"--{name} {value:g}" for name, value in given.items())]
    return " ".join(["python benchmarks/serving_load.py", *more, *serve_options(args), *settings])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of server and offline sampler")
    parser.add_argument("--compile", action="store_true", help="server and offline sampler")
    parser.add_argument("--rounds", type=int, default=2, help="of offline and served throughput, in turns")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each closed loop")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--only", choices=["vanishing"], help="this scenario alone")
    parser.add_argument("--vanishing-clients", type=int, default=20)
    parser.add_argument("--soak-seconds", type=float, default=0.0, help="clients that come and vanish; 0: none")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.only:
        write_result(
            {"command": command_line(args, "--only", "vanishing"), "model": args.model, **scenario_vanishing(args)},
            args.out,
        )
        return
    load_before = round(os.getloadavg()[0], 2)
    alone, served = [], []
    for _ in range(args.rounds):
        alone.append(offline(args.model, 64 * max(1, round(args.seconds)), args.dtype, args.compile))
        with server(args.model, *serve_options(args)) as (address, _):
            closed_loop(address, 6, 10, 1.0)  # warm
            served.append(closed_loop(address, 6, 10, args.seconds))
    with server(args.model, *serve_options(args)) as (address, pid):
        closed_loop(address, 1, 1, 1.0)
        pairs = [(closed_loop(address, 1, 1, 4.0), closed_loop(address, 16, 1, 4.0)) for _ in range(args.rounds)]
        client = Client(address)
        previews = {}
        for count in (1, 3):
            runs = [client.stream(seed, count) for seed in range(25)][5:]
            first, whole = (statistics.median(column) for column in zip(*runs, strict=True))
            previews[count] = {"first": round(first, 4), "image": round(whole, 4), "share": round(first / whole, 3)}
            print(count, previews[count], flush=True)
        rate = statistics.median(s["images_per_second"] for s in served)
        flood = overload(address, pid, 4 * rate, 10, args.overload_seconds)
        flood["server_after"] = get(address, "/ready")[0]
    record = {
        "command": command_line(args), "model": args.model, "machine": machine(), "cpus": os.cpu_count(),
        "load_before": load_before,
        "offline_images_per_second": [round(rate, 2) for rate in alone],
        "served": served,
        "served_share_of_offline": round(rate / statistics.median(alone), 3),
        "one_client": [one for one, _ in pairs],
        "sixteen_clients": [sixteen for _, sixteen in pairs],
        "batching_gain": sorted(round(b["images_per_second"] / a["images_per_second"], 2) for a, b in pairs),
        "previews": previews,
        "overload": flood,
        **scenario_vanishing(args),
    }  # fmt: skip
    write_result(record, args.out)


if __name__ == "__main__":
    main()
