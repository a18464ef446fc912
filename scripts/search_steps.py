"""Classifier accuracy and FD-classifier of a Fashion-MNIST model over steps, guidance and solver: one JSON line each.

    python scripts/search_steps.py --data data/fashion --out steps.jsonl --settings 4,2 8,4 16,8 8,4:2 8,4:1:heun

A setting is STEPS[:GUIDANCE[:SOLVER]]. Few samples: good for choosing, not for reporting (see score_fashion.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from score_fashion import Extractor, accuracy, frechet, load_classifier, read, sample

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
    classifier = load_classifier(args.classifier)
    test, _ = read(args.data, "test")
    pipe = Pipeline.from_pretrained(args.model)
    for setting in list[str](args.settings):
        steps, guidance, solver = [*setting.split(":"), *["1", "euler"][setting.count(":") :]]
        counts = tuple(int(s) for s in steps.split(","))
        images, labels, seconds = sample(pipe, args.num, float(guidance), counts, solver)
        distance = frechet(Extractor("classifier", classifier), test, {"x": images})["x"]
        record = {
            "steps": steps,
            "guidance": float(guidance),
            "solver": solver,
            "num": args.num,
            "classifier_accuracy": round(accuracy(classifier, images, labels)[0], 4),
            f"FD-classifier at N={args.num} against {len(test)} test images": distance,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(record), flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
