"""Our reader of torch files against torch's own, on files that both are meant for."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn

from vssm.checkpoints.pickle_machine import Stub, TensorRecord
from vssm.checkpoints.torch_file import read_torch

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint32),
]


class Maker:
    """Makes what training codes save; one seed makes one tree."""

    def __init__(self, seed: int, dtypes: list[torch.dtype]) -> None:
        self.dtypes = dtypes
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.shared = torch.randn(64, generator=self.generator)

    def tensor(self) -> torch.Tensor:
        shape = [self.rng.randrange(5) for _ in range(self.rng.randrange(4))]
        numbers = torch.randint(0, 100, shape, generator=self.generator)
        plain = numbers.to(self.rng.choice(self.dtypes))
        return self.rng.choice(
            [
                lambda: plain,
                lambda: nn.Parameter(plain.float(), requires_grad=self.rng.random() < 0.5),
                lambda: self.shared[self.rng.randrange(32) :],
                lambda: self.shared.reshape(8, 8).t(),
                lambda: self.shared.as_strided((3, 4), (16, 2), 5),
                lambda: plain.t() if plain.dim() == 2 else plain,
                lambda: plain.clone().requires_grad_(plain.is_floating_point()),
            ]
        )()

    def value(self, depth: int) -> object:
        leaves = [
            *(
                None,
                True,
                False,
                0,
                -3,
                1 << 70,
                0.5,
                float("inf"),
                "text",
                "\u00e9\U0001f600",
            ),
            *((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4,)), "long " * 200),
        ]
        if depth == 0 or self.rng.random() < 0.3:
            return self.tensor() if self.rng.random() < 0.5 else self.rng.choice(leaves)
        items = [self.value(depth - 1) for _ in range(self.rng.randrange(5))]
        keys = self.rng.sample(["a", "b.c", "model", "", 3, -1, 0.5, None, (1, "x"), "k" * 300], 5)
        pairs = list(zip(keys, items, strict=False))
        again = items[0] if items else None
        made = [
            *(items, tuple(items), [again, again], dict(pairs), OrderedDict(pairs)),
            *(Counter("aab"), torch.Size([2, 3]), {"d": torch.float32}),
        ]
        return self.rng.choice(made)

    def tree(self) -> object:
        """A state dict among other things, and some references to one object."""
        state = OrderedDict((f"layers.{i}.weight", self.tensor()) for i in range(8))
        state["tied"] = state["layers.0.weight"]
        return {"model": state, "args": self.value(3), "again": state, "more": self.value(4)}


def assert_same(ours: object, theirs: object, tensors: dict[int, torch.Tensor]) -> None:
    """`tensors` are ours by the identity of their records."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, TensorRecord)
        mine = tensors[id(ours)]
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert mine.numel() == 0 or mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs.detach())
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value, tensors)
    elif isinstance(theirs, torch.Size):
        assert ours == Stub("torch.Size")  # of no use for weights
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, tensors)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


def records(value: object, found: dict[str, TensorRecord]) -> None:
    if isinstance(value, TensorRecord):
        found[str(len(found))] = value
    for part in (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    ):
        records(part, found)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_two_readers_agree(tmp_path, legacy, protocol):
    # torch.load fails on the later ones in the old format.
    dtypes = [d for d in DTYPES if not legacy or d not in {torch.uint16, torch.uint32}]
    for seed in range(60):
        path = tmp_path / "a.pth"
        torch.save(
            Maker(seed, dtypes).tree(),
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=not legacy,
        )
        with torch.serialization.safe_globals([Counter, torch.Size]):
            # Theirs knows no later protocol; the files are our own.
            theirs = torch.load(path, weights_only=protocol < 4)
        roots: list[object] = []
        found: dict[str, TensorRecord] = {}

        def select(root, roots=roots, found=found):
            roots.append(root)
            records(root, found)
            return found

        loaded, _ = read_torch(path.read_bytes(), select)
        tensors = {id(record): loaded[name] for name, record in found.items()}
        assert_same(roots[0], theirs, tensors)
