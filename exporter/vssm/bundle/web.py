"""Makes a page that runs an export in a browser: a folder of files that any server can hand out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from vssm._version import __version__
from vssm.artifact.directory import INLINED_FILE, MODEL_FILE, Artifact
from vssm.artifact.manifest import BATCH, Manifest
from vssm.artifact.model_file import read_facts
from vssm.artifact.preprocessing import preprocessing_of, read_labels
from vssm.bundle.manifest import BundleManifest, hash_files, staged_bundle, write_bundle_manifest
from vssm.errors import RuntimeUnavailableError, UnsupportedError
from vssm.files.text import shown
from vssm.runtimes.library import find_sources

PAGE: Final = "index.html"
ORT_WEB_VERSION: Final = "1.30.0"  # of onnxruntime-web on npm; the only place that says so
# A browser downloads the file whole, and its copies of the weights share 4 GiB of WebAssembly with
# everything that is computed from them; a telephone gives a page a quarter of that.
MAX_MODEL: Final = 256 << 20
_SCRIPT: Final = "ort.wasm.bundle.min.mjs"
_BINARY: Final = "ort-wasm-simd-threaded.wasm"  # which the script loads from beside itself
_PAGE_FILES: Final = (PAGE, "README.md", "_headers", "app.mjs", "preprocess.mjs", "serve.py")
# What a page that loads onnxruntime-web from another host must allow; threads begin from a blob.
_ALLOWED: Final = {"script-src 'self'": "blob: ", "connect-src 'self'": "", "worker-src 'self'": ""}
_SECONDS: Final = 600  # 33 MB over a slow line
# No npm that can be run, no archive, not the two files in it.
_FAILURES: Final = (OSError, StopIteration, LookupError, AssertionError, tarfile.TarError)


@dataclass(frozen=True)
class WebRequest:
    """What a page is to hold.

    Attributes:
        labels: file of class names; None for the export's own, or "class 0", "class 1", ...
        ort_web: address of a folder with onnxruntime-web's files, from which the page loads them;
            None to put them beside the page, where npm is.
        force: replace a bundle that is there.
    """

    labels: Path | None = None
    ort_web: str | None = None
    force: bool = False


def check_web_request(request: WebRequest) -> None:
    """Refuse what no page can be made of, before anything is read.

    Raises:
        ValueError: the address is none that a page can load from.
        RuntimeUnavailableError: npm is not there, and no address is given.
    """
    if request.ort_web is None:
        if shutil.which("npm") is None:
            raise RuntimeUnavailableError(
                f"npm is not on PATH; it downloads onnxruntime-web {ORT_WEB_VERSION} for the page: "
                "install Node.js, or say where the page is to load that from: --ort-web "
                "https://HOST/FOLDER"
            )
        return
    if not re.fullmatch(r"https?://[^\s/;,'\"]+(/[^\s;,'\"?#]*)?", request.ort_web):
        raise ValueError(
            f"ort_web={shown(request.ort_web)!r} is not an address of a folder; write "
            f"https://HOST/FOLDER, of the package's folder dist, which holds {_SCRIPT}"
        )


def make_web_bundle(artifact: Artifact, output: Path, request: WebRequest) -> BundleManifest:
    """Write a page that classifies images with an export; it appears whole or not at all.

    Raises:
        ValueError: the export is no classifier of image files, or the labels do not fit.
        UnsupportedError: browsers cannot run the model, or it is too large.
        ArtifactError: the export was changed, or `output` cannot be written or replaced.
        RuntimeUnavailableError: npm or the page's sources are missing, or npm cannot download.
    """
    check_web_request(request)
    manifest = artifact.manifest
    settings = _settings(manifest, request)
    model = _model(artifact)
    sources = find_sources() / "examples/web"
    with staged_bundle(output, force=request.force) as root:
        for file in _PAGE_FILES:
            shutil.copyfile(sources / file, root / file)
        if request.ort_web is None:
            _download(root / "ort")
        else:
            _allow(root / PAGE, request.ort_web)
        (root / MODEL_FILE).write_bytes(model)
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        (root / "settings.json").write_text(f"{text}\n", encoding="utf-8")
        made = BundleManifest(
            name=manifest.name,
            files=hash_files(root),
            absent={},
            versions={
                **manifest.versions,
                "vssm": __version__,
                "onnxruntime-web": ORT_WEB_VERSION if request.ort_web is None else request.ort_web,
            },
        )
        write_bundle_manifest(root, made)
    return made


def _model(artifact: Artifact) -> bytes:
    """The file for a browser, which has no operators of ours: inlined, or with their functions."""
    manifest, quantization = artifact.manifest, artifact.manifest.quantization
    if manifest.dtype == "bfloat16":
        raise UnsupportedError(
            f"{artifact.directory} is in bfloat16, of which ONNX Runtime has no matrix product in "
            "browsers; export float32 or float16"
        )
    if quantization is not None and not quantization.in_ort:
        raise UnsupportedError(
            f"ONNX Runtime does not run {quantization} by itself; quantise with --target ort or "
            "portable"
        )
    name = INLINED_FILE if INLINED_FILE in manifest.files else MODEL_FILE
    path = artifact.directory / name
    if path.is_file() and path.stat().st_size > MAX_MODEL:
        raise UnsupportedError(
            f"{path} has {path.stat().st_size / 2**20:.0f} MiB; a page's model may have "
            f"{MAX_MODEL >> 20}: take a smaller model, or quantise its weights with `vssm quantize "
            "--weights-only`"
        )
    data = artifact.read(name)
    facts = read_facts(data)
    if facts.external:
        raise UnsupportedError(
            f"{path} keeps its weights in another file, which a page does not load; export it "
            "again with the weights inside"
        )
    if bare := sorted(facts.operators - facts.bodies):
        raise UnsupportedError(
            f"{path} has the operator {bare[0]} without its function, and browsers have no "
            "operators of this package; export the model again"
        )
    return data


def _settings(manifest: Manifest, request: WebRequest) -> dict[str, Any]:
    """What the page reads: where things are, and what the model is called."""
    classes, spec = manifest.num_classes, preprocessing_of(manifest)
    if manifest.batch not in {BATCH, 1}:
        raise ValueError(
            f"batch={manifest.batch}: the page runs one image at a time, but the export of "
            f"{manifest.name} takes as many; export it with a batch of any size"
        )
    if spec.fit != "crop":
        raise ValueError(
            f"fit={spec.fit!r}: the page prepares images by cropping their middle; give the export "
            "such a preprocessing"
        )
    runtime = "./ort" if request.ort_web is None else request.ort_web.rstrip("/")
    return {
        "title": f"{manifest.name} in this browser",
        "facts": f"{manifest.name}, {manifest.tokens}, {manifest.precision}",
        "runtime": f"{runtime}/{_SCRIPT}",
        "version": ORT_WEB_VERSION if request.ort_web is None else f"from {runtime}",
        "model": MODEL_FILE,
        "input": manifest.inputs[0].name,
        "labels": _labels(manifest, request, classes),
        "preprocessing": asdict(spec),
        "stages": _stages(manifest),
        "grid": _grid(manifest, spec.crop),
    }


def _labels(manifest: Manifest, request: WebRequest, classes: int) -> Sequence[str]:
    if request.labels is not None:
        return read_labels(request.labels, classes)
    return manifest.labels or [f"class {index}" for index in range(classes)]


def _stages(manifest: Manifest) -> list[dict[str, Any]]:
    # Of merged tokens a place stands for several, which one mark cannot show.
    if manifest.schedule is None or manifest.merge is not None:
        return []
    return [
        {"block": block, "output": f"kept_positions_{stage}"}
        for stage, block in enumerate(manifest.schedule.blocks)
    ]


def _grid(manifest: Manifest, crop: tuple[int, int]) -> dict[str, Any] | None:
    """Where the patches of the input are; None for a module whose patches are not known."""
    patch = manifest.config.get("patch_size")
    if manifest.schedule is None or not isinstance(patch, int):
        return None
    stride = int(manifest.config.get("stride", patch))
    rows, columns = ((side - patch) // stride + 1 for side in crop)
    return {
        "rows": rows,
        "columns": columns,
        "patch": patch,
        "stride": stride,
        "cls_position": manifest.schedule.cls_position,
    }


def _download(folder: Path) -> None:
    """Put onnxruntime-web's two files there, by the user's own npm: its registry, its proxy."""
    package = f"onnxruntime-web@{ORT_WEB_VERSION}"
    with tempfile.TemporaryDirectory(prefix="vssm-") as work:
        try:
            # It downloads and checks one archive: nothing is installed, and no script is run.
            subprocess.run(
                ["npm", "pack", package, "--silent", "--pack-destination", work],
                cwd=work,
                check=True,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            _unpack(next(Path(work).glob("*.tgz")), folder)
        except (*_FAILURES, subprocess.SubprocessError) as error:
            told = getattr(error, "stderr", None) or str(error) or type(error).__name__
            told = shown(" ".join(told.split()), limit=300)
            raise RuntimeUnavailableError(
                f"npm cannot bring {package} ({told}); see what `npm pack` says, "
                "or name an address with --ort-web"
            ) from error


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(archive) as files:
        for name in (_SCRIPT, _BINARY):
            file = files.extractfile(f"package/dist/{name}")
            assert file is not None  # a link or a folder; the package has files there
            (folder / name).write_bytes(file.read())


def _allow(page: Path, address: str) -> None:
    """Let the page load from one more host; it is closed against all others."""
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(address))
    text = page.read_text(encoding="utf-8")
    for rule, more in _ALLOWED.items():
        text = text.replace(rule, f"{rule} {more}{origin}")
    page.write_text(text, encoding="utf-8")
