"""GPUs by the names that people call them: memory, and peak in the matmuls of training."""

import re
from dataclasses import dataclass

from onetrain import flops
from onetrain.config import UserError, nearest

PER_NODE = 8  # GPUs of a machine with more than one

# as called here: (as torch calls it, 1e9 bytes that the vendor's data sheet gives)
_CARDS = {
    'RTX-3090': ('NVIDIA GeForce RTX 3090', 24),
    'RTX-4090': ('NVIDIA GeForce RTX 4090', 24),
    'A6000': ('NVIDIA RTX A6000', 48),
    'L40S': ('NVIDIA L40S', 48),
    'A100-40': ('NVIDIA A100-SXM4-40GB', 40),
    'A100-80': ('NVIDIA A100-SXM4-80GB', 80),
    'H100': ('NVIDIA H100 80GB HBM3', 80),
    'H200': ('NVIDIA H200', 141),
    'B200': ('NVIDIA B200', 180),
}
_OTHER_NAMES = {'a100': 'A100-80', 'h10080': 'H100'}


@dataclass(frozen=True)
class Machine:
    """`count` GPUs of one kind.

    memory: bytes of each; torch_name: as torch calls the GPU, None where only its memory is known.
    """

    count: int
    name: str
    memory: float
    torch_name: str | None

    @property
    def nodes(self) -> int:
        """Return over how many machines the GPUs are spread."""
        return -(-self.count // PER_NODE)

    def peak(self, dtype: str) -> float | None:
        """Return the FLOP/s of all GPUs at their peak, None where it is not known."""
        one = flops.peak_flops(self.torch_name, dtype)
        return one and one * self.count

    def describe(self) -> str:
        """Return such as '8 x A100-80'."""
        return f'{self.count} x {self.name}'


def parse_machines(text: str) -> list[Machine]:
    """Return the machines of a list such as '8xA100-80,1xH200,2x24GB'. Raises UserError."""
    words = [word.strip() for word in text.split(',') if word.strip()]
    if not words:
        raise UserError('--gpus= names no GPU: type such as --gpus=8xH100')
    return [_parse(word) for word in words]


def _parse(word):
    match = re.match(r'(\d{1,6})\s*[x*×]\s*', word)
    count, name = (int(match[1]), word[match.end() :]) if match else (1, word)
    if not 1 <= count <= 10**4:
        raise UserError(f'--gpus={word}: type from 1 to 10,000 GPUs')
    if count > PER_NODE and count % PER_NODE:
        below = count // PER_NODE * PER_NODE
        raise UserError(
            f'--gpus={word}: machines have {PER_NODE} GPUs each: type {below}x{name} or'
            f' {below + PER_NODE}x{name}'
        )
    if size := re.fullmatch(r'(\d{1,4}(?:\.\d+)?)\s*GB', name, re.IGNORECASE):
        if not 1 <= float(size[1]):
            raise UserError(f'--gpus={word}: {name} is less than 1 GB')
        return Machine(count, f'{float(size[1]):g}GB', float(size[1]) * 1e9, None)
    known = {_plain(card): card for card in _CARDS} | _OTHER_NAMES
    found = known.get(_plain(name))
    if found is None:
        raise UserError(
            f'--gpus={word}: no GPU {name!r} is known{nearest(name.upper(), [*_CARDS])}: type one'
            f' of {", ".join(_CARDS)}, or its memory, as {count}x24GB'
        )
    torch_name, gigabytes = _CARDS[found]
    return Machine(count, found, gigabytes * 1e9, torch_name)


def _plain(name):
    """Return a name without what people write in different ways."""
    return re.sub(r'nvidia|geforce|rtx|gb$|[^a-z0-9]', '', name.lower())
