"""What every prepare.py does around its own work: --output, the closing lines, and how a user's error ends it."""
import argparse
import os
import sys

DATA = os.path.dirname(os.path.abspath(__file__))


def argument_parser(docstring, folder):
    """An ArgumentParser with --output, which is `folder` unless given. The docstring of the script is its help."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--output', default=folder, metavar='FOLDER', help='where the data set goes, default: the folder of this script')
    return parser


def report(writer, folder, config=None):
    """Print what `writer` (a closed TokenFileWriter) wrote and what to type next.

    folder: the script's own; config: the recipe made for the data set there, or None.
    """
    writer.report()
    output = os.path.abspath(writer.folder)
    name = os.path.relpath(output, DATA)
    name = output if name.startswith(os.pardir) else name  # --dataset takes a path too
    own = output == os.path.abspath(folder)
    words = [config] if config and own else [config, f'--dataset={name}'] if config else [f'--dataset={name}']
    print(f"next: python train.py {' '.join(words)}")


def run(main):
    """Run `main` as a script: what the user got wrong ends it with one sentence and exit code 2, Ctrl-C with 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(_say(f'error: {error}', 2))
    except KeyboardInterrupt:
        sys.exit(_say('interrupted, nothing was written', 130))


def _say(message, code):
    print(message, file=sys.stderr)
    return code
