"""
Set up, demo, checks and tests, with one command each.

    python3 start.py demo     train a small model in minutes, and let it write
    python3 start.py doctor   what this machine has for training and lacks
    python3 start.py check    train, kill, resume to the same bits, export
    python3 start.py test     run the tests, with all that they need
    python3 start.py setup    make .venv with requirements.txt, no more

Needs nothing but Python 3.10 to 3.13 and a package index. The environment is
made in .venv; an interrupted demo goes on where it stopped.
"""

import difflib
import hashlib
import os
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, '.venv')
PYTHON = os.path.join(VENV, 'bin', 'python')
OUT = 'out-demo'


def call(title: str, *command: str) -> None:
    """Run a command of the project in .venv, shown as a user would type it; leave with its exit
    code if it fails.
    """
    print(f'\n==> {title}\n    python {shlex.join(command)}\n', flush=True)
    # threads that wait without spinning: a little slower on an idle machine, twice as fast beside
    # other programs (bench/RESULTS.md)
    environment = {'OMP_WAIT_POLICY': 'passive', **os.environ}
    code = subprocess.run([PYTHON, *command], cwd=ROOT, env=environment).returncode
    if code != 0:
        sys.exit(code)


def set_up(everything: bool = False) -> None:
    """Make .venv and install requirements.txt into it, and with `everything` the extra `dev` of
    pyproject.toml, unless that was done already.
    """
    contents = b''
    for name in ('requirements.txt', *(['pyproject.toml'] if everything else [])):
        with open(os.path.join(ROOT, name), 'rb') as f:
            contents += f.read()
    wanted = hashlib.sha256(contents).hexdigest()
    stamp = os.path.join(VENV, 'installed-dev' if everything else 'installed')
    if os.path.exists(stamp) and open(stamp).read() == wanted:
        return
    what = ['-r', 'requirements.txt'] + (['-e', '.[dev]'] if everything else [])
    print(
        '==> making .venv and installing'
        f' {"the extra `dev` of pyproject.toml" if everything else "requirements.txt"} into it'
        ' (once; some minutes on a slow connection)',
        flush=True,
    )
    if subprocess.run([sys.executable, '-m', 'venv', VENV]).returncode != 0:
        sys.exit(
            'error: python3 -m venv failed; on Debian and Ubuntu type: apt-get install python3-venv'
        )
    # Python compiles what it imports, which is a small part of it
    install = [PYTHON, '-m', 'pip', 'install', '--disable-pip-version-check', '--no-compile']
    if subprocess.run([*install, *what], cwd=ROOT).returncode != 0:
        sys.exit('error: pip could not install what is needed; is a package index reachable?')
    with open(stamp, 'w') as f:
        f.write(wanted)


def demo():
    """Prepare, train, sample and plot the demo."""
    set_up()
    if not os.path.exists(os.path.join(ROOT, 'data', 'pystdlib', 'train.bin')):
        call("tokenize the source of Python's standard library", 'data/pystdlib/prepare.py')
    saved = os.path.join(ROOT, OUT, 'checkpoints')
    begun = os.path.isdir(saved) and any(name.startswith('step_') for name in os.listdir(saved))
    call('train', 'train.py', 'config/demo_pystdlib.py', *(['--init_from=resume'] if begun else []))
    call(
        'let it write',
        'sample.py',
        f'--out_dir={OUT}',
        '--start=def ',
        '--num_samples=3',
        '--top_k=50',
    )
    call('draw its loss', 'plots/plot_single_run.py', OUT)
    print(
        f"""
==> done
    picture      {OUT}/run_*.png
    logs         {OUT}/run_*.jsonl (every number), run_*.json, run_*.log (this text)
    checkpoints  {OUT}/checkpoints

    what to type next, after `source .venv/bin/activate`:
    python sample.py --out_dir={OUT} --start="class Parser"          more text
    python train.py config/demo_pystdlib.py --init_from=resume --max_iters=4000 \\
        --lr_decay_iters=4000                                         train on
    python data/own_text/prepare.py --input my.txt --tokenizer char   your own text, then
    python train.py config/own_text.py
    python train.py --help=all                                        every key
    TRAINING_GUIDE.md                                                 billions of parameters"""
    )


def doctor():
    """Print what this machine has and lacks."""
    python = PYTHON if os.path.exists(PYTHON) else sys.executable
    sys.exit(subprocess.run([python, '-m', 'onetrain.doctor', *sys.argv[2:]], cwd=ROOT).returncode)


def check():
    """Check that this copy keeps its promises here."""
    set_up()
    call('check', '-m', 'onetrain.self_check')


def test():
    """Run the tests."""
    set_up(everything=True)
    # whole files to each process: much of a file waits for other processes, and its fixtures are
    # made once
    processes = max(1, min(4, os.cpu_count() or 1))
    call(
        'test',
        '-m',
        'pytest',
        '-q',
        '-n',
        str(processes),
        '--dist',
        'loadfile',
        '--no-loadscope-reorder',
        *sys.argv[2:],
    )


def main():
    """Run the command line."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f'error: this is Python {sys.version.split()[0]}; onetrain needs 3.10 to 3.13')
    commands = {'demo': demo, 'doctor': doctor, 'check': check, 'test': test, 'setup': set_up}
    if sys.argv[1:2] in (['--help'], ['-h'], ['help']):
        print(__doc__.strip())
        return
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        meant = difflib.get_close_matches(' '.join(sys.argv[1:2]), commands, 1)
        if meant:
            print(
                f'error: {sys.argv[1]}: did you mean python3 start.py {meant[0]}?', file=sys.stderr
            )
            sys.exit(2)
        print(
            f'error: {" ".join(sys.argv[1:]) or "no command"}: type one of'
            f' {", ".join(f"python3 start.py {name}" for name in commands)}',
            file=sys.stderr,
        )
        sys.exit(2)
    if sys.argv[2:] and sys.argv[1] not in ('doctor', 'test'):
        more = ' '.join(sys.argv[2:])
        print(f'error: python3 start.py {sys.argv[1]} takes no options: {more}', file=sys.stderr)
        sys.exit(2)
    try:
        commands[sys.argv[1]]()
    except BrokenPipeError:  # as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        print('\ninterrupted: type the same command again to go on', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
