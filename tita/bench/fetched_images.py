"""Images that question rows name by URL: downloaded to files before the questions are asked."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from tita.bench.questions import BenchmarkItem
from tita.data.dataset import image_name
from tita.data.row_values import ImageURL
from tita.errors import TitaError
from tita.storage.files import atomic_path
from tita.terminal import counted, progress, say
from tita.vlm.image_fetcher import FetchError, ImageFetcher, is_public
from tita.vlm.images import open_image

MAX_BYTES = 20 << 20
TIMEOUT_S = 30.0
MAX_HOSTS = 16
"""Distinct hosts of a file's URLs, unless the hosts are given."""
_FOLDER = "fetched"
_IN_FLIGHT = 8
_AT_A_TIME = 64
"""Questions whose images are fetched before they are passed on."""
_MAX_FAILURES = 50
"""Failures after which downloads stop."""
_MAX_SHOWN = 10


@dataclass(slots=True, kw_only=True)
class ImageDownloads:
    """Downloads images into a folder; an image that is there is not downloaded again."""

    folder: Path
    """The folder of images; downloads are in its subfolder `fetched`."""
    fetcher: ImageFetcher
    hosts: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)

    def replace_urls(self, items: Iterable[BenchmarkItem]) -> Iterator[BenchmarkItem]:
        """Yield the questions with paths below `folder` in place of URLs, in their order.

        A URL that fails does not end the downloads: all that fail are reported together.

        Raises:
            TitaError: images could not be fetched, or the URLs name too many hosts. The downloads
                so far are kept.
        """
        rest = iter(items)
        with (
            ThreadPoolExecutor(_IN_FLIGHT) as pool,
            progress("fetching images", total=None, unit="images") as advance,
        ):
            while some := list(itertools.islice(rest, _AT_A_TIME)):
                urls = {
                    url: item.id
                    for item in some
                    for url in item.images
                    if isinstance(url, ImageURL)
                }
                self._check_hosts(urls)
                paths: dict[str, str] = {}
                for url, (path, failure) in zip(urls, pool.map(self._fetch, urls), strict=True):
                    advance()
                    if failure:
                        self.failures.append(f"{url[:200]} of question {urls[url]}: {failure}")
                    paths[url] = path
                if len(self.failures) >= _MAX_FAILURES:
                    break
                if not self.failures:
                    yield from (_with_paths(item, paths) for item in some)
        if self.failures:
            for text in self.failures[:_MAX_SHOWN]:
                say(text)
            raise TitaError(
                f"{counted(len(self.failures), 'image')} not fetched, such as {self.failures[0]}",
                where=str(self.folder),
                remedy="remove these questions, or run the command again: images that were "
                "fetched are kept",
            )

    def _check_hosts(self, urls: Iterable[str]) -> None:
        if self.fetcher.hosts is not None:
            return
        self.hosts |= {urlsplit(url).hostname or "" for url in urls}
        if len(self.hosts) > MAX_HOSTS:
            names = ", ".join(sorted(self.hosts)[:3])
            raise TitaError(
                f"images of more than {MAX_HOSTS} hosts, such as {names}",
                remedy="name those to fetch from with --image-host, .example.org for subdomains",
            )

    def _fetch(self, url: str) -> tuple[str, str]:
        """The path of the image below `folder`, and what failed; one of them is empty."""
        digest = hashlib.sha256(url.encode()).hexdigest()
        place = self.folder / _FOLDER / digest[:2]
        known = next(place.glob(f"{digest}.*"), None)
        if known is None:
            try:
                content = self.fetcher.fetch(url, max_bytes=MAX_BYTES)
                open_image(content)
            except FetchError as error:
                return "", f"{error.what} ({error.detail})" if error.detail else error.what
            except TitaError as error:
                return "", error.what
            known = place / f"{digest}{Path(image_name(content)).suffix}"
            known.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(known) as temporary:
                temporary.write_bytes(content)
        return known.relative_to(self.folder).as_posix(), ""


def _with_paths(item: BenchmarkItem, paths: Mapping[str, str]) -> BenchmarkItem:
    return replace(item, images=tuple(paths.get(image, image) for image in item.images))


def image_downloads(folder: Path, *, hosts: Sequence[str], private: bool) -> ImageDownloads:
    """Downloads into `folder`, as `--image-host` and `--private-hosts` say.

    Raises:
        TitaError: private addresses of any host are allowed.
    """
    if private and not hosts:
        raise TitaError("--private-hosts needs --image-host", remedy="name the private host")
    fetcher = ImageFetcher(
        hosts=tuple(hosts) or None,
        timeout_s=TIMEOUT_S,
        public=(lambda _: True) if private else is_public,
    )
    return ImageDownloads(folder=folder, fetcher=fetcher)
