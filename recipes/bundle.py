"""Make the folder of a model to publish: half-precision weights, a better decoder, default sampling settings.

    python recipes/bundle.py --model runs/away --decoder runs/sharp --steps 5 3 --out runs/fashion
    python recipes/bundle.py --tokenizer runs/tokenizer --out src/ecar/bundled/tokenizers/photographs

What is left out stays as the model has it. A folder under src/ecar/bundled is a model of the package.
Model and tokenizer are rounded to float16 first, so that what is stored is exactly what is loaded; the model is told
the fingerprint of the rounded tokenizer, whose latents differ from those it was trained on by about 1e-3.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ecar import Pipeline
from ecar.hub import training_record
from ecar.pretrained.build import build_model
from ecar.pretrained.folders import load_model, save_model
from ecar.tokenizers import load_decoder, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path)
    what.add_argument("--tokenizer", type=Path, help="a tokenizer alone, rounded before latents are made with it")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--guidance", type=float, nargs="+")
    parser.add_argument("--guidance-from", type=float, nargs="+")
    parser.add_argument("--solver")
    parser.add_argument("--decoder", type=Path, help="a tokenizer of the same latents, whose decoder is better")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.tokenizer:
        load_tokenizer(args.tokenizer).half().float().save(args.out, torch.float16)
    else:
        bundle_model(args)
    size = sum(p.stat().st_size for p in args.out.rglob("*.safetensors"))
    print(f"{args.out}: {size / 2**20:.2f} MiB of weights")


def bundle_model(args: argparse.Namespace) -> None:
    """The folder of a model, as the options ask for."""
    model, tokenizer = load_model(args.model)
    sampling = Pipeline(model, tokenizer).settings(
        args.steps, args.guidance, args.solver, guidance_from=args.guidance_from
    )
    images = torch.rand(64, 3, *model.config.image_side) * 2 - 1
    before = tokenizer.encode(images)
    if args.decoder:
        tokenizer = load_decoder(args.decoder, tokenizer)
    tokenizer.half().float()
    print("latents moved by", (tokenizer.encode(images) - before).abs().max().item())
    bundled = build_model(model.config.replace(tokenizer=tokenizer.fingerprint(), sampling=sampling))
    bundled.load_state_dict(model.half().float().state_dict())
    folder = args.out
    save_model(folder, bundled, tokenizer, torch.float16)
    (folder / "training.json").write_text(json.dumps(training_record(args.model), indent=2) + "\n")


if __name__ == "__main__":
    main()
