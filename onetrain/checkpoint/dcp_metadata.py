"""Read the .metadata of a checkpoint, which anybody may have made, as a description of tensors.

    state_dict_metadata   {name of a tensor: its dtype, its size, the chunks that it was cut into}
    storage_data          {(name, offset of a chunk): its file, its first byte, its bytes}

It is a pickle, and no object of it is used. What it names are stand-ins made for this one file,
which keep what they are given and do nothing; torch's objects are then made from plain values that
were checked: the chunks of a tensor cover it exactly, and each lies in a file of the checkpoint,
where no other lies.
"""

import io
import itertools
import math
import pickle

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from onetrain.files import is_whole, plain_name, refuse_deep_pickle

_METADATA = 'torch.distributed.checkpoint.metadata'
_FILESYSTEM = 'torch.distributed.checkpoint.filesystem'
_CLASSES = [
    (_METADATA, name)
    for name in (
        'Metadata',
        'MetadataIndex',
        'TensorStorageMetadata',
        'ChunkStorageMetadata',
        'TensorProperties',
        'StorageMeta',
    )
] + [(_FILESYSTEM, '_StorageInfo')]
_FUNCTIONS = [
    (_METADATA, '_MEM_FORMAT_ENCODING'),
    ('torch.serialization', '_get_layout'),
    ('pathlib', 'PosixPath'),
]
_DTYPES = {
    str(dtype).removeprefix('torch.'): dtype
    for dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}
_PAIRWISE = 4096  # chunks of a tensor that may be cut along several dimensions


class _Function:
    """Stands for something that a pickle calls: `answer` takes the arguments. Has no attributes."""

    __slots__ = ('answer',)

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, *args):
        return self.answer(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError('it sets an attribute of a function')


class _Unpickler(pickle.Unpickler):
    def __init__(self, data):
        super().__init__(io.BytesIO(data))
        self.kinds = {name: self._class(name[1]) for name in _CLASSES}
        self.kinds.update({name: _Function(lambda *_: None) for name in _FUNCTIONS})
        self.kinds.update({('torch', name): dtype for name, dtype in _DTYPES.items()})
        self.kinds['torch', 'Size'] = _Function(tuple)
        self.kinds['collections', 'OrderedDict'] = _Function(dict)

    @staticmethod
    def _class(name):
        def keep(self, state):
            self.state = state

        return type(name, (), {'__slots__': ('state',), '__setstate__': keep})

    def find_class(self, module, name):
        if (module, name) not in self.kinds:
            raise pickle.UnpicklingError(
                f'it asks for {module}.{name}, which does not describe a tensor and is not admitted'
            )
        return self.kinds[module, name]


def parse(data: bytes, files: dict[str, dict]):
    """Return the torch.distributed.checkpoint.metadata.Metadata in the bytes of a .metadata.

    files: {name: {'size': bytes, ...}} of its manifest. Raises ValueError unless it describes
    tensors whose every part lies in one of these.
    """
    try:
        refuse_deep_pickle(data)
        unpickler = _Unpickler(data)
        found = unpickler.load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f'{type(error).__name__}: {str(error)[:200]}') from None

    def fields(value, kind):
        """Return the dict of what an object of the class `kind` was given; {} for anything else."""
        state = getattr(value, 'state', None) if type(value) is unpickler.kinds[kind] else None
        return (
            state if isinstance(state, dict) and all(isinstance(key, str) for key in state) else {}
        )

    top = fields(found, (_METADATA, 'Metadata'))
    entries, places = top.get('state_dict_metadata'), top.get('storage_data')
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise ValueError('it does not describe tensors')
    tensors = {}
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise ValueError(f'{str(name)[:60]} is the name of a tensor')
        tensors[name] = _tensor(
            name, fields(entry, (_METADATA, 'TensorStorageMetadata')), fields, unpickler.kinds
        )
    storage = {}
    for index, place in places.items():
        index = fields(index, (_METADATA, 'MetadataIndex'))
        place = fields(place, (_FILESYSTEM, '_StorageInfo'))
        name, offset = index.get('fqn'), index.get('offset')
        if (
            not isinstance(name, str)
            or not _whole_numbers(offset)
            or place.get('transform_descriptors')
            or not is_whole(place.get('offset'))
            or not is_whole(place.get('length'))
        ):
            raise ValueError('it says of a tensor not where it lies')
        # MetadataIndex.index is a hint alone, and no part of what makes two of them equal
        storage[MetadataIndex(name, torch.Size(offset))] = _StorageInfo(
            plain_name(place.get('relative_path'), 'it'), place['offset'], place['length']
        )
    if len(storage) != len(places):
        raise ValueError('it says of a tensor twice where it lies')
    _check_places(tensors, storage, files)
    return Metadata(state_dict_metadata=tensors, storage_data=storage)


def _whole_numbers(values):
    return isinstance(values, tuple) and all(is_whole(value) for value in values)


def _tensor(name, entry, fields, kinds):
    """Return the TensorStorageMetadata of a tensor from the fields of the one in the pickle."""
    properties, size, chunks = entry.get('properties'), entry.get('size'), entry.get('chunks')
    properties = (
        getattr(properties, 'state', None)
        if type(properties) is kinds[_METADATA, 'TensorProperties']
        else None
    )
    if (
        not isinstance(properties, tuple)
        or not properties
        or not isinstance(properties[0], torch.dtype)
        or not _whole_numbers(size)
        or not isinstance(chunks, list)
    ):
        raise ValueError(f'{name[:60]} is not described as a tensor')
    made = []
    for chunk in chunks:
        chunk = fields(chunk, (_METADATA, 'ChunkStorageMetadata'))
        offsets, sizes = chunk.get('offsets'), chunk.get('sizes')
        if (
            not _whole_numbers(offsets)
            or not _whole_numbers(sizes)
            or not len(offsets) == len(sizes) == len(size)
            or any(offset + extent > whole for offset, extent, whole in zip(offsets, sizes, size))
        ):
            raise ValueError(f'{name[:60]} has a part outside of itself')
        made.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    filled = [chunk for chunk in made if math.prod(chunk.sizes)]
    if sum(math.prod(chunk.sizes) for chunk in filled) != math.prod(size) or _overlap(filled, size):
        raise ValueError(f'the parts of {name[:60]} do not make it up')
    return TensorStorageMetadata(TensorProperties(dtype=properties[0]), torch.Size(size), made)


def _overlap(chunks, size):
    """Return whether some of `chunks`, parts of a tensor of shape `size`, share an element."""
    cut = [d for d, whole in enumerate(size) if any(chunk.sizes[d] != whole for chunk in chunks)]
    if len(cut) <= 1:
        spans = (
            sorted(
                (chunk.offsets[d], chunk.offsets[d] + chunk.sizes[d])
                for chunk in chunks
                for d in cut or [0]
            )
            if size
            else [(0, 1)] * len(chunks)
        )
        return any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans))
    if len(chunks) > _PAIRWISE:
        raise ValueError(f'a tensor is cut into {len(chunks):,} parts along {len(cut)} dimensions')
    return any(
        all(
            a.offsets[d] < b.offsets[d] + b.sizes[d] and b.offsets[d] < a.offsets[d] + a.sizes[d]
            for d in cut
        )
        for a, b in itertools.combinations(chunks, 2)
    )


def _check_places(tensors, storage, files):
    """Raise ValueError unless every chunk has bytes in one of `files` that nothing else has."""
    wanted, ranges = 0, {}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            place = storage.get(MetadataIndex(name, chunk.offsets))
            count = math.prod(chunk.sizes)
            if place is None and not count:
                continue
            wanted += 1
            if place is None:
                raise ValueError(f'it does not say where {name[:60]} lies')
            if (
                not place.relative_path.endswith('.distcp')
                or place.offset + place.length
                > files.get(place.relative_path, {'size': -1})['size']
            ):
                raise ValueError(
                    f'{name[:60]} lies in {place.relative_path} from byte {place.offset} '
                    f'to {place.offset + place.length}, which is not there'
                )
            if place.length < count * tensor.properties.dtype.itemsize:
                raise ValueError(
                    f'{name[:60]} does not fit into the {place.length} bytes '
                    'that it is said to have'
                )
            ranges.setdefault(place.relative_path, []).append(
                (place.offset, place.offset + place.length)
            )
    if wanted != len(storage):
        raise ValueError('it says where something lies that it does not describe')
    for name, taken in ranges.items():
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(sorted(taken))):
            raise ValueError(f'two tensors lie at the same place of {name}')
