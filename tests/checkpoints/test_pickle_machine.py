"""The pickle machine makes containers, records and stubs, and nothing else, whatever the bytes."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections import Counter, OrderedDict, defaultdict

import pytest
import torch

from vssm.checkpoints.pickle_machine import PickleMachine, StorageRef, Stub


def run(data: bytes) -> object:
    return PickleMachine().run(io.BytesIO(data))


@pytest.fixture
def trap(monkeypatch):
    """Fail if anything dangerous is called; the functions keep their names for pickling."""

    def caught(*args, **kwargs):
        raise AssertionError("the file's code ran")

    return lambda owner, name: monkeypatch.setattr(owner, name, caught)


MARK_CALL = b"cos\nsystem\n(S'true'\ntR."


@pytest.mark.parametrize(
    "data",
    [
        MARK_CALL,
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x02cos\nsystem\n\x8c\x04true\x85\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85}\x92.",  # STACK_GLOBAL, NEWOBJ_EX
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85}\x8c\x01kNs\x92.",  # with keywords
        b"cos\nsystem\n)R(S'a'\nS'b'\nu(S'c'\ne(S'd'\nS'e'\nu}b.",  # items, appends and BUILD
        b"cos\nsystem\n)R)R.",  # the result called once more
    ],
)
def test_every_opcode_that_makes_objects_is_inert(trap, data):
    pickletools.dis(data, out=io.StringIO())
    trap(os, "system")
    assert run(data) == Stub("os.system")


def test_extension_codes_are_inert(monkeypatch):
    monkeypatch.setitem(pickle._extension_cache, 5, os.system)
    assert run(b"\x80\x02\x82\x05)R.") == Stub("extension 5")


def test_state_never_reaches_an_object():
    # BUILD may set any attribute in a plain unpickler: here __defaults__ of torch's own function,
    # and `items` of the mapping that holds the weights.
    with pytest.raises(TypeError, match="sets the state"):
        run(b"ctorch._utils\n_rebuild_tensor_v2\nN}S'__defaults__'\nNs\x86b.")
    built = run(b"\x80\x02ccollections\nOrderedDict\n)R}S'items'\nNsb.")
    assert type(built) is dict
    assert built == {}


def test_nothing_is_imported(tmp_path):
    (tmp_path / "never_imported_module.py").write_text("raise AssertionError('imported')")
    data = b"cnever_imported_module\nThing\n)R."
    assert run(data) == Stub("never_imported_module.Thing")


def test_dotted_names_reach_no_attribute():
    name = "OrderedDict.fromkeys"
    data = (
        b"\x80\x04\x8c\x0bcollections" + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93)R."
    )
    assert run(data) == Stub("collections.OrderedDict.fromkeys")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        1 << 80,
        2.5,
        "text",
        b"bytes",
        (),
        (1, (2,)),
        (1, 2, 3, 4),
        [1, [2]],
        {"a": {1: None}},
        {1, 2},
        frozenset({1}),
    ],
)
@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_survive(value, protocol):
    # Older protocols write these as calls, which stay stubs.
    called = isinstance(value, set | frozenset) and protocol < 4
    called = called or (isinstance(value, bytes) and protocol < 3)
    got = run(pickle.dumps(value, protocol))
    expected = list(value) if isinstance(value, set | frozenset) else value
    assert isinstance(got, Stub) if called else got == expected


def test_other_mappings_become_dictionaries():
    assert run(pickle.dumps(OrderedDict(a=1), 2)) == {"a": 1}
    assert run(pickle.dumps(defaultdict(list, a=1), 2)) == {"a": 1}
    assert run(pickle.dumps(Counter("aab"), 2)) == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"N",
        b"0.",
        b"(.",
        b"t.",
        b"NR.",
        b"Nb.",
        b"(R.",
        b"cos\nsystem\nNR.",
        b"S'a'\n)R.",
        b"]NNs.",
        b"}]Ns.",
        b"}(Nu.",
        b"h\x05.",
        b"Pid\n.",
        b"NQ.",
        b"\x97.",
        b"\xff.",
        b"X\xff\xff\xff\xff.",
        b"(o.",
        b"ctorch\nFloatStorage\n)R.",
    ],
)
def test_malformed_pickles_are_refused(data):
    with pytest.raises((ValueError, LookupError, TypeError)):
        run(data)


def test_huge_memo_index_takes_no_memory():
    assert run(b"Nr\xff\xff\xff\xff.") is None


def test_deep_nesting_does_not_recurse():
    depth = 200_000
    assert run(b"N" + b"\x85" * depth + b"0N.") is None
    with pytest.raises(TypeError, match="as a key"):
        run(b"}N" + b"\x85" * depth + b"Ns.")
    with pytest.raises(ValueError, match="more than 500,000 steps"):
        run(b"N" + b"\x85" * 1_000_000 + b"0N.")


def test_long_stub_chains_end_in_one_stub():
    assert run(b"cos\nsystem\n" + b")R" * 1000 + b".") == Stub("os.system")


def test_the_machine_lists_what_it_met(tmp_path):
    torch.save({"w": torch.ones(2), "x": slice(1)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as file:
        machine = PickleMachine()
        machine.run(io.BytesIO(file.read("a/data.pkl")))
    assert machine.storages == {"0": StorageRef("0", torch.float32, 2)}
    assert machine.unknown == {"__builtin__.slice"}
