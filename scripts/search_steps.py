"""Classifier accuracy and FD-classifier of a Fashion-MNIST model over steps, guidance and solver: one JSON line each.

    python scripts/search_steps.py --data data/fashion --out steps.jsonl --settings 4,2 8,4 16,8 8,4:2 8,4:1:heun

A setting is STEPS[:GUIDANCE[:SOLVER]]. Few samples: good for choosing, not for reporting (see score_fashion.py).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from score_fashion import Classifier, Extractor, accuracy, frechet, read

from ecar import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--classifier", type=Path, default=Path("classifier.safetensors"), help="of score_fashion.py")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    classifier = Classifier()
    classifier.load_state_dict(load_file(args.classifier))
    classifier.eval()
    test, _ = read(args.data, "test")
    pipe = Pipeline.from_pretrained(args.model)
    labels = [i % 10 for i in range(args.num)]
    for setting in args.settings:
        steps, guidance, solver = [*setting.split(":"), *["1", "euler"][setting.count(":") :]]
        start = time.perf_counter()
        output = pipe(
            labels,
            steps=tuple(int(s) for s in steps.split(",")),
            guidance=float(guidance),
            solver=solver,
            batch_size=100,
        )
        seconds = time.perf_counter() - start
        images = torch.from_numpy(np.stack([np.asarray(i) for i in output.images])).permute(0, 3, 1, 2).contiguous()
        distance = frechet(Extractor("classifier", classifier), test, {"x": images})["x"]
        record = {
            "steps": steps,
            "guidance": float(guidance),
            "solver": solver,
            "num": args.num,
            "classifier_accuracy": round(accuracy(classifier, images, torch.tensor(labels))[0], 4),
            f"FD-classifier at N={args.num} against {len(test)} test images": distance,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(record), flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
