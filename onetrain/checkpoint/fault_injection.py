"""Death on purpose at a named point, to prove that nothing is lost there.

    ONETRAIN_FAULT=before_rename python train.py ...       the first time that it gets there
    ONETRAIN_FAULT=before_rename:40 python train.py ...    for the checkpoint of step 40

It ends as under SIGKILL (os._exit, no cleaning up) with exit code 86. Without the variable, each
point costs one comparison per save.

    staging           the tensors are being copied aside; nothing is on disk
    after_shard       this process has written its tensors; no manifest, still the temporary folder
    before_manifest   everything but the manifest is written
    before_rename     the temporary folder is complete
    after_rename      the checkpoint has its name; older ones are still there
    retention         an older checkpoint is half removed
    upload            a copy elsewhere has some of its files
"""

import os

from onetrain.config import UserError

POINTS = (
    'staging',
    'after_shard',
    'before_manifest',
    'before_rename',
    'after_rename',
    'retention',
    'upload',
)
EXIT_CODE = 86
_POINT, _, _STEP = os.environ.get('ONETRAIN_FAULT', '').partition(':')


def check() -> None:
    """Raise UserError for a value of ONETRAIN_FAULT that names no point."""
    if _POINT and (_POINT not in POINTS or not (_STEP or '0').isdigit()):
        raise UserError(
            f'ONETRAIN_FAULT={os.environ["ONETRAIN_FAULT"]} is not POINT or POINT:STEP with POINT'
            f' one of {", ".join(POINTS)}'
        )


def maybe_crash(point: str, step: int) -> None:
    """Die here if ONETRAIN_FAULT says so."""
    if _POINT == point and _STEP in ('', str(step)):
        os._exit(EXIT_CODE)
