"""Deterministic parameter / input generator for the model fixtures.

Every value depends only on (seed, tensor name, tensor shape).  The random bits
come from numpy's PCG64 *bit generator* (whose raw stream numpy guarantees to be
stable); the "normal" numbers are built from four 16-bit lanes of each raw
64-bit word (Irwin-Hall), i.e. only exact integer/float arithmetic, so the same
float32 weights come out on every platform and every numpy version.

    from fill import fill_array, fill_state_dict, make_input
    sd = {k: torch.from_numpy(v) for k, v in fill_state_dict(shapes, SEED).items()}

`shapes` is {key: shape} (for instance read from <model>.keys.json).
Entries for which the rule is "keep" (integer counters, rope tables) are left out.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np

SEED = 20240601
DT_MIN, DT_MAX = 1e-2, 1.0  # range of softplus(dt bias); wide, so that the scan matters

EMBED_LIKE = {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail", "direction_Bs"}
ONES_LIKE = {"D", "D_b", "Ds", "gamma", "skip_scale"}
A_LIKE = {"A_log", "A_b_log", "A_logs"}
KEEP = {"num_batches_tracked", "freqs_cos", "freqs_sin"}


def _raw(key: str, n: int, seed: int) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return (
        np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(int(n)).astype(np.uint64)
    )


def _size(shape) -> int:
    return int(np.prod(shape, dtype=np.int64)) if len(shape) else 1


def normal(key: str, shape, seed: int = SEED) -> np.ndarray:
    """Zero-mean unit-variance bell-shaped float64 numbers, exactly reproducible."""
    r = _raw(key, _size(shape), seed)
    m = np.uint64(0xFFFF)
    s = (r & m) + ((r >> np.uint64(16)) & m) + ((r >> np.uint64(32)) & m) + (r >> np.uint64(48))
    z = ((s.astype(np.float64) + 2.0) / 65536.0 - 2.0) * math.sqrt(3.0)
    return z.reshape(shape)


def uniform(key: str, shape, seed: int = SEED) -> np.ndarray:
    r = _raw(key, _size(shape), seed)
    return ((r >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def rule(key: str, shape) -> str:
    """Name of the filling rule for a state-dict entry."""
    parts = key.split(".")
    last, parent = parts[-1], (parts[-2] if len(parts) > 1 else "")
    if last in KEEP:
        return "keep"
    if last == "running_mean":
        return "running_mean"
    if last == "running_var":
        return "running_var"
    if last in A_LIKE:
        return "a_log"
    if last in ONES_LIKE:
        return "ones"
    if last == "dt_projs_bias" or (last == "bias" and parent in ("dt_proj", "dt_proj_b")):
        return "dt_bias"
    if last in EMBED_LIKE:
        return "embed"
    if last == "bias":
        return "bias"
    if last == "weight" and len(shape) == 1:
        return "norm"
    return "weight"


def fill_array(key: str, shape, seed: int = SEED):
    """float32 array for one entry, or None where the existing value is kept."""
    shape = tuple(int(s) for s in shape)
    kind = rule(key, shape)
    if kind == "keep":
        return None
    if kind == "dt_bias":
        dt = np.exp(
            uniform(key, shape, seed) * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN)
        )
        out = dt + np.log(-np.expm1(-dt))  # inverse softplus
    elif kind == "running_var":
        out = 0.75 + 0.5 * uniform(key, shape, seed)
    else:
        z = normal(key, shape, seed)
        if kind == "a_log":
            out = np.log(np.arange(1, shape[-1] + 1, dtype=np.float64)) + 0.1 * z
        elif kind in ("ones", "norm"):
            out = 1.0 + 0.1 * z
        elif kind == "running_mean":
            out = 0.1 * z
        elif kind == "embed":
            out = 0.2 * z
        elif kind == "bias":
            out = 0.05 * z
        else:  # weight matrices and kernels
            if key.endswith(("x_proj_weight", "dt_projs_weight")):
                fan_in = shape[-1]  # (K, out, in)
            else:
                fan_in = _size(shape[1:])
            out = z / math.sqrt(fan_in)
    return np.ascontiguousarray(out, dtype=np.float32)


def fill_state_dict(shapes, seed: int = SEED) -> dict:
    out = {}
    for key, shape in shapes.items():
        arr = fill_array(key, shape, seed)
        if arr is not None:
            out[key] = arr
    return out


def make_input(shape, seed: int = SEED, key: str = "input") -> np.ndarray:
    return normal(key, shape, seed).astype(np.float32)


def sample_index(total: int, n: int = 4093) -> np.ndarray:
    """Indices of the flattened tensor that the fixtures keep."""
    if total <= n:
        return np.arange(total, dtype=np.int64)
    return (np.arange(n, dtype=np.int64) * total) // n


def sample(arr: np.ndarray, n: int = 4093) -> np.ndarray:
    flat = np.asarray(arr).reshape(-1)
    return flat[sample_index(flat.size, n)]


def shapes_from_manifest(path) -> dict:
    with open(path) as f:
        doc = json.load(f)
    return {k: tuple(v["shape"]) for k, v in doc["keys"].items()}
