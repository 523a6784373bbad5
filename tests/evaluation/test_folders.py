"""Which folder is which class: by evidence, or a question, never a guess."""

from __future__ import annotations

import pytest

from vssm.evaluation.data import open_images
from vssm.evaluation.folders import match_folders

CATS = ["cat", "dog", "eel", "fox"]


def match(folders, labels=None, classes=None, num_classes=None):
    count = len(labels or folders) if num_classes is None else num_classes
    return match_folders("images=val", sorted(folders), count, labels=labels, classes=classes)


def test_labels_in_any_order_are_matched_by_name():
    labels = ["fox", "cat", "eel", "dog"]
    found = match(CATS, labels)
    assert list(found.names) == labels
    assert found.rule == "matched to the model's labels by name"
    numbers = [str(i) for i in range(12)]
    assert list(match(numbers, numbers).names) == numbers
    assert list(match(["eel", "cat"], labels).names) == labels  # a part of the classes


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat", "dog", "eel", "wolf"], r"3 of its 4 folders .* 'wolf' does not; give each"),
        (["Cat", "Dog", "Eel", "Fox"], r"0 of its 4 folders .* 'Cat' does not, much like .* 'cat'"),
        (["cat", "dog", "eel", "fox", "gnu"], r"4 of its 5 folders .* 'gnu' does not"),
    ],
)
def test_names_that_are_nearly_labels_are_asked_about(folders, message):
    with pytest.raises(ValueError, match=message + r".* with --classes FILE"):
        match(folders, CATS, num_classes=4)


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("black_cat", "black cat"),
        ("black-cat", "Black Cat"),
        ("tench", "tench, Tinca tinca"),
        ("garc\u0327on", "gar\u00e7on"),  # one letter in two forms
        ("07", "7"),
    ],
)
def test_one_name_in_another_spelling_is_asked_about(folder, label):
    with pytest.raises(ValueError, match=r"much like the label"):
        match([folder, "other"], [label, "another"])


def test_a_label_of_two_classes_is_asked_about():
    with pytest.raises(ValueError, match=r"'crane', which is the label of the classes 0 and 2"):
        match(["crane", "dog"], ["crane", "dog", "crane"])


@pytest.mark.parametrize(
    ("folders", "orders"),
    [
        ([str(i) for i in range(12)], r"\(0, 1, 10, 11, 2, ...\) than as numbers \(0, 1, 2, 3, 4"),
        (["1", "2", "10"], r"\(1, 10, 2\) than as numbers \(1, 2, 10\)"),
        (["00", "1", "10", "2"], r"\(00, 1, 10, 2\) than as numbers \(00, 1, 2, 10\)"),
        (["1", "01", "2"], r"\(01, 1, 2\) than as numbers \(1, 01, 2\)"),
        (["class_1", "class_2", "class_10"], r"\(class_1, class_10, class_2\)"),
        (["1_cat", "2_dog", "10_eel"], r"\(10_eel, 1_cat, 2_dog\)"),
        (["-1", "-2", "3"], r"than as numbers \(-2, -1, 3\)"),
        (["0.5", "1.5", "10.5", "2.5"], r"than as numbers \(0.5, 1.5, 2.5, 10.5\)"),
        (["1", "2", "10", "unknown"], r"than as numbers \(1, 2, 10, unknown\)"),
        ([f"{i:02}" for i in range(101)], r"\(..., 09, 10, 100, 11, 12, ...\)"),
    ],
)
def test_numbers_in_two_orders_are_asked_about(folders, orders):
    with pytest.raises(ValueError, match=orders) as caught:
        match(folders)
    assert "--classes numeric or --classes text" in str(caught.value)
    assert "--classes FILE" in str(caught.value)
    with pytest.raises(
        ValueError, match=r"in another order as text"
    ):  # other labels change nothing
        match(
            folders, [f"label {chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(len(folders))]
        )


@pytest.mark.parametrize(
    "folders",
    [
        [str(i) for i in range(10)],
        [f"{i:02}" for i in range(12)],
        ["n01440764", "n01443537", "n02999410"],
        [f"{i:03}.bird" for i in range(1, 30)],
        ["a10", "a2b", "b1"],
        ["v2", "w10"],
        CATS,
    ],
)
def test_one_order_is_taken_and_said(folders):
    assert list(match(folders).names) == sorted(folders)
    assert match(folders).rule == "the i-th folder by name is class i; the model has no labels"
    synsets = match(["n01", "n02"], ["tench", "goldfish"])
    assert synsets.rule == "the i-th folder by name is class i; no folder has the name of a label"


def test_classes_says_which_order(tmp_path):
    numbers = [str(i) for i in range(12)]
    assert list(match(numbers, classes="numeric").names) == numbers
    assert list(match(numbers, classes="text").names) == sorted(numbers)
    assert (
        match(numbers, classes="numeric").rule
        == "--classes numeric: the folders in order of number"
    )
    assert list(match(["c10", "c9"], classes="numeric").names) == ["c9", "c10"]
    with pytest.raises(ValueError, match=r"the folder 'cat' is not a number; say --classes text"):
        match(["cat", "1"], classes="numeric")
    with pytest.raises(ValueError, match=r"'01' and '1' are the same number"):
        match(["1", "01"], classes="numeric")
    with pytest.raises(ValueError, match=r"12 folders, but the model has 13 classes"):
        match(numbers, classes="text", num_classes=13)
    file = tmp_path / "numeric"
    file.write_text("b\na\n")
    assert match(["a", "b"], classes=file).names == ("b", "a")
    assert match(["a", "b"], classes=str(file)).rule == "named by the file numeric"


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "names.txt"

    def given(names, folders, **options):
        file.write_text("\n".join(names))
        return match(folders, classes=file, **options)

    assert given(["d", "a", "b"], ["a", "b"], num_classes=3).names == ("d", "a", "b")
    with pytest.raises(ValueError, match=r"names 2 classes on 2 lines, but the model has 3"):
        given(["a", "b"], ["a", "b", "c"])
    with pytest.raises(
        ValueError, match=r"'Cat', which is not a class of .*\(the file has 'cat'\); 1 of 2"
    ):
        given(["cat", "dog"], ["Cat", "dog"])
    with pytest.raises(ValueError, match=r"folder 'a' is named for the classes 1 and 2; name"):
        given(["b", "a", "a"], ["a", "b", "c"])
    with pytest.raises(
        ValueError, match=r"'dog' is class 0, but the model's labels call class 1 so"
    ):
        given(["dog", "cat"], ["cat", "dog"], labels=["cat", "dog"])
    with pytest.raises(
        ValueError, match=r"'10' is class 1, but the model's labels call class 2 so"
    ):
        match(["1", "2", "10"], ["1", "2", "10"], classes="text")


def test_counts_and_parts_of_a_data_set_are_refused():
    with pytest.raises(ValueError, match=r"3 folders, but the model has 4 classes; give one for"):
        match(["a", "b", "c"], num_classes=4)
    with pytest.raises(ValueError, match=r"folders train, val, which are parts of a data set"):
        match(["train", "val"])
    assert match(["train", "val"], ["val", "train"]).names == ("val", "train")
    with pytest.raises(ValueError, match=r"labels=3 names for 2 classes"):
        match(["a", "b"], ["a", "b", "c"], num_classes=2)


def _write(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def test_what_lies_about_is_said(tmp_path):
    _write(tmp_path, "a/1.png", "a/x/2.png", "a/.x/3.png", "readme.txt", ".git/config")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").symlink_to("nowhere")
    found = open_images(tmp_path, 2)
    assert [p.path for p in found.pictures] == ["a/1.png", "a/x/2.png"]
    assert found.notes == (
        "files beside the class folders are not read: c, readme.txt",
        "folders inside class folders count for the class: a/x",
        "hidden files and folders are passed over: .git, a/.x",
        "1 of 2 classes have no images: b",
    )
    (tmp_path / "c").unlink()
    (tmp_path / "c").symlink_to("a")
    with pytest.raises(ValueError, match=r"'a' and 'c', which are one folder by a link"):
        open_images(tmp_path, 3)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    _write(tmp_path, "a/1.png", "b/1.png")

    def walk(top, *, followlinks, onerror):
        onerror(PermissionError(13, "Permission denied", str(top)))
        return iter(())

    monkeypatch.setattr("vssm.evaluation.data.os.walk", walk)
    with pytest.raises(ValueError, match=r"folder .*/a cannot be read \(Permission denied\); make"):
        open_images(tmp_path, 2)
