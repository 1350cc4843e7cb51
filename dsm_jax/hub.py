"""Finds a model: a local path, a model inside the package, or a name on the hub, fetched on first use."""

import re
from collections.abc import Callable
from pathlib import Path

from dsm_jax.errors import CheckpointError

DEFAULT = "kyutai/stt-1b-en_fr"
_ASSETS = Path(__file__).with_name("assets")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INSTEAD = "give a local folder, or use the model that came with the library: --model digits"
_PATTERNS = ("*.json", "*.safetensors", "*.model", "params/*")


def find(source: str | Path) -> Path:
    """Finds a model, fetching it if it is on the hub only.

    Args:
      source: a local folder or file, the name of a model inside the package, or "organisation/name" on the hub.

    Returns:
      A folder or file that exists.

    Raises:
      CheckpointError: there is nothing of that name, or it cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if (_ASSETS / name).is_dir() and "/" not in name:
        return _ASSETS / name
    if _HUB_NAME.fullmatch(name) and not name.endswith((".safetensors", ".json")):
        return _fetch(name)
    raise CheckpointError(
        f"{source} is no file or folder, and no name on the hub, which has one slash, as {DEFAULT} has; check the path"
    )


def fetch_file(repository: str, name: str) -> Path:
    """Fetches one file of a repository on the hub on first use, and finds it in the cache afterwards.

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


def _fetch(name: str) -> Path:
    import huggingface_hub

    patterns: list[str] = list(_PATTERNS)
    return _fetched(name, lambda: huggingface_hub.snapshot_download(name, allow_patterns=patterns), _INSTEAD)


def _fetched(name: str, fetch: Callable[[], str], instead: str) -> Path:
    from huggingface_hub import errors

    try:
        return Path(fetch())
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is on the hub but gated; ask for access there, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {name} here, and no repository of that name on the hub (or it is private: run "
            "`hf auth login`); check the spelling"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name} is not in the local cache and could not be fetched: there is no network, or HF_HUB_OFFLINE is "
            f"set; {instead}"
        ) from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"there is no {name} on the hub; check the spelling, or {instead}") from None
    except Exception as error:  # of the network, the disk, or the hub
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name} could not be fetched ({reason}); try again, or {instead}") from error
