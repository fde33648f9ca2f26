"""The safetensors container: the safetensors library as the oracle, and files it would refuse."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptfix import api, door
from ckptfix.bytes.source import BytesSource
from ckptfix.errors import DamagedError, ReadError, UnsafeError, UnsupportedError
from ckptfix.formats import table
from ckptfix.formats.reading import Reading
from ckptfix.formats.safetensors import difference, module_versions, without_ties
from ckptfix.limits import Limits
from ckptfix.tree.document import OrderedMap
from ckptfix.tree.dtypes import BY_NAME, BY_SAFETENSORS
from tests.conftest import SAFETENSORS
from tests.oracles import bits, unlike

if TYPE_CHECKING:
    from pathlib import Path

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def container(header: Any, data: bytes = b"") -> bytes:
    """A file with this header: a value, or text or bytes as they are."""
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    encoded = text.encode() if isinstance(text, str) else text
    return len(encoded).to_bytes(8, "little") + encoded + data


def read(data: bytes, limits: Limits | None = None) -> Any:
    return table.read(BytesSource(data, "x.safetensors"), Reading(limits or Limits()))


def accepted_by_the_library(data: bytes) -> bool:
    try:
        safetensors.torch.load(data)
    except Exception:  # noqa: BLE001 - its errors and those of torch's own functions
        return False
    return True


def convert(value: Any, folder: Path, name: str = "out") -> Path:
    """What torch saves, written as safetensors by ckptfix."""
    torch.save(value, folder / f"{name}.pt")
    api.open(folder / f"{name}.pt").save(folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def back(path: Path) -> Any:
    """A safetensors file made a .pt again, and loaded."""
    api.open(path).save(path.with_suffix(".back.pt"))
    return torch.load(path.with_suffix(".back.pt"), weights_only=True)


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


# --- what is read


@pytest.mark.parametrize("path", SAFETENSORS, ids=lambda path: path.name)
def test_reads_what_the_library_reads(path: Path) -> None:
    loaded = safetensors.torch.load_file(path)
    document = door.read(path)
    assert set(document.root) == set(loaded)
    assert list(document.root) == [key for key in header_of(path) if key != "__metadata__"]
    for key, tensor in loaded.items():
        described = document.root[key]
        assert (described.dtype.name, described.shape) == (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        assert described.storage.spans[0].read() == bits(tensor)


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


TORCH_DTYPES = [
    name for name, row in BY_NAME.items() if row.safetensors and name != "float4_e2m1fn_x2"
]


def every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(256, dtype=torch.uint8)
    made = {name: raw.clone().view(getattr(torch, name)) for name in TORCH_DTYPES if name != "bool"}
    return made | {"bool": raw % 2 == 0}


def test_every_dtype_that_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = every_dtype()
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert unlike(back(tmp_path / "x.safetensors"), OrderedDict(sorted_as_written(tensors))) is None


def sorted_as_written(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    order = list(read(safetensors.torch.save(tensors)).root)
    return [(name, tensors[name]) for name in order]


def test_every_dtype_is_written_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = every_dtype()
    found = safetensors.torch.load_file(convert(tensors, tmp_path))
    assert set(found) == set(tensors)
    assert all(unlike(found[name], tensors[name]) is None for name in tensors)


def test_two_numbers_in_a_byte_are_counted_as_the_library_counts_them(tmp_path: Path) -> None:
    packed = torch.arange(6, dtype=torch.uint8).reshape(2, 3).view(torch.float4_e2m1fn_x2)
    path = convert({"w": packed}, tmp_path)
    assert header_of(path)["w"] == {"dtype": "F4", "shape": [2, 6], "data_offsets": [0, 6]}
    with safetensors.safe_open(path, "pt") as file:
        assert file.get_slice("w").get_shape() == [2, 6]
    again = back(path)["w"]
    assert (again.dtype, again.shape) == (packed.dtype, packed.shape)
    assert bytes(again.untyped_storage()) == bytes(range(6))
    odd = {"w": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}
    with pytest.raises(DamagedError, match=r"x\.safetensors: 'w' of F4 does not fill whole bytes"):
        read(container(odd, bytes(3)))


def test_a_header_padded_with_spaces_is_read() -> None:
    data = container(json.dumps({"w": F32}) + " " * 1000, bytes(8))
    assert accepted_by_the_library(data)
    assert read(data).root["w"].storage.spans[0].offset == len(data) - 8


def test_files_without_tensors_are_read() -> None:
    for header in ({"__metadata__": {"a": "b"}}, {}):
        data = container(header)
        assert accepted_by_the_library(data)
        assert dict(read(data).root) == {}
    assert read(container({"__metadata__": {"a": "b"}})).metadata == {"a": "b"}


def test_metadata_that_is_null_is_none_as_the_library_has_it() -> None:
    data = container({"__metadata__": None, "w": F32}, bytes(8))
    assert [name for name, _ in safetensors.deserialize(data)] == ["w"]
    document = read(data)
    assert (list(document.root), document.metadata) == (["w"], {})


def test_scalars_and_empty_tensors_are_read_and_written(tmp_path: Path) -> None:
    value = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 5), "one": torch.ones(1, 1)}
    path = convert(value, tmp_path)
    assert unlike(dict(back(path)), value) is None
    assert unlike(safetensors.torch.load_file(path)["empty"], value["empty"]) is None


# --- what is written


def test_whatever_is_written_the_library_reads_bit_for_bit(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Every state dict of every fixture that safetensors can hold."""
    opened = api.open(checkpoint)
    for number, state in enumerate(opened.state_dicts):
        if state.role == "optimizer" or checkpoint.name == "dtypes.pt":
            continue
        out = tmp_path / f"{number}.safetensors"
        opened.save(out, select=state.path)
        loaded = safetensors.torch.load_file(out)
        assert set(loaded) <= set(state.tensors)
        assert metadata_of(out)["format"] == "pt"
        read_back = door.read(out).root
        for key, tensor in state.tensors.items():
            found = read_back[key]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            if tensor.is_contiguous and key in loaded:
                begin = tensor.offset * tensor.dtype.itemsize
                meant = tensor.storage.spans[0].slice(begin, tensor.nbytes).read()
                assert bits(loaded[key]) == meant


def test_views_and_turned_tensors_are_written_row_by_row(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    value = {
        "turned": base.T,
        "column": base[:, 2],
        "rows": base[1:3],
        "spread": torch.ones(1).expand(3, 2),
        "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    }
    found = safetensors.torch.load_file(convert(value, tmp_path))
    assert all(unlike(found[key], value[key].resolve_conj()) is None for key in value)


def test_big_endian_numbers_are_turned_round(tmp_path: Path) -> None:
    from tests.formats.test_torch_zip import repacked

    torch.save({"w": torch.arange(5, dtype=torch.int32)}, tmp_path / "x.pt")
    swapped = torch.arange(5, dtype=torch.int32).numpy().byteswap().tobytes()
    repacked(
        tmp_path / "x.pt", tmp_path / "big.pt", {"x/byteorder": b"big", "x/data/0": swapped}
    )  # fmt: skip
    api.open(tmp_path / "big.pt").save(tmp_path / "out.safetensors")
    assert safetensors.torch.load_file(tmp_path / "out.safetensors")["w"].tolist() == [*range(5)]


def test_data_begin_aligned(tmp_path: Path) -> None:
    for length in range(1, 9):
        path = convert({"n" * length: torch.ones(1)}, tmp_path, f"out{length}")
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_ties_are_written_once_recorded_and_restored(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    value = OrderedDict(embed=weight, other=torch.ones(2), head=weight, turned=weight.T)
    path = convert(value, tmp_path)
    assert set(header_of(path)) == {"__metadata__", "embed", "other", "turned"}
    assert metadata_of(path)["head"] == "embed"
    again = back(path)
    assert set(again) == set(value)
    assert all(unlike(again[key], value[key].contiguous()) is None for key in value)
    assert again["head"].data_ptr() == again["embed"].data_ptr()
    assert again["turned"].data_ptr() != again["embed"].data_ptr()


def test_an_alias_does_not_take_the_place_of_a_tensor() -> None:
    header = {"__metadata__": {"w": "v", "gone": "nothing"}, "w": F32, "v": dict(F32)}
    header["v"] = {**F32, "data_offsets": [8, 16]}
    document = read(container(header, bytes(range(16))))
    assert list(document.root) == ["w", "v"]
    assert document.root["w"].storage.spans[0].read() == bytes(range(8))


def test_versions_of_modules_come_back_from_safetensors(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state: Any = net.state_dict()
    again = back(convert(state, tmp_path))
    assert list(again) == list(state)
    assert again._metadata == state._metadata
    assert again._metadata["1"] == {"version": 2}
    assert unlike(again, state) is None


def test_metadata_of_others_is_kept(tmp_path: Path) -> None:
    tensors = {"module.w": torch.ones(2)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"license": "MIT"})
    api.open(tmp_path / "x.safetensors").strip_prefix().save(tmp_path / "out.safetensors")
    assert metadata_of(tmp_path / "out.safetensors") == {"license": "MIT", "format": "pt"}


@pytest.mark.parametrize("checkpoint", SAFETENSORS, ids=lambda path: path.name)
def test_equal_documents_give_equal_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first = tmp_path / "1.safetensors"
    api.open(checkpoint).save(first)
    api.open(first).save(tmp_path / "2.safetensors")
    assert (tmp_path / "2.safetensors").read_bytes() == first.read_bytes()


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 3), max_size=3),
        max_size=5,
    )
)
def test_any_names_and_shapes_go_there_and_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    value = {name: torch.rand(shape) for name, shape in shapes.items()} | {"last": torch.ones(1)}
    torch.save(value, folder / "x.pt")
    out = folder / "x.safetensors"
    if any("\ud800" <= letter <= "\udfff" for name in value for letter in name):
        with pytest.raises(UnsupportedError, match="cannot be the name of a tensor"):
            api.open(folder / "x.pt").save(out)
        return
    api.open(folder / "x.pt").save(out)
    assert unlike(dict(back(out)), value) is None
    found = safetensors.torch.load_file(out)
    assert all(unlike(found[name], value[name]) is None for name in value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "'w' is a complex128 tensor"),
        ({"w": torch.eye(2).to_sparse()}, "'w' is a sparse tensor"),
        ({"w": torch.zeros(2, device="meta")}, "'w' is a meta tensor"),
        ({"__metadata__": torch.zeros(2)}, "'__metadata__' cannot be the name"),
        ({"half \ud800": torch.zeros(2)}, "cannot be the name"),
    ],
)
def test_what_safetensors_cannot_hold_is_named_and_nothing_written(
    value: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        convert(value, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out.pt"]


# --- what is refused


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {**F32, **changes}}


def without(field: str) -> dict[str, Any]:
    return {"w": {key: value for key, value in F32.items() if key != field}}


def two(first: tuple[int, int], second: tuple[int, int]) -> dict[str, Any]:
    return {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }


MALFORMED: dict[str, tuple[Any, type[ReadError], str]] = {
    "overlap": (two((0, 5), (4, 8)), UnsafeError, "'b' overlaps 'a'"),
    "the same bytes twice": (two((0, 8), (0, 8)), UnsafeError, "'b' overlaps 'a'"),
    "hole": (two((0, 3), (4, 8)), UnsafeError, "'b' leaves a hole after 'a'"),
    "hole at the beginning": (two((1, 4), (4, 8)), UnsafeError, "'a' leaves a hole after"),
    "tail": (two((0, 3), (3, 6)), DamagedError, "2 bytes follow the last tensor"),
    "beyond the end": (two((0, 3), (3, 9)), DamagedError, "8 of 9 bytes of tensors are there"),
    "end before begin": (entry(data_offsets=[8, 0]), ReadError, "'w'"),
    "shape and bytes differ": (entry(shape=[3]), DamagedError, "8 bytes instead of 12"),
    "shape overflows": (entry(shape=[1 << 62, 1 << 62]), DamagedError, "'w'"),
    "shape overflows, empty": (
        {"w": {**F32, "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}, "v": F32},
        DamagedError, "'w'",
    ),
    "shape past 64 bits": (entry(shape=[1 << 64]), DamagedError, "the number"),
    "more dimensions than torch has": (entry(shape=[2] + [1] * 64), DamagedError, "'w'"),
    "offsets past 64 bits": (entry(data_offsets=[0, 1 << 64]), DamagedError, "the number"),
    "negative offset": (entry(data_offsets=[-8, 0]), DamagedError, "the number -8"),
    "negative shape": (entry(shape=[-2]), DamagedError, "the number -2"),
    "fractional offset": (entry(data_offsets=[0, 8.0]), DamagedError, "the number 8.0"),
    "offset as a bool": (entry(data_offsets=[False, 8]), DamagedError, "the number False"),
    "shape as a bool": (entry(shape=[2, True]), DamagedError, "the number True"),
    "offset as text": (entry(data_offsets=["0", "8"]), DamagedError, "the number '0'"),
    "three offsets": (entry(data_offsets=[0, 8, 8]), DamagedError, "describes 'w' wrongly"),
    "no offsets": (without("data_offsets"), DamagedError, "describes 'w' wrongly"),
    "no shape": (without("shape"), DamagedError, "describes 'w' wrongly"),
    "no dtype": (without("dtype"), DamagedError, "describes 'w' wrongly"),
    "shape as an object": (
        entry(shape={}, dtype="F64"), DamagedError, "describes 'w' wrongly"
    ),
    "shape as text": (entry(shape="", dtype="F64"), DamagedError, "describes 'w' wrongly"),
    "shape null": (entry(shape=None), DamagedError, "describes 'w' wrongly"),
    "unknown dtype": (entry(dtype="F31"), UnsupportedError, "unknown dtype 'F31'"),
    "dtype as a list": (entry(dtype=["F32"]), UnsupportedError, "unknown dtype"),
    "entry as a list": ({"w": [F32]}, DamagedError, "describes 'w' wrongly"),
    "entry null": ({"w": None}, DamagedError, "describes 'w' wrongly"),
    "key twice": (
        f'{{"w": {json.dumps(F32)}, "w": {json.dumps(F32)}}}', UnsafeError, "key 'w' twice"
    ),
    "field twice": (
        '{"w": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}',
        UnsafeError, "key 'dtype' twice",
    ),
    "metadata as text": ({"__metadata__": "pt", **entry()}, DamagedError, "map text to text"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **entry()}, DamagedError, "text to text"),
    "not JSON": ('{"w": ', DamagedError, "the header is not JSON"),
    "JSON and more": (json.dumps(entry()) + "{}", DamagedError, "the header is not JSON"),
    "zeros after JSON": (json.dumps(entry()) + "\0\0", DamagedError, "the header is not JSON"),
    "NaN": ('{"w": NaN}', DamagedError, "'w'"),
    "deep JSON": ('{"a":' * 100_000, DamagedError, "the header is not JSON"),
    "UTF-16": (json.dumps(entry()).encode("utf-16-le"), DamagedError, "the header is not JSON"),
    "not UTF-8": (b'{"\xff": {}}', DamagedError, "the header is not JSON"),
    "half a surrogate pair": (
        '{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        DamagedError, "surrogate",
    ),
    "a number of 5000 digits": ('{"w": ' + "9" * 5000 + "}", DamagedError, "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers_are_refused(case: str) -> None:
    header, error, words = MALFORMED[case]
    with pytest.raises(error, match=words) as caught:
        read(container(header, bytes(8)))
    assert caught.value.message.startswith("x.safetensors: ")
    assert len(caught.value.message) < 500


def test_whatever_the_library_refuses_is_refused() -> None:
    """And what it accepts among these is known: its JSON parser keeps the last of equal keys."""
    accepted = {
        case
        for case, (header, _, _) in MALFORMED.items()
        if accepted_by_the_library(container(header, bytes(8)))
    }
    assert accepted <= {"key twice", "more dimensions than torch has"}


def test_a_header_that_announces_more_than_100_mb_is_refused() -> None:
    data = (100_000_001).to_bytes(8, "little") + b'{"w": '
    with pytest.raises(UnsafeError, match="announces a header of 100000001 bytes"):
        read(data)
    with pytest.raises(UnsafeError, match="more than 10 are refused"):
        read(container({"w": F32}, bytes(8)), Limits(header_bytes=10))


def test_cut_anywhere_it_is_refused() -> None:
    data = container({"w": F32, "v": {**F32, "data_offsets": [8, 16]}}, bytes(16))
    for length in range(len(data)):
        with pytest.raises(ReadError) as caught:
            read(data[:length])
        assert caught.value.message.startswith("x.safetensors: ")


@given(st.data())
def test_any_damage_is_refused_or_the_library_agrees(data: Any) -> None:
    """What ckptfix accepts the library accepts too, and reads the same bytes."""
    good = container({"__metadata__": {"a": "b"}, "w": F32, "v": {**F32, "data_offsets": [8, 16]}},
                     bytes(range(16)))  # fmt: skip
    place = data.draw(st.integers(0, len(good) - 1))
    bad = good[:place] + bytes([data.draw(st.integers(0, 255))]) + good[place + 1 :]
    try:
        document = read(bad)
    except ReadError:
        return
    loaded = safetensors.torch.load(bad)
    assert set(document.root) == set(loaded)
    for name, tensor in document.root.items():
        assert tensor.storage.spans[0].read() == bits(loaded[name])


def test_the_table_of_dtypes_is_the_librarys() -> None:
    """Sizes as the library counts them: a file with one tensor of each dtype opens."""
    for name, row in BY_SAFETENSORS.items():
        header = {
            "w": {"dtype": name, "shape": [2 * row.packed], "data_offsets": [0, 2 * row.itemsize]}
        }
        found = safetensors.deserialize(container(header, bytes(2 * row.itemsize)))
        assert found[0][1]["dtype"] == name


def test_four_bits_that_do_not_fill_bytes_are_refused() -> None:
    entry = {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}
    with pytest.raises(DamagedError, match="does not fill whole bytes"):
        read(container({"w": entry}, bytes(2)))


def test_what_reads_back_otherwise_is_named() -> None:
    both = read(container({"w": F32, "v": {**F32, "data_offsets": [8, 16]}}, bytes(16)))
    one = read(container({"w": F32}, bytes(8)))
    flat = read(container({"w": {**F32, "shape": [1, 2]}}, bytes(8)))
    listed = replace(one, root=OrderedMap([("w", [1])]))
    assert difference(one, one) is None
    assert (difference(both, one), difference(one, both)) == ("v", "v")
    assert difference(one, flat) == "w"
    assert (difference(listed, one), difference(one, listed)) == ("w", "w")


def test_only_tensors_and_plain_versions_are_kept() -> None:
    with pytest.raises(UnsupportedError, match="'epoch' is not a tensor"):
        without_ties({"epoch": 3})
    versions = OrderedMap()
    versions.attributes = {"_metadata": {"": {"version": b"bytes"}}}
    with pytest.raises(UnsupportedError, match="what safetensors cannot keep"):
        module_versions(versions)
