"""The Hugging Face hub: folders from and to it. The caller decides which files."""

from collections.abc import Sequence
from pathlib import Path


def download(repo_id: str, files: Sequence[str]) -> Path:
    """The cached download of a repository "owner/name". Raises OSError with one line where the hub does not give it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise OSError(f"the hub does not have it: {str(error).splitlines()[0]}") from error


def upload(folder: Path, repo_id: str, files: Sequence[str], private: bool) -> str:
    """Upload these files of a folder, make the repository if needed; returns its address. Raises OSError with one line where the
    hub cannot be reached or refuses."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(files)))
    except Exception as error:  # those of the HTTP library, as without a network, are no OSErrors
        raise OSError(f"{repo_id} could not be uploaded: {' '.join(str(error).split())}") from error
