"""Clients that know nothing of ecar against `ecar serve`: LiteLLM and OpenAI's Node SDK.

Each in an environment of its own under --environments, made with pip and npm where it is missing. (The official Python
package and curl are in the test suite.) What was run and what came back is recorded.

python benchmarks/serving_clients.py --environments /tmp/clients --out results/serving/clients.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from common import write_result
from serving_load import server

LITELLM = """
import base64, json, os, sys, importlib.metadata as m
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no look-up on the network
import litellm
common = dict(model="openai/fashion", api_base=sys.argv[1], api_key="any")
answer = litellm.image_generation(prompt="Bag", n=2, **common)
kinds = [base64.b64decode(d["b64_json"])[1:4].decode() for d in answer.data]
try:
    litellm.image_generation(prompt="horse", **common)
    refused = None
except litellm.BadRequestError as error:
    refused = type(error).__name__
print(json.dumps({"version": m.version("litellm"), "images": kinds, "unknown_class_raises": refused}))
"""
NODE = """
const OpenAI = require("openai");
const client = new OpenAI({ baseURL: process.argv[1], apiKey: "any" });
(async () => {
  const models = (await client.models.list()).data.map((m) => m.id);
  const answer = await client.images.generate({ prompt: "Bag", n: 2, seed: 7 });
  const images = answer.data.map((d) => Buffer.from(d.b64_json, "base64").toString("latin1", 1, 4));
  const events = [];
  for await (const event of await client.images.generate({ prompt: "Bag", stream: true, partial_images: 3 }))
    events.push(event.type);
  let refused = null;
  try {
    await client.images.generate({ prompt: "horse" });
  } catch (error) {
    refused = { raised: error.constructor.name, status: error.status, code: error.code, param: error.param,
                request_id: typeof error.requestID };
  }
  const version = JSON.parse(require("fs").readFileSync("node_modules/openai/package.json")).version;
  console.log(JSON.stringify({ version, node: process.version, models, images, events, unknown_class: refused }));
})();
"""


def python_with(folder: Path, *packages: str) -> str:
    """The interpreter of an environment that has the packages."""
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(interpreter)


def node_with(folder: Path, package: str) -> Path:
    """The folder, with the package in it."""
    if not (folder / "node_modules" / package).exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--prefix", folder, package], check=True)
    return folder


def run(name: str, command: list[str], folder: Path | None = None) -> dict[str, Any]:
    """What the client printed last, as JSON."""
    print(name, flush=True)
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder for the clients' own environments")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    litellm = python_with(args.environments / "litellm", "litellm")
    node = node_with(args.environments / "node", "openai")
    with server("fashion") as (address, _):
        api = f"http://{address}/v1"
        record = {
            "command": "python benchmarks/serving_clients.py --environments DIR",
            "server": "ecar serve fashion",
            "python": sys.version.split()[0],
            "litellm": run("litellm", [litellm, "-c", LITELLM, api]),
            "openai-node": run("openai-node", ["node", "-e", NODE, api], node),
        }
    write_result(record, args.out)


if __name__ == "__main__":
    main()
