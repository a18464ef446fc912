"""Convert Fashion-MNIST (idx files) to the parquet files that the README's training commands read.

    python recipes/fashion_mnist.py --out data/fashion            # from the Debian package dataset-fashion-mnist
    python recipes/fashion_mnist.py --idx FOLDER --out data/fashion

Images are padded from 28x28 to 32x32 with black. The four idx files (MIT licence, Zalando Research) may also be
downloaded from the data set's own page. Columns: image (PNG bytes), label (ClassLabel with names).
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

NAMES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_idx(path: Path) -> np.ndarray:
    """An unsigned-byte idx file (gzipped) as an array."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def to_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idx", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = np.pad(read_idx(args.idx / f"{prefix}-images-idx3-ubyte.gz"), ((0, 0), (2, 2), (2, 2)))
        labels = read_idx(args.idx / f"{prefix}-labels-idx1-ubyte.gz")
        rows = {"image": [{"bytes": to_png(image), "path": None} for image in images], "label": labels.tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(str(args.out / f"{split}.parquet"))
        print(f"{args.out / f'{split}.parquet'}: {len(labels)} images")


if __name__ == "__main__":
    main()
