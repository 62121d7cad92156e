"""Hides the output of native code unless something goes wrong."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile


@contextlib.contextmanager
def quiet_file_descriptors():
    """Redirect the output of native code to a file; on an error, show its last lines and re-raise."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            if failed:
                log.seek(0)
                tail = log.read().decode(errors="replace").splitlines()[-30:]
                sys.stderr.write("\n".join(tail) + "\n")
