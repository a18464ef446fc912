"""Load `ecar serve` with a real process and real connections, all on one machine (the client takes its share of it):

- throughput of six clients that ask for ten images each, against the offline batch sampler, in turns;
- sixteen clients of one image each against one client: what batching gives;
- seconds to the first preview against seconds to the image;
- requests at four times what the server can do: statuses, latencies, memory.

python scripts/load_serving.py --out docs/results/serving.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from results import write_result


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


def resident(pid: int) -> float:
    """MiB of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def offline(model: str, images: int) -> float:
    """Images per second of the batch sampler (batches of 64), in a process of its own, after a warm-up."""
    code = (
        "import sys, time; from ecar import Pipeline\n"
        "pipe, n = Pipeline.from_pretrained(sys.argv[1]), int(sys.argv[2])\n"
        "pipe([i % 10 for i in range(64)]); start = time.perf_counter()\n"
        "pipe([i % 10 for i in range(n)]); print(n / (time.perf_counter() - start))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, model, str(images)], capture_output=True, text=True, check=True
    )
    return float(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--rounds", type=int, default=2, help="of offline and served throughput, in turns")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each closed loop")
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    alone, served = [], []
    for _ in range(args.rounds):
        alone.append(offline(args.model, 64 * max(1, round(args.seconds))))
        with server(args.model) as (address, _):
            closed_loop(address, 6, 10, 1.0)  # warm
            served.append(closed_loop(address, 6, 10, args.seconds))
    with server(args.model) as (address, pid):
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
        "command": "python scripts/load_serving.py", "model": args.model, "cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "offline_images_per_second": [round(rate, 2) for rate in alone],
        "served": served,
        "served_share_of_offline": round(rate / statistics.median(alone), 3),
        "one_client": [one for one, _ in pairs],
        "sixteen_clients": [sixteen for _, sixteen in pairs],
        "batching_gain": sorted(round(b["images_per_second"] / a["images_per_second"], 2) for a, b in pairs),
        "previews": previews,
        "overload": flood,
    }  # fmt: skip
    write_result(record, args.out)


if __name__ == "__main__":
    main()
