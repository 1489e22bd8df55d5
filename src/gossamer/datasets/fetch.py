"""Downloads with checksums, short time limits and errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gossamer.core.errors import DatasetError
from gossamer.core.locate import places

__all__ = ["fetch"]

_TIMEOUT = (5, 30)  # seconds to connect, and between two pieces of the answer


def fetch(
    folder: str,
    filename: str,
    *,
    md5: str,
    mirrors: Sequence[str],
    remote: str | None = None,
    root: str | Path | None = None,
    download: bool = True,
) -> Path:
    """The file ``folder/filename`` of the data folders, downloaded into the last one if missing.

    Args:
        mirrors: addresses of folders, tried in order; the checksum is the same for all.
        remote: the file's name there, where it differs.
        download: False only looks.

    Raises :class:`DatasetError` naming every place looked at, why the downloads failed, and the
    fix.
    """
    looked = [place / folder / filename for place in places(root)]
    looked += [place / filename for place in places(root)]
    for path in looked:
        if path.is_file():
            return path
    reasons = []
    target = places(root)[-1] / folder
    if download:
        import logging

        import pooch

        pooch.get_logger().setLevel(logging.WARNING)
        for mirror in mirrors:
            try:
                return Path(
                    pooch.retrieve(
                        mirror.rstrip("/") + "/" + (remote or filename),
                        known_hash=f"md5:{md5}",
                        fname=filename,
                        path=target,
                        downloader=pooch.HTTPDownloader(timeout=_TIMEOUT),
                    )
                )
            except (OSError, ValueError) as e:  # requests' errors are OSErrors; ValueError: md5
                reasons.append(f"{mirror}: {type(e).__name__}: {str(e).splitlines()[0][:160]}")
    raise DatasetError(
        f"no {filename}; looked at {', '.join(map(str, looked))}. "
        + ("Downloads failed: " + "; ".join(reasons) if download else "Downloads are off")
        + f". Put the file (md5 {md5}) into {target}, or name the folder that holds "
        f"{folder}/ with root= or $GOSSAMER_DATA"
    )
