"""The command cache."""

import time
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from nanochat.cache import cache_folder, clear, entries
from nanochat.errors import UserError

NAME_WIDTH = 12  # of an entry's checksum, which is 32 long: enough to tell entries apart


def cache(
    clear_names: Annotated[tuple[str, ...] | None, arg(name="clear", metavar="NAME...")] = None,
    cache_path: Annotated[Path | None, arg(name="cache", metavar="DIR")] = None,
) -> None:
    """List what training keeps to start faster: decoded pictures of robot data, vision vectors, exported models; or delete it.

    All of it can be made again, so deleting only costs time. A run that uses an entry now goes on.

    Args:
        clear_names: Delete these entries: their names or how they begin, such as frames/3f8a or features; all for everything.
        cache_path: The cache folder; default $NANOCHAT_CACHE, then ~/.cache/nanochat.
    """
    folder = cache_folder("", cache_path)
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected the cache folder")
    if clear_names == ():
        raise UserError(
            "--clear needs the names of entries, such as features or frames/3f8a, or all; nothing was deleted"
        )
    found = clear(list(clear_names), cache_path) if clear_names else entries(cache_path)
    for entry in found:
        kind, _, name = entry.name.partition("/")
        used = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        print(f"{entry.size / 1e9:9.3f} GB  {used}  {kind}/{name[:NAME_WIDTH]}  {entry.about}")
    size = sum(entry.size for entry in found) / 1e9
    what = "deleted from" if clear_names else "in"
    print(f"{len(found)} entr{'y' if len(found) == 1 else 'ies'}, {size:.3f} GB {what} {folder}")
