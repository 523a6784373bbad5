"""Writing a whole directory tree so that a reader meets the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from vssm.bundle.manifest import BUNDLE_MANIFEST, compare_files, read_bundle_manifest
from vssm.errors import ArtifactError


@contextlib.contextmanager
def staged_bundle(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty directory beside `target`, which takes its place on success.

    Raises:
        ArtifactError: `target` exists and not `force`, or is no bundle as it was made, or cannot
            be written. Nothing was changed then.
    """
    final = target.absolute()
    _check_target(final, force)
    token = secrets.token_hex(6)
    staging, old = (final.with_name(f".{final.name}.{word}-{token}") for word in ("new", "old"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        if os.path.lexists(final):
            final.rename(old)
        try:
            staging.rename(final)
        except OSError:
            if old.exists():
                old.rename(final)
            raise
    except OSError as error:
        raise ArtifactError(
            f"output={final} cannot be written ({error.strerror or error}); name a directory that "
            "you may write to, on a disk with room"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _check_target(final: Path, force: bool) -> None:
    if not os.path.lexists(final):
        return
    if final.is_dir() and not final.is_symlink() and not any(final.iterdir()):
        return
    if not force:
        raise ArtifactError(
            f"output={final} is already there and is not overwritten unasked; name another "
            f"directory, or pass force=True (--force) to replace a bundle"
        )
    if final.is_symlink() or not (final / BUNDLE_MANIFEST).is_file():
        raise ArtifactError(
            f"output={final} holds no {BUNDLE_MANIFEST}, so it is no bundle and is not replaced; "
            "name another directory"
        )
    if changed := compare_files(final, read_bundle_manifest(final)):
        raise ArtifactError(
            f"output={final} is not as it was made ({changed[0]}), so replacing it could lose "
            "work; move it away, or name another directory"
        )
