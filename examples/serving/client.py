"""Asks a Triton server about image files: python client.py IMAGE... [-o DIR] [--url HOST:PORT].

A classifier's best classes are printed. A segmenter's are written, as DIR/NAME.labels.png with the
class of every pixel and DIR/NAME.overlay.png in colours; so is what a detector finds, as
DIR/NAME.detections.png, and what any other model says, as DIR/NAME.npz.

Needs numpy, Pillow and tritonclient[http]; model.json of the bundle says how images are prepared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
Ask = Callable[..., dict[str, np.ndarray]]


def resized(image: Image.Image, spec: dict[str, Any]) -> Image.Image:
    """The shorter side as long as model.json says; or, for detectors, as large as it fits."""
    width, height = image.size
    if spec["fit"] == "pad":
        bounds = spec["resize"] / max(width, height), *np.divide(spec["crop"], (height, width))
        scale = min(bounds)
        size = int(width * scale + 0.5), int(height * scale + 0.5)
    else:
        longer = int(spec["resize"] * max(image.size) / min(image.size))
        size = (spec["resize"], longer) if width <= height else (longer, spec["resize"])
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling[spec["interpolation"].upper()])


def normalised(image: Image.Image, spec: dict[str, Any]) -> np.ndarray:
    """(3, height, width) float32."""
    pixels = np.asarray(image, np.float32) / np.float32(255)
    mean, std = np.float32(spec["mean"]), np.float32(spec["std"])
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def prepare(path: str, spec: dict[str, Any]) -> np.ndarray:
    """The middle of an image, or all of it with zeros behind: (3, height, width) of the model's."""
    image = resized(Image.open(path).convert("RGB"), spec)
    height, width = spec["crop"]
    if spec["fit"] == "pad":
        pixels = normalised(image, spec)
        whole = np.zeros((3, height, width), np.float32)
        whole[:, : image.height, : image.width] = pixels
        return whole
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return normalised(image.crop((left, top, left + width, top + height)), spec)


def linear(old: int, new: int) -> np.ndarray:
    """(new, old) float32: linear interpolation along one axis, the border repeated beyond it."""
    centre = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, None)
    first = np.minimum(np.floor(centre).astype(int), old - 1)
    matrix = np.zeros((new, old))
    matrix[np.arange(new), first] = 1 - (centre - first)
    matrix[np.arange(new), np.minimum(first + 1, old - 1)] += centre - first
    return matrix.astype(np.float32)


def classes_of_pixels(path: str, spec: dict[str, Any], ask: Ask, most: int) -> np.ndarray:
    """The best class (height, width) of every pixel, by the mean logits of sliding windows."""
    image = Image.open(path).convert("RGB")
    pixels = normalised(resized(image, spec), spec)
    sides, window = pixels.shape[1:], spec["crop"]
    tops, lefts = (
        [min(i * step, side - part) for i in range(-(-(side - part) // step) + 1)]
        for side, part, step in zip(sides, window, (2 * part // 3 for part in window), strict=True)
    )
    places = [
        (slice(top, top + window[0]), slice(left, left + window[1]))
        for top in tops
        for left in lefts
    ]
    total, count = np.zeros(0), np.zeros(sides, np.float32)
    for start in range(0, len(places), most):
        some = places[start : start + most]
        windows = np.stack([pixels[:, rows, columns] for rows, columns in some])
        logits = ask(windows, ["logits"])["logits"]
        up, across = (linear(o, n) for o, n in zip(logits.shape[2:], window, strict=True))
        if start == 0:
            total = np.zeros((logits.shape[1], *sides), np.float32)
        for (rows, columns), found in zip(some, logits, strict=True):
            total[:, rows, columns] += up @ found @ across.T
            count[rows, columns] += 1
    up, across = linear(sides[0], image.height), linear(sides[1], image.width).T
    mean = total / count
    # In strips: all classes of a large photograph would take gigabytes.
    strips = [(up[i : i + 64] @ mean @ across).argmax(0) for i in range(0, image.height, 64)]
    return np.concatenate(strips)


def objects(path: str, spec: dict[str, Any], ask: Ask) -> dict[str, np.ndarray]:
    """Boxes in pixels of the image, scores, labels and, of most detectors, masks."""
    image = Image.open(path)
    width, height = resized(image, spec).size
    # No box reaches into the padding: the model is told where the image ends.
    found = ask(prepare(path, spec)[None], sizes=np.array([[height, width]]))
    scale = np.array([image.width / width, image.height / height] * 2)
    return {**found, "boxes": found["boxes"] * scale}


def read_palette() -> tuple[np.ndarray, list[str]]:
    """Colours (classes, 3) and names of palette.txt, a class on each line."""
    lines = (HERE / "palette.txt").read_text(encoding="utf-8").splitlines()
    parts = [line.split(" ", 3) for line in lines]
    return np.array([part[:3] for part in parts], np.uint8), [part[3] for part in parts]


def classify(paths: list[str], spec: dict[str, Any], server: Server) -> None:
    """Print the best classes; the server reads their names from labels.txt."""
    batch = np.stack([prepare(path, spec) for path in paths])
    for path, classes in zip(paths, server.best(batch), strict=True):
        print(path)
        for entry in classes:
            value, index, *label = entry.decode().split(":", 2)
            print(f"  {float(value):8.3f}  {label[0] if label else index}")


def segment(path: str, spec: dict[str, Any], server: Server, output: Path) -> None:
    """Write a label map and an overlay, and print the classes that cover most of the image."""
    colours, names = read_palette()
    labels = classes_of_pixels(path, spec, server.ask, server.most)
    Image.fromarray(labels.astype(np.uint8)).save(output / f"{Path(path).stem}.labels.png")
    painted = Image.fromarray(colours[labels])
    overlay = Image.blend(Image.open(path).convert("RGB"), painted, 0.5)
    overlay.save(output / f"{Path(path).stem}.overlay.png")
    count = np.bincount(labels.ravel())
    print(path)
    for index in np.argsort(-count, kind="stable")[: server.top]:
        if count[index]:
            print(f"  {count[index] / labels.size:8.3f}  {names[index]}")


def detect(path: str, spec: dict[str, Any], server: Server, output: Path) -> None:
    """Draw what was found, masks in whole pixels, and print score, class and box of each."""
    colours, names = read_palette()
    found = objects(path, spec, server.ask)
    image = Image.open(path).convert("RGB")
    canvas = ImageDraw.Draw(image)
    print(path)
    for i in np.flatnonzero(found["scores"] >= server.least):
        box, label = found["boxes"][i], found["labels"][i]
        left, top, right, bottom = (int(part) for part in box.round())
        if "masks" in found and right > left and bottom > top:
            mask = Image.fromarray(found["masks"][i])
            mask = mask.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
            inside = Image.fromarray(np.where(np.asarray(mask) >= 0.5, 128, 0).astype(np.uint8))
            image.paste(tuple(colours[label].tolist()), (left, top), inside)
        canvas.rectangle((left, top, right, bottom), outline=tuple(colours[label].tolist()))
        canvas.text((left + 2, top + 2), names[label])
        place = " ".join(f"{part:.1f}" for part in box)
        print(f"  {found['scores'][i]:8.3f}  {names[label]}  {place}")
    image.save(output / f"{Path(path).stem}.detections.png")


class Server:
    """The bundle's model on a Triton server."""

    def __init__(self, url: str, *, top: int, least: float) -> None:
        from tritonclient import http

        lines = (HERE / "bundle.env").read_text(encoding="utf-8").splitlines()
        self.settings = dict(line.split("=", 1) for line in lines if "=" in line)
        self.http, self.client = http, http.InferenceServerClient(url)
        self.top, self.least = top, least
        self.most = int(self.settings["MAX_BATCH"])

    def ask(
        self, images: np.ndarray, names: list[str] | None = None, **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Outputs by name; None for all."""
        outputs = names and [self.http.InferRequestedOutput(name) for name in names]
        answer = self._infer(images, more, outputs)
        return {o["name"]: answer.as_numpy(o["name"]) for o in answer.get_response()["outputs"]}

    def best(self, images: np.ndarray) -> np.ndarray:
        """The best classes of each image, each as "value:index:label"."""
        wanted = [self.http.InferRequestedOutput("logits", class_count=self.top)]
        starts = range(0, len(images), self.most)
        parts = [self._infer(images[i : i + self.most], {}, wanted) for i in starts]
        return np.concatenate([part.as_numpy("logits") for part in parts])

    def _infer(self, images: np.ndarray, more: dict[str, np.ndarray], outputs: Any) -> Any:
        tensors = []
        for name, array in {self.settings["INPUT"]: images, **more}.items():
            kind = "FP32" if array.dtype == np.float32 else "INT64"
            tensors.append(self.http.InferInput(name, list(array.shape), kind))
            tensors[-1].set_data_from_numpy(array)
        return self.client.infer(self.settings["MODEL"], tensors, outputs=outputs)


def main() -> None:
    """Say of every image what the bundle's model says of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--top", type=int, default=5, help="classes to print")
    parser.add_argument("--score", type=float, default=0.3, help="least score of a detection")
    options = parser.parse_args()
    model = json.loads((HERE / "model/model.json").read_text(encoding="utf-8"))
    shapes = {output["name"]: output["shape"] for output in model["outputs"]}
    server = Server(options.url, top=options.top, least=options.score)
    spec = model["preprocessing"]
    if len(shapes.get("logits", ())) == 2:
        classify(options.images, spec, server)
        return
    if options.output is None:
        parser.error("this model's answers are files: say -o DIR")
    options.output.mkdir(parents=True, exist_ok=True)
    for path in options.images:
        if "boxes" in shapes:
            detect(path, spec, server, options.output)
        elif "logits" in shapes:
            segment(path, spec, server, options.output)
        else:
            found = server.ask(prepare(path, spec)[None])
            np.savez(options.output / f"{Path(path).stem}.npz", **found)


if __name__ == "__main__":
    main()
