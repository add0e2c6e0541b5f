"""
Say what this machine has for training, what it lacks, and what to type about it.

    python3 start.py doctor
    python3 start.py doctor --url s3://bucket/folder    can --upload_to write there?
    python3 start.py doctor --json

Exit code 0, or 1 where something keeps runs from starting.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from onetrain import __version__, cpu
from onetrain.command_line import ROOT, ArgumentParser, run_command

PACKAGES = {  # name: (what it is for, how it is installed, whether training needs it)
    'torch': ('tensors and kernels', 'python3 start.py setup', True),
    'numpy': ('token files', 'python3 start.py setup', True),
    'tqdm': ('progress bars', 'python3 start.py setup', True),
    'fsspec': ('buckets', 'python3 start.py setup', True),
    'matplotlib': ('pictures', 'pip install -r requirements.txt', False),
    'tokenizers': ('byte-level BPE', "pip install -e '.[data]'", False),
    'tiktoken': ("GPT-2's tokenizer", "pip install -e '.[data]'", False),
    'gigatoken': ('faster tokenizing', "pip install -e '.[data]'", False),
    'sentencepiece': ("LLaMA-2's tokenizer", "pip install -e '.[data]'", False),
    'pyarrow': ('.parquet files', "pip install -e '.[data]'", False),
    'zstandard': ('.jsonl.zst files', "pip install -e '.[data]'", False),
    'safetensors': ('weights of Hugging Face, export', "pip install -e '.[hf]'", False),
    'huggingface_hub': ('models and data of the hub', "pip install -e '.[hf]'", False),
    'transformers': ('comparing an export', "pip install -e '.[hf]'", False),
    's3fs': ('s3:// URLs', "pip install -e '.[s3]'", False),
    'torchao': ('--fp8=True', "pip install -e '.[fp8]'", False),
}
KERNELS = {  # package: the attention_backend that it brings
    'flash_attn': 'flash_attn_2',
    'flash_attn_interface': 'flash_attn_3',
}


@dataclass
class Finding:
    """One line: state is 'ok', 'note' or 'problem'; remedy: what to type, or None."""

    subject: str
    state: str
    text: str
    remedy: str | None = None


def python_and_packages() -> Iterator:
    """Yield Findings about Python and the packages that the project can use."""
    version = platform.python_version()
    good = (3, 10) <= sys.version_info[:2] <= (3, 13)
    remedy = None if good else 'use Python 3.10 to 3.13'
    yield Finding('Python', 'ok' if good else 'problem', f'{version}, {sys.executable}', remedy)
    missing = {}
    for name, (purpose, command, needed) in PACKAGES.items():
        try:
            found = importlib.metadata.version(name)
            if name == 'torch':
                yield Finding('torch', 'ok', found)
        except importlib.metadata.PackageNotFoundError:
            if needed:
                yield Finding(name, 'problem', f'not installed ({purpose})', command)
            else:
                missing.setdefault(command, []).append(f'{name} ({purpose})')
    for command, names in missing.items():
        yield Finding('Packages', 'note', f'without {", ".join(names)}', command)
    if not missing:
        yield Finding('Packages', 'ok', 'all optional packages are installed')


def gpus() -> Iterator:
    """Yield Findings about the GPUs, what they can compute in, and how they are connected."""
    try:
        import torch
    except ImportError:
        return
    if torch.version.cuda is None:
        yield Finding('CUDA', 'note', f'torch {torch.__version__} is a CPU-only build')
        return
    if not torch.cuda.is_available():
        text = f'torch is built for CUDA {torch.version.cuda}, and sees no GPU'
        yield Finding('CUDA', 'note', text, 'nvidia-smi shows whether the driver does')
        return
    yield Finding('CUDA', 'ok', f'{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}')
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        capability = found.major, found.minor
        kinds = ['bfloat16'] * (capability >= (8, 0)) + ['float8'] * (capability >= (8, 9))
        text = (
            f'{found.name}, {found.total_memory / 1e9:.0f} GB, compute capability '
            f'{found.major}.{found.minor}, {" and ".join(kinds) or "float16 alone"}'
        )
        free = torch.cuda.mem_get_info(i)[0] / 1e9
        busy = free < 0.8 * found.total_memory / 1e9
        said = f'{text}; only {free:.0f} GB are free' if busy else text
        yield Finding(f'GPU {i}', 'note' if busy else 'ok', said)
    brought = [name for package, name in KERNELS.items() if importlib.util.find_spec(package)]
    yield Finding('Attention', 'ok', ', '.join([*brought, 'cudnn', 'sdpa', 'flex', 'manual']))
    if torch.cuda.device_count() > 1:
        from onetrain.distributed import topology

        line, slow = topology.describe_topology(topology.read_topology(torch.cuda.device_count()))
        if line:
            text = line.removeprefix('Topology: ')
            yield Finding('Topology', 'note' if slow else 'ok', slow or text)


def machine() -> Iterator:
    """Yield Findings about cores, memory, disk, shared memory and the compiler."""
    cores = len(os.sched_getaffinity(0))
    with open('/proc/meminfo') as f:
        kilobytes = {
            line.split(':')[0]: int(line.split()[1]) for line in f if line.startswith('Mem')
        }
    total, free = (kilobytes[key] / 1e6 for key in ('MemTotal', 'MemAvailable'))
    yield Finding('Cores', 'ok', f'{cores} for this process')
    yield Finding('Memory', 'ok', f'{total:.1f} GB, {free:.1f} GB free')
    disk = shutil.disk_usage(ROOT).free / 1e9
    few = disk < 10
    yield Finding('Disk', 'note' if few else 'ok', f'{disk:.1f} GB free in {ROOT}')
    if os.path.isdir('/dev/shm'):
        shared = shutil.disk_usage('/dev/shm').total / 1e9
        text = f'{shared:.2f} GB in /dev/shm'
        if shared < 1:
            remedy = 'in a container add --ipc=host or --shm-size=16g'
            yield Finding('Shared memory', 'note', f'{text}: little for use_dataloader', remedy)
        else:
            yield Finding('Shared memory', 'ok', text)
    if cpu.has_compiler():
        yield Finding('Compiler', 'ok', 'C++, for torch.compile on a CPU')
    else:
        text = 'no C++ compiler: on a CPU runs go without torch.compile'
        yield Finding('Compiler', 'note', text, 'apt-get install g++')


def data() -> Iterator:
    """Yield Findings about the tokenizers and data sets that are here."""
    from onetrain.data.token_file import read_meta

    folder, prepared = os.path.join(ROOT, 'data'), []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not any(os.path.isfile(os.path.join(path, file)) for file in ('train.bin', 'meta.pkl')):
            continue
        try:
            tokens = read_meta(path).get('tokens', {}).get('train')
        except ValueError as error:
            yield Finding('Data', 'note', str(error))
            continue
        prepared.append(f'{name} ({tokens:,} tokens)' if tokens else name)
    if prepared:
        yield Finding('Data', 'ok', ', '.join(prepared))
    else:
        text = 'no data set is prepared'
        yield Finding('Data', 'note', text, 'python data/own_text/prepare.py --input YOUR.txt')
    tokenizers = [
        name
        for name in sorted(os.listdir(ROOT))
        if name.endswith('_tokenizer') and os.path.isdir(os.path.join(ROOT, name))
    ]
    yield Finding('Tokenizers', 'ok', ', '.join(['bytes', 'char', *tokenizers]))


def bucket(url: str) -> Iterator:
    """Yield a Finding about whether `url` can be written to and read from."""
    from onetrain.checkpoint.uploader import check_writable
    from onetrain.config import UserError
    from onetrain.files import redact

    try:
        check_writable(url, 'doctor')
        yield Finding('URL', 'ok', f'{redact(url)} can be written to and read from')
    except UserError as error:
        yield Finding('URL', 'problem', str(error), 'correct the URL or its credentials')


def main(argv: list[str] | None = None) -> int:
    """Print the findings; returns the exit code."""
    parser = ArgumentParser(prog='start.py doctor', description=__doc__)
    parser.add_argument('--url', help='a place for uploads, which is written to and read from')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args(argv)
    findings = list(python_and_packages())
    usable = all(finding.state != 'problem' for finding in findings)
    findings += [*gpus(), *machine()]
    if usable:
        findings += data()
        findings += bucket(args.url) if args.url else ()
    problems = [finding for finding in findings if finding.state == 'problem']
    if args.json:
        print(json.dumps({'version': __version__, 'findings': [asdict(f) for f in findings]}))
        return 1 if problems else 0
    print(f'onetrain {__version__}')
    marks = {'ok': ' ', 'note': '-', 'problem': '!'}
    for finding in findings:
        print(f'{marks[finding.state]} {finding.subject:<14} {finding.text}')
        if finding.remedy:
            print(f'  {"":<14} -> {finding.remedy}')
    if problems:
        print(f'{len(problems)} thing{"s" if problems[1:] else ""} to mend, marked with !')
        return 1
    print('runs can start here')
    return 0


if __name__ == '__main__':
    sys.exit(run_command(main, interrupted=None))
