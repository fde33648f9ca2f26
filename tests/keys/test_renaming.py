"""What becomes of keys and modules."""

from __future__ import annotations

from ckptfix.keys.renaming import unchanged


def test_unchanged_leaves_every_key_and_every_module_as_it_is():
    same = unchanged(["a.weight", "b", "b."])
    assert same.keys == {"a.weight": "a.weight", "b": "b", "b.": "b."}
    assert (same.changed, same.label) == (0, "unchanged")
    assert same.metadata({"": {"version": 1}, "a": {"version": 2}}) == {
        "": {"version": 1},
        "a": {"version": 2},
    }
