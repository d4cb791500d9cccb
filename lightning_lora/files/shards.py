"""Read folders of torch.distributed.checkpoint: files of shards, and a pickle that says where each shard lies.

torch reads that pickle with pickle.load, which runs any code that it names. Here it is data: nothing is imported or
called. A shard is an archive of torch.save inside a file, and is checked as such a file is.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ..errors import LoRAError, sentence, shown
from .inert_pickle import DescribingUnpickler
from .limits import PICKLE_BYTES, check, check_names
from .paths import PathLike, kind_of
from .pickle_check import check_pickle
from .torch_archive import read_part

DESCRIPTION = ".metadata"  # torch's name of the pickle
STATE = "state_dict"  # Lightning's key of the model's state
METADATA, PATHS = "torch.distributed.checkpoint.metadata", ("PosixPath", "WindowsPath")
CLASSES = ("Metadata", "MetadataIndex", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")
STORAGES = ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")
WRITTEN = {  # what torch names in a description, by module
    METADATA: (*CLASSES, *STORAGES),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": PATHS,
    "pathlib._local": PATHS,
}
OF_TENSORS = ".TensorStorageMetadata"  # torch's class of what it says of a tensor; an object has another

Keys = tuple[str | int, ...]  # those that lead to a value in nested dictionaries and lists


@dataclass(frozen=True)
class Entry:
    """What the description says of a tensor, or of an object: that one has no dtype.

    Attributes:
        keys: those that lead to the value in the saved dictionary.
        shape: of the whole tensor.
        dtype: of the tensor.
        parts: where each shard begins in the tensor, and its sizes.
    """

    keys: Keys
    shape: torch.Size
    dtype: torch.dtype | None
    parts: tuple[tuple[torch.Size, torch.Size], ...]

    def nbytes(self) -> int:
        """Return the size of the whole tensor in bytes."""
        return self.shape.numel() * self.dtype.itemsize if self.dtype is not None else 0


@dataclass(frozen=True)
class _Shard:
    """Where a part of a value lies in a file, and in the tensor."""

    file: Path
    start: int
    end: int
    window: tuple[slice, ...]
    sizes: torch.Size

    def read(self) -> Any:
        """Read and check the part."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            return read_part(file.read(self.end - self.start), str(self))

    def __str__(self) -> str:
        """Return the place, for messages."""
        return f"{self.file}: bytes {self.start} to {self.end}"


def is_sharded(path: PathLike) -> bool:
    """Return whether a folder is one of torch.distributed.checkpoint."""
    return kind_of(Path(path) / DESCRIPTION) != "nothing"


class ShardedFolder:
    """A folder that torch.distributed.checkpoint wrote, from any number of processes.

    Attributes:
        entries: what is in it, by torch's names: the keys with dots between them.
    """

    def __init__(self, folder: Path) -> None:
        """Read the description.

        Raises:
            LoRAError: it is missing or damaged.
        """
        self.path = folder / DESCRIPTION
        _require(self.path)
        check(PICKLE_BYTES, self.path.stat().st_size, self.path)
        content = self.path.read_bytes()
        check_pickle(content, self.path)
        with self._reading():
            unpickler = DescribingUnpickler(io.BytesIO(content))
            state = unpickler.load().state
            self._foreign = sorted(name for name in vars(unpickler)["named"] if not _is_torchs(name))
            keys = state["planner_data"] if isinstance(state.get("planner_data"), dict) else {}
            described = state["state_dict_metadata"]
            self.entries = {
                name: _entry(name, keys.get(name, _keys_in(name)), each) for name, each in described.items()
            }
            self._places = state.get("storage_data")
        check_names(self.entries, self.path)

    def refuse_code(self) -> None:
        """Raise LoRAError where the description names what torch does not write: torch would import and call it."""
        if self._foreign:
            raise LoRAError(
                f"{self.path}: names {shown(self._foreign[0], 80)}, which torch would import and call. It is no "
                "description of shards as torch writes it; do not load this folder."
            )

    def read(self, names: Collection[str]) -> dict[str, Any]:
        """Read values by torch's names. An object of no plain type becomes a placeholder.

        Raises:
            LoRAError: a file of shards is missing or damaged, or does not hold what the description says.
        """
        if not names:
            return {}
        with self._reading():
            places = {(i.state["fqn"], i.state.get("offset")): place.state for i, place in self._places.items()}
            shards = {name: list(self._shards(name, places)) for name in names}
        self._check_sizes(shards)
        return {name: self._value(name, parts) for name, parts in shards.items()}

    def nested(self, values: Mapping[str, Any]) -> dict[Any, Any]:
        """Return the dictionaries and lists in which values were saved. A key that is a number is a place in a list.

        Args:
            values: by torch's names.
        """
        whole: dict[Any, Any] = {}
        with self._reading():
            for name, value in values.items():
                place, (*parents, last) = whole, self.entries[name].keys
                for key in parents:
                    place = place.setdefault(key, {})
                place[last] = value
            return {key: _with_lists(value) for key, value in whole.items()}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except LoRAError:
            raise
        except Exception as error:  # of a damaged file unpickling raises anything
            raise LoRAError(f"{self.path}: cannot be read as the description of shards: {sentence(error)}") from error

    def _shards(self, name: str, places: Mapping[tuple[str, torch.Size | None], Mapping[str, Any]]) -> Iterator[_Shard]:
        """Find the shards of a value, without those that are empty."""
        entry = self.entries[name]
        for offset, sizes in entry.parts if entry.dtype is not None else [(None, torch.Size())]:
            if not sizes.numel():
                continue
            if (name, offset) not in places:
                raise LoRAError(f"{self.path}: does not say where {name!r} lies; the folder is damaged.")
            place = places[name, offset]
            file, start, length = place["relative_path"], place["offset"], place["length"]
            if place.get("transform_descriptors"):
                raise LoRAError(f"{self.path}: {name!r} is stored as {shown(place, 80)}, which is not known here.")
            if not isinstance(file, str) or Path(file).name != file or file == "..":
                raise LoRAError(f"{self.path}: {name!r} lies in {shown(file, 80)}, outside of the folder.")
            window = tuple(slice(first, first + size) for first, size in zip(offset or (), sizes, strict=True))
            inside = (0 <= each.start <= each.stop <= size for each, size in zip(window, entry.shape, strict=True))
            if not all(inside) or start < 0 or length < 0:
                raise ValueError(f"a part of {name!r} lies outside of it")
            yield _Shard(self.path.parent / file, start, start + length, window, sizes)

    def _check_sizes(self, shards: Mapping[str, list[_Shard]]) -> None:
        """Raise LoRAError where the files are shorter than the description says, or would be read more than once."""
        ordered = sorted(chain.from_iterable(shards.values()), key=attrgetter("file", "start"))
        for file, parts in groupby(ordered, key=attrgetter("file")):
            _require(file)
            listed, size = list(parts), file.stat().st_size
            if listed[-1].end > size or any(one.end > other.start for one, other in pairwise(listed)):
                raise LoRAError(
                    f"{file}: has {size} bytes, and does not hold what {DESCRIPTION} says: shards overlap, or the file "
                    "was cut. Copy the folder again."
                )
        held = sum(shard.end - shard.start for shard in ordered)
        claimed = sum(self.entries[name].nbytes() for name in shards)
        if claimed > held:
            raise LoRAError(f"{self.path}: its tensors claim {claimed} bytes, and {held} are stored; it is damaged.")

    def _value(self, name: str, shards: list[_Shard]) -> Any:
        entry = self.entries[name]
        if entry.dtype is None:
            return shards[0].read()
        if len(shards) == 1 and shards[0].sizes == entry.shape:
            return self._part(name, shards[0])
        whole, missing = torch.empty(entry.shape, dtype=entry.dtype), torch.ones(entry.shape, dtype=torch.bool)
        for shard in shards:
            whole[shard.window], missing[shard.window] = self._part(name, shard), False
        if missing.any():
            raise LoRAError(f"{self.path}: parts of {name!r} are stored nowhere; the folder is damaged.")
        return whole

    def _part(self, name: str, shard: _Shard) -> torch.Tensor:
        part, expected = shard.read(), (shard.sizes, self.entries[name].dtype)
        if type(part) is not torch.Tensor or part.is_meta or (part.shape, part.dtype) != expected:
            file, start, end = shard.file, shard.start, shard.end
            raise LoRAError(
                f"{file}: what lies at bytes {start} to {end} is not the part of {name!r} that {DESCRIPTION} says; the "
                "folder is damaged."
            )
        return part


def _require(file: Path) -> None:
    if kind_of(file) != "file":
        raise LoRAError(f"{file}: is missing, so that the distributed checkpoint is not whole; copy its folder again.")


def _is_torchs(name: str) -> bool:
    """Return whether torch writes this name of a class or function into a description."""
    module, _, last = name.rpartition(".")
    return last in WRITTEN.get(module, ()) or (module == "torch" and isinstance(vars(torch).get(last), torch.dtype))


def _keys_in(name: str) -> Keys:
    """Return the keys of a value whose description has none."""
    return (STATE, name.removeprefix(f"{STATE}.")) if name.startswith(f"{STATE}.") else (name,)


def _entry(name: str, keys: Any, described: Any) -> Entry:
    """Take what the description says of a value. Raises any exception where it is damaged."""
    are_keys = isinstance(keys, tuple) and all(type(key) in (str, int) for key in keys)
    if not are_keys or ".".join(map(str, keys)) != name:
        raise ValueError(f"the keys of {shown(name, 80)} are {shown(keys, 80)}")
    if not described.stands_for.endswith(OF_TENSORS):
        return Entry(keys, torch.Size(), None, ())
    state = described.state
    shape, dtype = torch.Size(state["size"]), state["properties"].state[0]
    torch.empty(shape, dtype=dtype, device="meta")  # which refuses what no tensor has
    parts = [(torch.Size(part.state["offsets"]), torch.Size(part.state["sizes"])) for part in state["chunks"]]
    return Entry(keys, shape, dtype, tuple(parts))


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    parts = {key: _with_lists(part) for key, part in value.items()}
    places = range(len(parts))
    return [parts[i] for i in places] if parts and parts.keys() == set(places) else parts
