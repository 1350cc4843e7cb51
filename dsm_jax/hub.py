"""Find a model: a local path, a model inside the package, or a name on the hub, fetched on first use."""

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.files import decode_json, read_text

_log = logging.getLogger("dsm_jax")
DEFAULT = "kyutai/stt-1b-en_fr"
# Names to propose in place of one that there is not.
_PUBLISHED = (
    *(DEFAULT, "kyutai/stt-2.6b-en", "kyutai/tts-1.6b-en_fr", "kyutai/tts-0.75b-en-public", "sesame/csm-1b"),
    *("kyutai/mimi", "digits", "digits-tts"),
)
_ASSETS = Path(__file__).with_name("assets")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INSTEAD = "give a local folder, or use a model that came with the library: digits transcribes, digits-tts speaks"
_PATTERNS = ("*.json", "*.safetensors", "*.model", "params/*")


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """Options of fetching models.

    Attributes:
      revision: branch, tag or commit; None is the newest.
      cache_dir: folder of fetched models; None is the hub's own.
      token: for models behind a login; None takes the one of `hf auth login`.
      local_files_only: never ask the hub.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False


def find(source: str | Path, options: HubOptions = HubOptions()) -> Path:
    """Find a model, fetching it if it is on the hub only.

    Args:
      source: a local folder or file, the name of a model inside the package, or "organisation/name" on the hub.
      options: where and how it is fetched.

    Returns:
      A folder or file that exists.

    Raises:
      ConfigError: the source is neither a text nor a path.
      CheckpointError: there is nothing of that name, it cannot be fetched, or a revision is asked of what is not on
        the hub.
    """
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"the model is {source!r}; expected a folder, a file, or the name of a model")
    path, name = expanded(source), str(source)
    if not os.path.exists(path) and "/" not in name and os.path.isdir(_ASSETS / name):
        path = _ASSETS / name
    if os.path.exists(path):  # says no to names that pathlib raises at
        if options.revision is not None:
            raise CheckpointError(
                f"{source} is on this machine, where it has no revisions, and {options.revision!r} was asked for; "
                "leave the revision out, or name a model on the hub"
            )
        return path
    if _HUB_NAME.fullmatch(name) and not name.endswith((".safetensors", ".json")):
        return _fetch(name, options)
    raise CheckpointError(
        f"{source} is no file or folder, and no name on the hub, which has one slash, as {DEFAULT} has; check the path"
        + _proposal(name)
    )


def _proposal(name: str) -> str:
    """Return the end of a sentence that proposes the known name closest to one that there is not."""
    known = {short: full for full in _PUBLISHED for short in (full, full.rpartition("/")[2])}
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {known[near[0]]}?" if near and known[near[0]] != name else ""


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder in place of a leading "~"."""
    return Path(os.path.expanduser(path))  # leaves a user that is unknown as it is, where pathlib raises


def title(source: str | Path, found: Path) -> str:
    """Return the name of a model for messages: the last part of a local path, or the name that it was found by.

    Args:
      source: as given to `find`.
      found: the result of `find`.
    """
    if found != expanded(source):
        return str(source)
    return found.name if found.name not in ("", "..") else found.resolve().name


def fetch_file(repository: str, name: str) -> Path:
    """Fetch one file of a repository on the hub on first use, and find it in the cache afterwards.

    Args:
      repository: "organisation/name".
      name: of the file in it.

    Returns:
      The file in the local cache.

    Raises:
      CheckpointError: it is not there, or cannot be fetched.
    """
    import huggingface_hub

    return _fetched(
        f"{repository}/{name}", lambda: huggingface_hub.hf_hub_download(repository, name), "give a local file"
    )


def _fetch(name: str, options: HubOptions) -> Path:
    import huggingface_hub

    chosen: dict[str, Any] = dataclasses.asdict(options)

    def fetch(patterns: Sequence[str], left_out: Sequence[str]) -> Path:
        return _fetched(
            name,
            lambda: huggingface_hub.snapshot_download(
                name, allow_patterns=list(patterns), ignore_patterns=list(left_out), **chosen
            ),
            _INSTEAD,
            options.revision,
        )

    _log.info("looking for %s on the hub", name)
    return fetch(_PATTERNS, _in_another_layout(fetch(["config.json"], ()) / "config.json"))


def _in_another_layout(config_path: Path) -> list[str]:
    """Return the names of weights that a repository holds a second time, in a layout that is not read.

    A config.json that names the index of transformers' weights, as that of sesame/csm-1b does, leaves the standard name
    to another layout.
    """
    try:
        values = decode_json(read_text(config_path))
    except (OSError, ValueError):  # no config.json, or one that is refused when the folder is opened
        return []
    return ["model.safetensors"] if isinstance(values, dict) and values.get("transformers_weights") else []


def _fetched(name: str, fetch: Callable[[], str], instead: str, revision: str | None = None) -> Path:
    from huggingface_hub import errors

    version = name if revision is None else f"revision {revision} of {name}"
    try:
        return Path(fetch())
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is on the hub but gated; ask for access there, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {name} here, and no repository of that name on the hub (or it is private: run "
            f"`hf auth login`); check the spelling{_proposal(name)}"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{version} is not in the local cache and could not be fetched: there is no network, or HF_HUB_OFFLINE or "
            f"local_files_only is set; {instead}{_proposal(name)}"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"there is no {version} on the hub; check its branches, tags and commits") from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"there is no {name} on the hub; check the spelling, or {instead}") from None
    except Exception as error:  # of the network, the disk, or the hub
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name} could not be fetched ({reason}); try again, or {instead}") from error
