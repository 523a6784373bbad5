"""Asks a Triton server about image files: python client.py IMAGE... [--url localhost:8000].

Needs numpy, Pillow and tritonclient[http]; model.json of the bundle says how images are prepared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent


def prepare(path: str, spec: dict[str, Any]) -> np.ndarray:
    """One image as (3, height, width) float32: shorter side, centre crop, normalised."""
    image = Image.open(path).convert("RGB")
    short, long = sorted(image.size)
    longer = int(spec["resize"] * long / short)
    size = (spec["resize"], longer) if image.width <= image.height else (longer, spec["resize"])
    if size != image.size:
        image = image.resize(size, Image.Resampling[spec["interpolation"].upper()])
    height, width = spec["crop"]
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32) / np.float32(255)
    mean, std = np.float32(spec["mean"]), np.float32(spec["std"])
    return ((pixels - mean) / std).transpose(2, 0, 1)


def main() -> None:
    """Print the best classes of every image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()
    from tritonclient import http

    model = json.loads((HERE / "model/model.json").read_text(encoding="utf-8"))
    settings = dict(
        line.split("=", 1) for line in (HERE / "bundle.env").read_text().splitlines() if "=" in line
    )
    batch = np.stack([prepare(path, model["preprocessing"]) for path in options.images])
    client = http.InferenceServerClient(options.url)
    tensor = http.InferInput(settings["INPUT"], list(batch.shape), "FP32")
    tensor.set_data_from_numpy(batch)
    # "value:index:label" of the best classes: the server reads the names from labels.txt.
    wanted = http.InferRequestedOutput("logits", class_count=options.top)
    answer = client.infer(settings["MODEL"], [tensor], outputs=[wanted]).as_numpy("logits")
    for path, classes in zip(options.images, answer, strict=True):
        print(path)
        for entry in classes:
            value, index, *label = entry.decode().split(":", 2)
            print(f"  {float(value):8.3f}  {label[0] if label else index}")


if __name__ == "__main__":
    main()
