"""Files that are not on this machine, by way of fsspec: s3://, gs://, hf:// and whatever has a package for it."""

import io
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import UserError, first_line

# the protocols that data most often lie behind -> the package of fsspec's family that speaks it
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}


@dataclass(frozen=True)
class RemoteFile:
    """A file by its URL, with the few attributes of a Path that reading text asks for."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        """The last suffix of the name."""
        return PurePosixPath(self.url).suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes of the name."""
        return PurePosixPath(self.url).suffixes

    def open(self, mode: str):
        """The file, opened for reading; it can be sought in. Raises OSError, whatever the file system's own kind."""
        import fsspec

        try:
            # of Parquet exactly what is asked for is fetched, for the next column may be none of ours; of a text what
            # follows too, a block at a time
            cache = "none" if self.suffix == ".parquet" else "readahead"
            system, path = fsspec.core.url_to_fs(self.url)
            file = system.open(path, mode, cache_type=cache, block_size=1 << 22)
            # fsspec's own has no readline of a size, by which long lines are read in parts
            return file if cache == "none" else io.BufferedReader(file, 1 << 16)
        except OSError:
            raise
        except Exception as error:  # of a dozen libraries
            raise OSError(first_line(error)) from error


def is_remote(name: str) -> bool:
    """Whether a name is a URL."""
    return "://" in name


def list_remote(url: str) -> list[RemoteFile]:
    """The files that a URL names: itself, those of a folder at any depth, or those that match its `*`, in order.

    Raises UserError when there is none, the file system cannot be reached, or the package for it is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
        if any(mark in path for mark in "*?["):
            found = system.glob(path)
        else:
            found = system.find(path) if system.isdir(path) else [path] if system.exists(path) else []
        found = sorted(name for name in found if not system.isdir(name))
        urls = [system.unstrip_protocol(name) for name in found]
    except ImportError as error:
        way_out = f"pip install {PACKAGES[protocol]}" if protocol in PACKAGES else first_line(error)
        raise UserError(f"--dataset {url}: {protocol}:// needs a package that is not installed: {way_out}") from error
    except ValueError as error:
        raise UserError(f"--dataset {url}: {first_line(error)}") from error
    except Exception as error:  # of a dozen libraries
        raise UserError(
            f"--dataset {url}: cannot be listed ({first_line(error)}); check the name and access"
        ) from error
    if not urls:
        raise UserError(f"--dataset {url}: no such file or folder, and nothing matches")
    return [RemoteFile(url) for url in urls]


def remote_identity(file: RemoteFile) -> dict:
    """What tells a remote file from another: its size and, where the file system has one, its tag."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(file.url)
        info = system.info(path)
    except Exception as error:  # of a dozen libraries
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from error
    tag = next((str(info[key]) for key in ("ETag", "etag", "md5Hash", "blob_id") if info.get(key)), None)
    return {"bytes": info["size"]} | ({"tag": tag} if tag else {})
