"""Peak memory of preparing a small and a large corpus: all processes of data/own_text/prepare.py
together, looked at ten times a second.

python bench/prepare_memory.py --mb 50 1000
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from prepare_speed import ROOT, make_corpus

from onetrain.command_line import number, run_command


def memory(pid):
    """Bytes that a process and its descendants hold (proportional set size: what they share is
    counted once).
    """
    total, todo = 0, [pid]
    while todo:
        pid = todo.pop()
        try:
            with open(f'/proc/{pid}/smaps_rollup') as f:
                total += next(int(line.split()[1]) * 1024 for line in f if line.startswith('Pss:'))
            with open(f'/proc/{pid}/task/{pid}/children') as f:
                todo += f.read().split()
        except (OSError, StopIteration):  # it has ended
            continue
    return total


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--mb', type=number(), nargs='+', default=[50, 1000])
    args = parser.parse_args()
    peaks = {}
    for megabytes in args.mb:
        with tempfile.TemporaryDirectory() as folder:
            make_corpus(folder, megabytes, 32000)
            for name in (f'{folder}/tokenizer', 'stdlib_bpe'):
                environment = {**os.environ, 'PYTHONPATH': f'{ROOT}:{folder}/plugin'}
                process = subprocess.Popen(
                    [
                        sys.executable,
                        f'{ROOT}/data/own_text/prepare.py',
                        '--input',
                        f'{folder}/corpus.jsonl',
                        '--tokenizer',
                        name,
                        '--output',
                        f'{folder}/set',
                        '--num_proc',
                        '2',
                    ],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                peak, started = 0, time.perf_counter()
                while process.poll() is None:
                    peak = max(peak, memory(process.pid))
                    time.sleep(0.1)
                kind = 'Hugging Face' if os.sep in name else 'tiktoken'
                peaks[kind, megabytes] = peak
                print(
                    f'{kind:>13}, {megabytes:6.0f} MB: peak {peak / 1e6:.0f} MB in'
                    f' {time.perf_counter() - started:.0f} s, exit code {process.returncode}',
                    flush=True,
                )
    for kind in ('Hugging Face', 'tiktoken'):
        print(
            f'{kind}: {peaks[kind, args.mb[-1]] / peaks[kind, args.mb[0]]:.2f} times the peak for'
            f' {args.mb[-1] / args.mb[0]:.0f} times the corpus'
        )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
