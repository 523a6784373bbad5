"""Checkpoint files built to be expensive: a grammar of pickles, zips and headers, not flipped bits.

Every function takes a `random.Random`; one seed makes one file.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable

MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
GLOBALS = [
    *("torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_tensor_v3"),
    *("torch._utils\n_rebuild_parameter", "torch._tensor\n_rebuild_from_type_v2"),
    *("torch.nn.parameter\nParameter", "torch\nTensor", "torch\nSize", "torch\nfloat32"),
    *("torch\nFloatStorage", "torch.storage\nUntypedStorage", "collections\nOrderedDict"),
    *("collections\nCounter", "collections\ndefaultdict", "builtins\ndict", "builtins\neval"),
    *("os\nsystem", "argparse\nNamespace", "numpy.core.multiarray\n_reconstruct", "a\nb.c.d"),
]
KEYS = ["model", "state_dict", "net", "module", "model_ema", "epoch", "head.bias", "a.b", "\x1b[2J"]


def text(value: str) -> bytes:
    """A text on the stack."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


class Pickle:
    """Makes parts of a pickle; each part leaves one value on the stack."""

    def __init__(self, rng: random.Random, most: int) -> None:
        self.rng = rng
        self.most = most  # of repetitions
        self.memo = 0

    def many(self) -> int:
        """A count, small ones as likely as large ones."""
        return int(self.most ** self.rng.random())

    def part(self, depth: int = 4) -> bytes:
        """Any value."""
        simple = [self.number, self.words, self.recalled, self.global_]
        nested = [
            *(self.doubled, self.doubled_by_memo, self.deep, self.mapping, self.sequence),
            *(
                self.called,
                self.built,
                self.stored,
                self.tensor,
                self.repeated,
                self.holding_itself,
            ),
        ]
        chosen = self.rng.choice(simple if depth <= 0 else simple + 2 * nested)
        return chosen(depth - 1)

    def mostly(self, well: bytes, badly: Callable[[int], bytes], depth: int = 0) -> bytes:
        """Well-formed where that leads deeper into the reader."""
        return well if self.rng.random() < 0.85 else badly(depth)

    def remember(self) -> tuple[bytes, bytes]:
        """Opcodes that recall the top of the stack later, and that remember it now."""
        self.memo += 1
        index = struct.pack("<I", self.memo)
        return b"j" + index, b"r" + index

    def number(self, _: int) -> bytes:
        size = self.many()
        return self.rng.choice(
            [
                *(b"N", b"\x88", b"\x89", b"K\x03", b"M\x00\x10", b"J\xff\xff\xff\xff"),
                b"G" + struct.pack(">d", self.rng.choice([0.0, 1e300, float("nan"), float("inf")])),
                b"\x8b" + struct.pack("<i", size) + b"\x7f" * size,
                b"L" + b"9" * min(size, 5000) + b"L\n",
                b"\x8a\x09" + b"\xff" * 8 + b"\x00",
            ]
        )

    def words(self, _: int) -> bytes:
        size = self.many()
        return self.rng.choice(
            [
                *(text(key) for key in KEYS),
                text("a" * size),
                text("." * size),
                text("\ud800" * min(size, 50)),
                b"B" + struct.pack("<I", size) + bytes(size),
                b"\x8c\x01x",
            ]
        )

    def recalled(self, _: int) -> bytes:
        return b"j" + struct.pack("<I", self.rng.randrange(1, self.memo + 1)) if self.memo else b"N"

    def global_(self, depth: int) -> bytes:
        if self.rng.random() < 0.1:
            return self.words(depth) + self.words(depth) + b"\x93"
        return b"c" + self.rng.choice(GLOBALS).encode() + b"\n"

    def doubled(self, depth: int) -> bytes:
        step = self.rng.choice([b"2\x86", b"22\x87", b"2\x862\x86"])
        return self.part(depth) + step * self.rng.randrange(1, 64)

    def doubled_by_memo(self, depth: int) -> bytes:
        value = self.part(depth)
        get, put = self.remember()
        made = self.rng.choice([b"\x86", b"\x86\x85", b"(" + get + get + b"t\x86"])
        return value + put + (get + made + put) * self.rng.randrange(1, 64)

    def deep(self, depth: int) -> bytes:
        step = self.rng.choice([b"\x85", b"\x85\x85\x94", b"\x85]\x86", b"}\x86"])
        return self.part(depth) + step * self.many()

    def mapping(self, depth: int) -> bytes:
        size = self.rng.randrange(1, 6)
        items = b"".join(self.key(depth) + self.part(depth) for _ in range(size))
        return self.rng.choice([b"}(" + items + b"u", b"(" + items + b"d"])

    def key(self, depth: int) -> bytes:
        return self.mostly(text(self.rng.choice(KEYS)), self.part, depth)

    def sequence(self, depth: int) -> bytes:
        items = b"".join(self.part(depth) for _ in range(self.rng.randrange(6)))
        opener, closer = self.rng.choice(
            [(b"(", b"t"), (b"(", b"l"), (b"](", b"e"), (b"\x8f(", b"\x90"), (b"(", b"\x91")]
        )
        return opener + items + closer

    def arguments(self, depth: int) -> bytes:
        if self.rng.random() < 0.3:
            return b"(" + b"N" * self.many() + b"t" + self.remember()[1]
        return b"(" + b"".join(self.part(depth) for _ in range(self.rng.randrange(8))) + b"t"

    def called(self, depth: int) -> bytes:
        parts = self.arguments(depth)
        how = self.rng.choice([b"R", b"\x81", b"R" + b")R" * self.many(), b"}\x92"])
        return self.global_(depth) + parts + how

    def built(self, depth: int) -> bytes:
        target = self.mostly(self.rng.choice([b"}", b"ca\nb\n)R"]), self.part, depth)
        return target + (self.part(depth) + b"b") * self.rng.randrange(1, 4)

    def stored(self, depth: int) -> bytes:
        return self.mostly(self.storage_name(depth), self.arguments, depth) + b"Q"

    def storage_name(self, depth: int) -> bytes:
        kind = self.mostly(b"ctorch\nFloatStorage\n", self.global_, depth)
        count = self.mostly(b"K\x04", self.number)
        return b"(" + text("storage") + kind + text("0") + text("cpu") + count + b"t"

    def tensor(self, depth: int) -> bytes:
        sizes = [b"K\x04\x85K\x01\x85", b"K\x02\x85K\x01\x85", b"K\x01M\xff\xff\x86K\x00K\x00\x86"]
        layout = [
            self.mostly(b"K\x00", self.number),
            self.mostly(self.rng.choice(sizes), lambda d: self.part(d) + self.part(d)),
        ]
        name = GLOBALS[0].encode()
        return b"c" + name + b"\n(" + self.stored(depth) + b"".join(layout) + b"\x89}tR"

    def repeated(self, depth: int) -> bytes:
        """Something large that is used again and again by a few bytes."""
        large = self.mostly(b"(" + b"N" * self.many() + b"t", self.part, depth)
        get, put = self.remember()
        use = self.rng.choice(
            [
                *(get + b"0", get + b"0", get + b"Q0", get + get + b"\x930", get + get + b"R0"),
                *(b"}" + text("k") + get + b"s0", b"ca\nb\n" + get + b"R0"),
                b"ca\nb\n" + get + b"b0",
                b"c" + self.rng.choice(GLOBALS).encode() + b"\n" + get + b"R0",
                *(b"}" + get + b"Ns0", b"}" + get + b"b0", b"(" + get + get + b"d0"),
                *(b"]" + get + b"a0", b"\x8f(" + get + b"\x900", b"(" + get + b"\x910"),
                b"(" + get + get + b"ios\nsystem\n0",
            ]
        )
        return large + put + use * self.many()

    def holding_itself(self, depth: int) -> bytes:
        get, put = self.remember()
        items = b"".join(text(self.rng.choice(KEYS)) + get for _ in range(self.rng.randrange(1, 8)))
        return self.rng.choice([b"}" + put + b"(" + items + b"u", b"]" + put + get + b"a"])

    def whole(self) -> bytes:
        """A pickle, mostly a mapping as checkpoints are."""
        body = self.mapping(4) if self.rng.random() < 0.8 else self.part(5)
        return b"\x80\x02" + body + b"."


def zip_file(rng: random.Random, most: int) -> bytes:
    """torch's zip with such a pickle, and some liberties taken with its records."""
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as file:
        file.writestr("a/data.pkl", Pickle(rng, most).whole())
        file.writestr("a/data/0", bytes(rng.choice([0, 4, 16, 64])))
        for i in range(rng.choice([0, 0, 3, min(most, 3000)])):
            file.writestr(f"a/data/{i + 1}", b"")
        again = file.filelist[-1] if rng.random() < 0.1 else None
        file.filelist += [again] * rng.randrange(3) if again else []
    return data.getvalue()


def legacy_file(rng: random.Random, most: int) -> bytes:
    """torch's old format with such pickles."""
    pickles = Pickle(rng, most)
    keys = b"]" + text("0") + b"a." if rng.random() < 0.8 else pickles.whole()
    system = b"}" + text("little_endian") + b"\x88s."
    count = struct.pack("<q", rng.choice([4, 4, 0, -1, 1 << 60]))
    return MAGIC + b"M\xe9\x03." + system + pickles.whole() + keys + count + bytes(16)


def safetensors_file(rng: random.Random, most: int) -> bytes:
    """A header that lies about shapes, places and itself."""

    def entry() -> object:
        shape = rng.choice([[0], [4], [1 << 40, 1 << 40], [-1], [1] * rng.randrange(40), ["a"], 3])
        good = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
        if rng.random() < 0.7:
            return good | rng.choice([{}, {}, {"shape": shape}, {"x": 1}, {"shape": [2, 2]}])
        return rng.choice(
            [
                {
                    "dtype": rng.choice(["F32", "F64", "I8", "F8_E4M3", "F4", "C64", "x", 3]),
                    "shape": shape,
                    "data_offsets": rng.choice([[0, 16], [0, 0], [16, 0], [0, 1 << 60], [0], "a"]),
                },
                *(None, [], {}, 10**400, 1.5, "a" * 100),
            ]
        )

    def key() -> str:
        return rng.choice(
            [*KEYS, "a" * min(most, 5000), "__metadata__", "\ud800", f"{rng.random()}"]
        )

    count = rng.choice([1, 1, 3, min(most, 5000)])
    header = json.dumps({key(): entry() for _ in range(count)})
    if rng.random() < 0.2:
        header = header[:-1] + "," + header[1:]  # the same names again
    if rng.random() < 0.1:
        header = '{"a":' + rng.choice("[{") * most
    data = header.encode()
    length = len(data) if rng.random() < 0.8 else rng.choice([0, 8, len(data) + 1, 1 << 31])
    return struct.pack("<Q", length) + data + bytes(16)


def index_file(rng: random.Random, most: int) -> bytes:
    """An index of shards that are not there, not files, or elsewhere."""
    names = ["a", "..", "/dev/zero", "../../etc/passwd", "", "a\0", ".", 3, None, "x" * 300]
    listed = {f"k{i}": rng.choice(names) for i in range(rng.choice([0, 1, 5, min(most, 5000)]))}
    return json.dumps(
        rng.choice([{"weight_map": listed}, {"weight_map": [listed]}, [], {}])
    ).encode()


MAKERS = {
    "zip.pth": zip_file,
    "legacy.pth": legacy_file,
    "a.safetensors": safetensors_file,
    "b.index.json": index_file,
}
