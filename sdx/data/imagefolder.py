"""A folder of images with captions, checked as a whole before training.

Layout: images and tables lie in `data.dir`, or in the folder named like the split under it; then
only that folder's images count, and a table may lie in either. Folders nest. A caption comes from
the row of a `metadata.jsonl` or `metadata.csv` that names the image relative to the table, or else
from the `.txt` file beside the image. Names that begin with a dot are not looked at.

What becomes of what is wrong:

- the run stops (`DataError`): a table that cannot be read as one (see metadata.py), an image listed
  by two rows, a path or link that leaves `data.dir`, a split other than train without its folder,
  no usable image, too many bad ones;
- the image is left out and counted (`bad_images`): it is missing, unreadable, empty, no JPEG, PNG
  or WEBP, over-large, too thin, truncated or corrupt; it has no caption, or one that is not UTF-8;
  its name is not UTF-8.

Every image is decoded once to find the bad ones, since neither its header nor its end shows a
damaged middle. What was found good is remembered by size and modification time in the user's cache,
so that the next start only lists the folder.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from sdx.data.images import check_size, decode
from sdx.data.metadata import TABLES, Listed, check_inside, read_caption_file, read_table
from sdx.data.source import BadImage, BadImageError, DataError, Example, count_reasons

SCAN_CACHE = Path("~/.cache/sdx/scans")

# Formats sdx does not read are listed too: such an image is reported, not passed over in silence.
_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif .jxl".split()
)
_MAX_BAD_SHOWN = 10
_NUM_THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class _Entry:
    """A good image: its path under `data.dir` with forward slashes, its bytes and captions."""

    path: str
    num_bytes: int
    captions: tuple[str, ...]


class ImageFolderSource:
    """The good images of a folder, in the order of their paths; `bad_images` are those left out.

    `say` is handed lines for the user. Raises `DataError` as the module's docstring lists.
    """

    def __init__(
        self,
        dir: str | Path,
        *,
        split: str = "train",
        caption_column: str = "text",
        max_bad_fraction: float = 0.01,
        max_pixels: int = 40_000_000,
        say: Callable[[str], None] = print,
        scan_cache: Path | None = SCAN_CACHE,
    ):
        self._root = _existing(Path(dir))
        self._max_pixels = max_pixels
        base = _split_folder(self._root, split)
        files, tables = _walk(self._root, base)
        listed = _read_tables(tables, self._root, base, caption_column)
        paths = sorted({*files, *listed}, key=lambda path: path.as_posix())
        if not paths:
            raise DataError(
                f"data.dir={dir}: no images in {base}; put JPEG, PNG or WEBP files there, with"
                " captions in metadata.jsonl, metadata.csv or a .txt file beside each."
            )
        scan = _Scan(self._root, listed, max_pixels, scan_cache)
        verdicts = scan.judge(paths, say)
        self._entries = [verdict for verdict in verdicts if isinstance(verdict, _Entry)]
        self.bad_images = [verdict for verdict in verdicts if isinstance(verdict, BadImage)]
        self._refuse_or_say(max_bad_fraction, say)
        self.fingerprint = _fingerprint(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        entry = self._entries[index]
        try:
            image = decode(self._root / entry.path, max_pixels=self._max_pixels)
        except BadImageError as error:
            raise BadImageError(error.reason, error.detail, entry.path) from error
        return Example(image, entry.captions)

    def _refuse_or_say(self, max_bad_fraction: float, say: Callable[[str], None]) -> None:
        num_bad = len(self.bad_images)
        if not num_bad:
            return
        reasons = count_reasons(self.bad_images)
        total = num_bad + len(self._entries)
        if num_bad / total > max_bad_fraction or not self._entries:
            fix = "repair or replace them"
            if self._entries:
                fix += f", or raise the limit to {_ceil(num_bad / total)} and go on without them"
            shown = [
                f"  {bad.path}: {bad.reason}" + (f" ({bad.detail})" if bad.detail else "")
                for bad in self.bad_images[:_MAX_BAD_SHOWN]
            ]
            if num_bad > len(shown):
                shown.append(f"  and {num_bad - len(shown)} more")
            raise DataError(
                f"data.max_bad_fraction={max_bad_fraction}: {num_bad} of {total} images of"
                f" {self._root} are bad ({reasons}); {fix}.\n" + "\n".join(shown),
                self.bad_images,
            )
        say(f"skipped {num_bad} bad images: {reasons}")


def _fingerprint(entries: list[_Entry]) -> str:
    """A hash of names, sizes and captions; pixels are not read for it."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry.path, entry.num_bytes, entry.captions]).encode())
    return digest.hexdigest()[:16]


class _Scan:
    """Judges images, in threads, and remembers the good ones between runs."""

    def __init__(self, root: Path, listed: dict[Path, Listed], max_pixels: int, cache: Path | None):
        self._root = root
        self._listed = listed
        self._max_pixels = max_pixels
        self._file = cache and _cache_file(cache, root)
        self._known = _read_cache(self._file)
        self._good: dict[str, list[int]] = {}

    def judge(self, paths: list[Path], say: Callable[[str], None]) -> list[_Entry | BadImage]:
        """An entry for each good image, in order, and a `BadImage` for each bad one."""
        if len(self._known) < len(paths) // 2:
            say(f"checking {len(paths)} images of {self._root}")
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sdx-scan") as threads:
            verdicts = list(threads.map(self._verdict, paths))
        if self._file is not None and self._good != self._known:
            _write_cache(self._file, self._good, say)
        return verdicts

    def _verdict(self, path: Path) -> _Entry | BadImage:
        name = path.relative_to(self._root).as_posix()
        try:
            name.encode()
            captions = self._captions(path)
            return _Entry(name, self._check(path, name), captions)
        except UnicodeEncodeError:
            readable = name.encode(errors="backslashreplace").decode()
            return BadImage(readable, "name not UTF-8")
        except BadImageError as error:
            return BadImage(name, error.reason, error.detail)

    def _check(self, path: Path, name: str) -> int:
        """The file's size in bytes, if the image is good."""
        try:
            stat = path.stat()
        except FileNotFoundError as error:
            raise BadImageError("missing", "no such file") from error
        except OSError as error:
            raise BadImageError("unreadable", str(error.strerror)) from error
        if not S_ISREG(stat.st_mode):  # reading a pipe would wait for ever
            raise BadImageError("unreadable", "not a file")
        key = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(name)
        if known is not None and known[:2] == key:
            height, width = known[2:]
            check_size(width, height, self._max_pixels)
        else:
            width, height = decode(path, max_pixels=self._max_pixels).size
        self._good[name] = [*key, height, width]
        return stat.st_size

    def _captions(self, path: Path) -> tuple[str, ...]:
        if path in self._listed:
            captions = self._listed[path].captions
            if not captions:
                raise BadImageError("no caption", f"blank in {self._listed[path].place}")
            return captions
        file = path.with_suffix(".txt")
        if not file.is_file():
            raise BadImageError("no caption", f"no row in a table, and no {file.name}")
        caption = read_caption_file(file, self._root)
        if not caption:
            raise BadImageError("no caption", f"{file.name} is blank")
        return (caption,)


def _existing(folder: Path) -> Path:
    folder = folder.expanduser()
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise DataError(
            f"data.dir={folder}: {what}, must be a folder of images and captions; give the path"
            f" of one, absolute or relative to {Path.cwd()}."
        )
    return folder.resolve()


def _split_folder(root: Path, split: str) -> Path:
    if not split or split != Path(split).name or split in (".", ".."):
        raise DataError(
            f"data.split={split!r}: must be the name of a folder in data.dir; use train, or the"
            " name alone."
        )
    base = root / split
    if base.is_dir():
        check_inside(base, root, str(base))
        return base
    if split != "train":
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise DataError(
            f"data.split={split}: {root} has no such folder, it has"
            f" {', '.join(folders) or 'none'}; only the split train may be data.dir itself."
        )
    return root


def _walk(root: Path, base: Path) -> tuple[list[Path], list[Path]]:
    """Images under `base`, and the tables there and in `root`."""
    images = []
    tables = [root / name for name in TABLES if base != root and (root / name).is_file()]
    for folder, folders, names in os.walk(base, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink() and not name.startswith("."):
                check_inside(path, root, str(path))
        images += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES
        ]
        tables += [Path(folder, name) for name in TABLES if name in names]
    return images, tables


def _raise(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be listed ({error.strerror}); make the folder readable."
    ) from error


def _read_tables(
    tables: list[Path], root: Path, base: Path, caption_column: str
) -> dict[Path, Listed]:
    """What the tables say of images under `base`; rows of other splits in a table of `root` are
    left.
    """
    listed: dict[Path, Listed] = {}
    for table in tables:
        check_inside(table, root, str(table))
        for path, row in read_table(table, root, caption_column).items():
            if path in listed:
                raise DataError(
                    f"{row.place}: {path.name} is listed before, in {listed[path].place}; list each"
                    " image once, with several captions as a list in metadata.jsonl."
                )
            if path.is_relative_to(base):
                listed[path] = row
    return listed


def _cache_file(cache: Path, root: Path) -> Path:
    name = hashlib.sha256(str(root).encode(errors="surrogateescape")).hexdigest()[:16]
    return cache.expanduser() / f"{name}.json"


def _read_cache(file: Path | None) -> dict[str, list[int]]:
    """Size, modification time in ns, height and width by path; empty where there is none to
    read.
    """
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): [int(n) for n in row] for name, row in content.items() if len(row) == 4}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # then everything is checked again


def _write_cache(file: Path, good: dict[str, list[int]], say: Callable[[str], None]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, delete=False
        ) as temporary:
            json.dump(good, temporary)
        os.replace(temporary.name, file)
    except OSError as error:
        say(f"the check of the images is not remembered: {file}: {error.strerror}")


def _ceil(fraction: float) -> float:
    """The fraction rounded up to three digits after the point, for a limit that lets it pass."""
    return math.ceil(fraction * 1000) / 1000
