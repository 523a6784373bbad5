"""Generated inputs for whatever reads or computes; `make fuzz` runs the same for longer."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import warnings
from collections import Counter

import pytest
from checkout import ROOT
from fuzzers import FUZZERS, AbsentError, Limits, fuzz
from readers import READERS, mutate

from vssm.native_library import find_library

OPERATORS = ROOT / "tests/fuzz/operators"


def _run(*command):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_random_calls_are_as_in_float64(tmp_path):
    library = find_library("vssm")
    compiler = (os.environ.get("CXX") or shutil.which("c++") or "g++").split()
    program = tmp_path / "fuzz"
    flags = ["-std=c++17", "-O1", f"-I{ROOT}", f"-Wl,-rpath,{library.parent}"]
    _run(*compiler, *flags, OPERATORS / "fuzz.cpp", library, "-o", program)
    assert "fuzz: 10000 calls on baseline" in _run(program, 1, 10_000)  # `make fuzz`: for minutes


@pytest.mark.parametrize("name", READERS)
def test_a_few_hundred_changes_to_the_seeds(tmp_path, name):
    reader = READERS[name]
    seeds = reader.prepare(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # which warns of what it mends in an image
        ends = Counter(reader.check(tmp_path, seed) for seed in seeds)
        assert ends["read"] or name == "shard index"  # whose shards are not there
        for number in range(300):
            ends[reader.check(tmp_path, mutate(random.Random(number), reader, seeds))] += 1
    assert ends["refused"] > 100


def test_a_sanitized_library_is_never_taken_for_ours(tmp_path):
    """A session takes the newest libvssm*.so below build/."""
    configure = ("cmake", "-S", OPERATORS, "-B", tmp_path, "-G", "Ninja")
    _run(*configure, "-DVSSM_SANITIZE=address;undefined")
    built = (tmp_path / "build.ninja").read_text()
    assert "libsanitized_vssm.so" in built
    assert "libsanitized_vssm_onnxruntime.so" in built
    assert "libvssm.so" not in built
    refused = subprocess.run(
        [*configure, "-DVSSM_SANITIZE=memory"], capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "use address, undefined or thread" in " ".join(refused.stderr.split())


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", FUZZERS)
def test_a_minute_of_each_fuzzer(name):
    try:
        outcome = fuzz(name, Limits(seconds=60, inputs=0))
    except AbsentError as absent:
        pytest.skip(str(absent))
    assert outcome.passed, outcome.output[-8000:]
