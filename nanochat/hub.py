"""Checkpoints from and to the Hugging Face hub."""

from pathlib import Path

from nanochat.checkpoint import REQUIRED, CheckpointError, locate, verify

FILES = [*REQUIRED, "manifest.json"]  # all but the optimiser state


def download(name: str) -> Path:
    """The cached download of a hub name. Raises CheckpointError where the hub does not give it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"there is no folder {name}, and the hub does not have it: {reason}") from error


def push_to_hub(name: str | Path, repo_id: str, private: bool = True) -> str:
    """Verify a checkpoint and upload it; returns its address. Raises CheckpointError if it is damaged, OSError where the hub
    cannot be reached or refuses it."""
    from huggingface_hub import HfApi

    folder = locate(name)
    verify(folder)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=FILES))
    except Exception as error:  # those of the HTTP library, as without a network, are no OSErrors
        raise OSError(f"{repo_id} could not be uploaded: {' '.join(str(error).split())}") from error
